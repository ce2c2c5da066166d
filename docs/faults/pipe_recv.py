"""multiprocessing's Pipe in a program that gevent has patched: one greenlet receives what another one sends."""

import sys

from gevent import monkey

monkey.patch_all()
if sys.argv[1] == "coopos":
    import coopos

    coopos.patch()
import multiprocessing

import gevent

ours, theirs = multiprocessing.Pipe()
gevent.spawn(theirs.send, "hello")
try:
    print("received", ours.recv())
except OSError as ex:
    print(repr(ex))
