"""The compiled heart of coopos."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject, PyObject_TypeCheck, PyTypeObject
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from cpython.sequence cimport PySequence_Check
from cpython.version cimport PY_VERSION_HEX
from libc.errno cimport (
    E2BIG, EAGAIN, EBADF, ECHILD, EINTR, EINVAL, ENOSYS, ENXIO, EOPNOTSUPP, EPERM, ESRCH, errno)
from libc.limits cimport INT_MAX
from libc.signal cimport SIGCHLD, SIG_IGN
from libc.stdio cimport SEEK_CUR, SEEK_END, SEEK_SET
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset, strerror
from posix.fcntl cimport AT_FDCWD, F_GETFD, F_GETFL, F_SETFL, F_WRLCK, O_APPEND, O_NONBLOCK, O_RDWR, fcntl, openat
from posix.signal cimport kill, sigaction, sigaction_t, sigaddset, sigemptyset, sigset_t
from posix.types cimport id_t, mode_t, off_t
from posix.unistd cimport close as c_close, fork as c_fork, getpgid, getpgrp, getuid, isatty, lseek

from coopos._posix cimport *

import atexit
import gc
import os
import posix
import signal
import sys
from contextvars import ContextVar
from resource import struct_rusage

import greenlet as _greenlet_module
from gevent import Greenlet, GreenletExit, Timeout, sleep
from gevent._config import config
from gevent._hub_local import get_hub_class, get_loop, set_hub, set_loop
from gevent.event import Event as _Event
from gevent.exceptions import BlockingSwitchOutError, InvalidSwitchError
from gevent.hub import (
    Hub, MAIN_THREAD_IDENT as _MAIN_THREAD_IDENT, Waiter, _get_hub as get_hub_if_exists, _get_hub_noargs as get_hub, reinit)
from gevent.lock import Semaphore as _Turns
from gevent.monkey import get_original
from greenlet import getcurrent, greenlet

include "_core/basics.pxi"
include "_core/hub.pxi"
include "_core/registry.pxi"
include "_core/sets.pxi"
include "_core/closing.pxi"
include "_core/workers.pxi"
include "_core/calls.pxi"
include "_core/moving.pxi"
include "_core/files.pxi"
include "_core/owned.pxi"
include "_core/semaphores.pxi"
include "_core/questions.pxi"
include "_core/exits.pxi"
include "_core/children.pxi"
include "_core/waits.pxi"
include "_core/greenlets.pxi"
include "_core/forking.pxi"
