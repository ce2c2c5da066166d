"""The compiled core of coopos: reads and writes, close, the bookkeeping of children, the wait family, fork.

This page is the table of contents. The chapters are in _core/, from the bottom up: a chapter names nothing that a later one defines
(tests/source/test_chapters.py checks that). All of them share one namespace, and the imports on this page.

    basics      errors, arguments, tables by descriptor
    hub         giving way to gevent's hub and coming back; what is thrown into a greenlet; other threads' loops
    registry    calls in flight, and closes that wait for them
    sets        one epoll set per loop, with every descriptor that the loop's greenlets wait for
    waiting     park: how a greenlet waits for a descriptor
    closing     close, closerange
    workers     C threads, for calls that block whatever we do
    calls       those calls: fsync, open, locks, sendfile
    ladder      one attempt to move bytes, and the next step if it moved none
    moving      whole reads and writes, and those that a worker makes
    files       nb_read, nb_write, read, write and their kin
    collected   what is read until the end of a file
    owned       the descriptor of a FileIO
    patched     what stands in os, and for open() and input(), under patch(io=True)
    semaphores  multiprocessing's locks
    questions   asking the kernel about children
    exits       how a loop learns that a child has ended
    children    the records of children
    waits       waitpid and its kin
    greenlets   leaving the parent's greenlets behind in a forked child
    forking     fork, forkpty, and the hooks of every fork
    reports     what coopos.report() and coopos.counters() tell

How a read runs: files makes a Move; ladder attempts it, one rung after the other; if there is nothing to read, waiting parks the
greenlet and the hub runs the others; when the descriptor is ready, ladder attempts it again. If the kernel can't tell whether the
read would block, moving has a worker make it.

How a wait runs: waits asks the kernel; if the child still runs, children parks the greenlet at the child's record; exits gets an
event when the child ends, from a pidfd in the loop's set; the greenlet asks the kernel again and takes the status.

These rules hold everywhere:

1. The kernel keeps the books. We don't store state that we can ask the kernel for.
2. A call owns its descriptor's number from its first system call to its return.
3. An event is a hint. A greenlet that is woken asks the kernel again.
4. EINTR is never an answer. The signal handlers run, and we make the call again (is_interrupted in basics; a worker's loop is in
   c/workers.h).
5. Killing a greenlet loses nothing: no byte, no status, no descriptor, no lock (a worker's call: give_up in workers).
6. In a forked child, objects from before the fork belong to the parent: their `born` is less than `generation`
   (remake_sets_in_child in sets).
7. The differences between operating systems are in c/system.h. Code branches on its names, never on a platform's.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.contextvars cimport PyContextVar_New
from cpython.object cimport PyObject, PyObject_TypeCheck, PyTypeObject
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.sequence cimport PySequence_Check
from cpython.version cimport PY_VERSION_HEX
from libc.errno cimport (
    E2BIG, EACCES, EAGAIN, EBADF, ECHILD, EINTR, EINVAL, ENOSYS, ENXIO, EOPNOTSUPP, EPERM, ESRCH, errno)
from libc.limits cimport INT_MAX
from libc.signal cimport SIGCHLD, SIG_IGN
from libc.stdio cimport SEEK_CUR, SEEK_END
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset, strerror
from posix.fcntl cimport (
    AT_FDCWD, F_GETFD, F_GETFL, F_RDLCK, F_SETFL, F_UNLCK, F_WRLCK, O_ACCMODE, O_APPEND, O_CLOEXEC, O_NONBLOCK, O_RDWR, fcntl,
    open as c_open, openat)
from posix.signal cimport kill, sigaction, sigaction_t, sigaddset, sigemptyset, sigset_t
from posix.types cimport id_t, mode_t, off_t
from posix.unistd cimport _exit as c_exit, close as c_close, fork as c_fork, getpgid, getpgrp, getuid, isatty, lseek

from coopos._posix cimport *

import atexit
import gc
import os
import posix
import signal
import sys
from _weakref import ref as weak_reference

import greenlet as _greenlet_module
from gevent import Greenlet, GreenletExit, Timeout, sleep
from gevent._config import config
from gevent._hub_local import get_hub_class, get_loop, set_hub, set_loop
from gevent.event import Event as _Event
from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.hub import (
    Hub, MAIN_THREAD_IDENT as _MAIN_THREAD_IDENT, Waiter, _get_hub as get_hub_if_exists, _get_hub_noargs as get_hub, reinit)
from greenlet import getcurrent, greenlet

from coopos import _settings
from coopos._originals import get_original


# What only some programs need is imported when they do.

cdef object new_turns():
    from gevent.lock import Semaphore
    return Semaphore(1)


cdef object struct_rusage():
    from resource import struct_rusage as kind
    return kind


include "_core/basics.pxi"
include "_core/hub.pxi"
include "_core/registry.pxi"
include "_core/sets.pxi"
include "_core/waiting.pxi"
include "_core/closing.pxi"
include "_core/workers.pxi"
include "_core/calls.pxi"
include "_core/ladder.pxi"
include "_core/moving.pxi"
include "_core/files.pxi"
include "_core/collected.pxi"
include "_core/owned.pxi"
include "_core/patched.pxi"
include "_core/semaphores.pxi"
include "_core/questions.pxi"
include "_core/exits.pxi"
include "_core/children.pxi"
include "_core/waits.pxi"
include "_core/greenlets.pxi"
include "_core/forking.pxi"
include "_core/reports.pxi"
