"""What a module of the standard library had before `gevent.monkey` patched it.

gevent.monkey is not imported for that: it brings logging, threading and five modules of its own, an eighth of the time that
``import coopos`` takes. Where nobody has imported it, nothing is patched.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def _monkey() -> Any:
    return sys.modules.get("gevent.monkey")


def get_original(module: str, names: str | list[str]) -> Any:
    """``gevent.monkey.get_original``: one object, or a list of them for a list of names."""
    monkey = _monkey()
    if monkey is not None:
        return monkey.get_original(module, names)
    found = import_module(module)
    return getattr(found, names) if isinstance(names, str) else [getattr(found, name) for name in names]


def is_module_patched(module: str) -> bool:
    """``gevent.monkey.is_module_patched``."""
    monkey = _monkey()
    return monkey is not None and monkey.is_module_patched(module)
