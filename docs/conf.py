"""Sphinx configuration. The build imports the installed coopos. It needs no network: without one, names of others are no links."""

import pathlib
import socket
import sys

import coopos

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

project = "coopos"
author = "coopos authors"
copyright = "2026, coopos authors"
version = release = coopos.__version__

extensions = [
    "drawings",
    "myst_parser",  # for the pages that are Markdown in the repository: the changelog, CONTRIBUTING.md, SECURITY.md
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".rst": "restructuredtext"}
exclude_patterns = ["_build"]

# Docstrings have "Args:", "Returns:" and "Raises:" sections; types are part of the sentences there.
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# A copied example has no prompts and no output.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

linkcheck_timeout = 20
linkcheck_anchors = False


def is_reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), 5).close()
    except OSError:
        return False
    return True


# An inventory that can't be had is a warning, and warnings are errors.
inventories = {"python": "docs.python.org/3", "gevent": "www.gevent.org"}
intersphinx_mapping = {
    name: (f"https://{address}/", None) for name, address in inventories.items() if is_reachable(address.split("/")[0])
}

html_theme = "furo"
html_title = f"coopos {release}"
html_static_path = ["_static"]
html_css_files = ["coopos.css"]
html_js_files = ["tables.js"]
html_copy_source = False
