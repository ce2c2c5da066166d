"""Sphinx configuration. The build imports the installed coopos and needs no network."""

import coopos

project = "coopos"
author = "coopos authors"
copyright = "2026, coopos authors"
version = release = coopos.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# Docstrings have "Args:", "Returns:" and "Raises:" sections; types are part of the sentences there.
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"coopos {release}"
