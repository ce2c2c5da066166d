# Nothing. With it, Cython's coverage plugin looks for _core.c in the folder above.
