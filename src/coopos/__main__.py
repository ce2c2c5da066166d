"""``python -m coopos``: see :mod:`coopos._launch`, which gives this module's namespace to the program that it runs."""

if __name__ == "__main__":
    from coopos import _launch

    _launch.main()
