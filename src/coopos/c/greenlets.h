/* greenlet's C API, and how a forked child leaves its parent's greenlets behind: the parent finds them before the fork, and the
 * child makes them look finished. The child's part is C alone, because it runs inside fork(2), as a handler of pthread_atfork(3).
 */
#ifndef COOPOS_GREENLETS_H
#define COOPOS_GREENLETS_H

#include <Python.h>
#include <greenlet.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>

/* PyGreenlet_Import() as a function that returns -1 if it failed. */
static inline int coopos_import_greenlet(void)
{
    PyGreenlet_Import();
    return _PyGreenlet_API == NULL ? -1 : 0;
}

static inline PyObject *coopos_current_greenlet(void)
{
    return (PyObject *)PyGreenlet_GetCurrent();
}

static inline PyObject *coopos_switch(PyObject *greenlet, PyObject *args, PyObject *kwargs)
{
    return PyGreenlet_Switch((PyGreenlet *)greenlet, args, kwargs);
}

struct coopos_search {
    PyTypeObject *greenlet;
    PyTypeObject *watcher;     /* or NULL: the loop keeps a list of its watchers */
    PyTypeObject *loop;        /* or NULL: there is none */
    PyTypeObject *waiter;
    PyTypeObject *hub_type;
    PyObject *main;            /* the main greenlet, whose waiters and bound builtin methods are to be found too; or NULL */
    PyGreenlet *current;       /* the two that the child keeps; the hub may be NULL */
    PyGreenlet *hub;
    PyGreenlet *dead;          /* a greenlet that has ended: the others get its state */
    PyObject *objects;         /* a list of the objects found */
};

/* Add *op* to the list if it is a greenlet or may resume one. 1: visit more objects. */
static inline int coopos_visit_object(PyObject *op, void *arg)
{
    struct coopos_search *search = arg;
    /* Nearly every object is of one of these kinds. */
    unsigned long plain = Py_TPFLAGS_LIST_SUBCLASS | Py_TPFLAGS_TUPLE_SUBCLASS | Py_TPFLAGS_DICT_SUBCLASS | Py_TPFLAGS_TYPE_SUBCLASS;
    if (Py_TYPE(op)->tp_flags & plain || PyFunction_Check(op))
        return 1;
    if (!PyObject_TypeCheck(op, search->greenlet)
            && !(search->watcher != NULL && PyObject_TypeCheck(op, search->watcher))
            && !(search->loop != NULL && PyObject_TypeCheck(op, search->loop))
            && !(search->main != NULL && (PyObject_TypeCheck(op, search->waiter)
                                         || (PyCFunction_Check(op) && PyCFunction_GET_SELF(op) == search->main))))
        return 1;
    return PyList_Append(search->objects, op) == 0;
}

/* Visit every object that the garbage collector knows. -1 with an exception set.
 *
 * In the parent, since a visit changes the object's reference count. In a child that would copy the pages of all objects.
 */
static inline int coopos_run_search(struct coopos_search *search)
{
#if PY_VERSION_HEX >= 0x030C0000
    /* https://docs.python.org/3/c-api/gcsupport.html#c.PyUnstable_GC_VisitObjects */
    PyUnstable_GC_VisitObjects(coopos_visit_object, search);
#else
    Py_ssize_t i;
    PyObject *all = NULL;
    PyObject *gc = PyImport_ImportModule("gc");
    /* An allocation may start a collection here, which frees greenlets. */
    int is_enabled = PyGC_Disable();
    if (gc != NULL)
        all = PyObject_CallMethod(gc, "get_objects", NULL);
    Py_XDECREF(gc);
    if (all != NULL) {
        for (i = 0; i < PyList_GET_SIZE(all) && coopos_visit_object(PyList_GET_ITEM(all, i), search); i++)
            ;
        Py_DECREF(all);
    }
    if (is_enabled)
        PyGC_Enable();
#endif
    return PyErr_Occurred() ? -1 : 0;
}

/* Never free *op*, and hide it from the garbage collector. */
static inline void coopos_keep_forever(PyObject *op)
{
    Py_INCREF(op);
    PyObject_GC_UnTrack(op);
}

/* In the child: make the parent's greenlets look finished. From here on none of them can be resumed.
 *
 * Each gets the state of a greenlet that has ended. A switch to it, or a throw into it, goes to its parent, the hub. Its old state,
 * with its parked frames, is never freed. It is hidden from the garbage collector, which would count the references of the shared
 * state once for each greenlet.
 */
static inline void coopos_leave_greenlets(const struct coopos_search *search)
{
    Py_ssize_t i;
    coopos_keep_forever((PyObject *)search->dead);
    for (i = 0; i < PyList_GET_SIZE(search->objects); i++) {
        PyObject *found = PyList_GET_ITEM(search->objects, i);
        PyGreenlet *each = (PyGreenlet *)found;
        if (!PyObject_TypeCheck(found, search->greenlet) || each == search->current || each == search->hub)
            continue;
        if (PyGreenlet_ACTIVE(each)) {
            coopos_keep_forever((PyObject *)each);
            /* But not another thread's hub. gevent destroys the hubs of its threadpool by throw(), which into a dead greenlet would
             * raise in our hub: Hub.destroy() in https://github.com/gevent/gevent/blob/26.9.0/src/gevent/hub.py */
            if (!PyGreenlet_MAIN(each) && !PyObject_TypeCheck(found, search->hub_type))
                each->pimpl = search->dead->pimpl;
        } else if (!PyGreenlet_STARTED(each)) {
            Py_INCREF(each);       /* not hidden: if the child starts it, a later fork of the child has to find it */
        }
    }
}

/* Bind a builtin method of the main greenlet to *other* instead. */
static inline void coopos_bind_to(PyObject *method, PyObject *other)
{
    PyCFunctionObject *function = (PyCFunctionObject *)method;
    PyObject *before = function->m_self;
    Py_INCREF(other);
    function->m_self = other;
    Py_DECREF(before);
}

/* A fork of this thread: from prepare(), the last at-fork hook, until revive() in the child or the end of fork(2) in the parent.
 *
 * Per thread, since the interpreter waits for the import lock in between, and other threads may run and end meanwhile.
 * *is_prepared* is false if prepare() didn't run: without memory to copy the list of hooks the interpreter skips them, in
 * run_at_forkers() of https://github.com/python/cpython/blob/3.13/Modules/posixmodule.c
 */
struct coopos_pending {
    int is_prepared;
    int mode;                  /* KEEP, LEAVE or EXEC of _core */
    int is_blocking;           /* all signals are blocked; *signals* is the mask from before */
    sigset_t signals;
    PyObject *leaving;         /* a Leaving, owned, or NULL */
    const struct coopos_search *search;
};

static __thread struct coopos_pending coopos_pending;

static inline void coopos_unblock_signals(void)
{
    if (coopos_pending.is_blocking)
        pthread_sigmask(SIG_SETMASK, &coopos_pending.signals, NULL);
    coopos_pending.is_blocking = 0;
}

/* Inside fork(2), in the child. Before PyOS_AfterFork_Child(), which frees the thread states of other threads and their frames. */
static inline void coopos_atfork_child(void)
{
    if (coopos_pending.is_prepared && coopos_pending.search != NULL)
        coopos_leave_greenlets(coopos_pending.search);
}

/* Inside fork(2), in the parent, even if fork(2) fails. */
static inline void coopos_atfork_parent(void)
{
    coopos_pending.is_prepared = 0;
    coopos_unblock_signals();
}

static inline int coopos_add_fork_handlers(void)
{
    return pthread_atfork(NULL, coopos_atfork_parent, coopos_atfork_child);
}

#endif
