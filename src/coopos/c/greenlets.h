/* greenlet's C API; and the parent's greenlets, which are found in the parent and left behind in the child.
 *
 * What is done in the child is C alone, because it runs inside fork(2).
 */
#ifndef COOPOS_GREENLETS_H
#define COOPOS_GREENLETS_H

#include <Python.h>
#include <greenlet.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>

/* PyGreenlet_Import() as a function that says how it went. */
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
    PyTypeObject *watcher;     /* or NULL: the loop has a list of its own */
    PyTypeObject *loop;        /* or NULL: there is none */
    PyTypeObject *waiter;
    PyTypeObject *hub_type;
    PyObject *main;            /* who waits by a waiter, or by its bound method, is looked for; or NULL */
    PyGreenlet *current;       /* the two that go on in the child; the hub may be NULL */
    PyGreenlet *hub;
    PyGreenlet *dead;          /* has ended: the others take its state */
    PyObject *objects;         /* a list of what was found */
};

/* Take *op* if it is a greenlet or may resume one. 1: go on. */
static inline int coopos_visit_object(PyObject *op, void *arg)
{
    struct coopos_search *search = arg;
    /* Nearly everything is one of these. */
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

/* Look at every object that the garbage collector knows. -1 with an exception set.
 *
 * In the parent: to visit an object counts a reference to it, and in a child that would copy every page that has one.
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

/* Nobody frees it, and the garbage collector doesn't go through it. */
static inline void coopos_keep_forever(PyObject *op)
{
    Py_INCREF(op);
    PyObject_GC_UnTrack(op);
}

/* In the child: from here on no greenlet of the parent can be resumed.
 *
 * Each takes the state of one that has ended: it looks finished, and to switch to it or to throw into it leads to the hub. What it
 * had, its parked frames above all, belongs to nobody and is never freed. The garbage collector must not count what the shared
 * state refers to several times.
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
            /* Another thread's hub is not made to look finished: gevent destroys those of its pool's threads, by throwing into them,
             * and what is thrown into a dead greenlet comes out in our hub. */
            if (!PyGreenlet_MAIN(each) && !PyObject_TypeCheck(found, search->hub_type))
                each->pimpl = search->dead->pimpl;
        } else if (!PyGreenlet_STARTED(each)) {
            Py_INCREF(each);       /* known to the collector: whoever starts it here has it left behind in a fork */
        }
    }
}

/* A builtin method of the main greenlet becomes that of *other*. */
static inline void coopos_bind_to(PyObject *method, PyObject *other)
{
    PyCFunctionObject *function = (PyCFunctionObject *)method;
    PyObject *before = function->m_self;
    Py_INCREF(other);
    function->m_self = other;
    Py_DECREF(before);
}

/* A fork of this thread, from the last of the hooks before it until the child is revived, or fork(2) is over in the parent. Other
 * threads may run, and end, while it waits for the import lock. The hooks themselves may be skipped: without memory the interpreter
 * can't copy their list.
 */
struct coopos_pending {
    int is_prepared;
    int mode;
    int is_blocking;           /* signals; *signals* is the mask to go back to */
    sigset_t signals;
    PyObject *leaving;         /* owned, or NULL */
    const struct coopos_search *search;
};

static __thread struct coopos_pending coopos_pending;

static inline void coopos_unblock_signals(void)
{
    if (coopos_pending.is_blocking)
        pthread_sigmask(SIG_SETMASK, &coopos_pending.signals, NULL);
    coopos_pending.is_blocking = 0;
}

/* Inside fork(2), in the child. The interpreter's own repairs, which come next, free what other threads had. */
static inline void coopos_atfork_child(void)
{
    if (coopos_pending.is_prepared && coopos_pending.search != NULL)
        coopos_leave_greenlets(coopos_pending.search);
}

/* Inside fork(2), in the parent, also if it has failed. */
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
