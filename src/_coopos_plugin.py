"""What gevent calls at the end of every ``monkey.patch_all()``, through an entry point of the installed package.

It stands beside the package, not in it: a program that doesn't use coopos imports this file and nothing else of ours.
"""

import os
import sys

#: The words that switch something off, as in gevent:
#: https://github.com/gevent/gevent/blob/26.9.0/src/gevent/_config.py (validate_bool)
OFF = ("0", "false", "off", "no")


def on_did_patch_all(event: object) -> None:
    """Tell coopos, if the program uses it or COOPOS_PATCH is on. A value that means nothing is for coopos to refuse."""
    if "coopos._patch" in sys.modules or os.environ.get("COOPOS_PATCH", "").strip().lower() not in ("", *OFF):
        from coopos import _patch

        _patch.on_did_patch_all()
