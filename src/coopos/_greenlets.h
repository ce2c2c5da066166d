/* What a forked child does to its parent's greenlets. C alone: the interpreter has not repaired itself yet when this runs. */
#ifndef COOPOS_GREENLETS_H
#define COOPOS_GREENLETS_H

#include <Python.h>
#include <stdlib.h>

/* The object structure of greenlet's public header, as it has been since 2.0. */
struct coopos_greenlet {
    PyObject_HEAD
    PyObject *weakreflist;
    PyObject *dict;
    void *state;               /* everything else: the parked frames, the parent */
};

typedef int (*coopos_greenlet_is)(struct coopos_greenlet *);

/* The numbers that greenlet's public header gives these functions in the capsule greenlet._C_API. */
enum { COOPOS_GREENLET_IS_MAIN = 8, COOPOS_GREENLET_IS_STARTED = 9, COOPOS_GREENLET_IS_ACTIVE = 10 };

static inline coopos_greenlet_is coopos_greenlet_function(int number)
{
    void **functions = (void **)PyCapsule_Import("greenlet._C_API", 0);
    return functions == NULL ? NULL : (coopos_greenlet_is)functions[number];
}

struct coopos_finds {
    PyTypeObject *greenlet;
    PyTypeObject *watcher;     /* or NULL: the loop has a list of its own */
    PyTypeObject *loop;        /* or NULL: there is none */
    PyTypeObject *waiter;
    PyObject *main;            /* who waits by a waiter, or by its bound method, is looked for; or NULL */
    PyObject **objects;        /* owned */
    Py_ssize_t n;
    Py_ssize_t room;
    int is_short_of_memory;
};

/* Take *op* if it is a greenlet or may resume one. 1: go on. */
static int coopos_look_at(PyObject *op, void *arg)
{
    struct coopos_finds *finds = arg;
    /* Nearly everything is one of these. */
    unsigned long plain = Py_TPFLAGS_LIST_SUBCLASS | Py_TPFLAGS_TUPLE_SUBCLASS | Py_TPFLAGS_DICT_SUBCLASS | Py_TPFLAGS_TYPE_SUBCLASS;
    if (Py_TYPE(op)->tp_flags & plain || PyFunction_Check(op))
        return 1;
    if (!PyObject_TypeCheck(op, finds->greenlet)
            && !(finds->watcher != NULL && PyObject_TypeCheck(op, finds->watcher))
            && !(finds->loop != NULL && PyObject_TypeCheck(op, finds->loop))
            && !(finds->main != NULL && (PyObject_TypeCheck(op, finds->waiter)
                                         || (PyCFunction_Check(op) && PyCFunction_GET_SELF(op) == finds->main))))
        return 1;
    if (finds->n == finds->room) {
        size_t room = 2 * (size_t)finds->room + 64;
        PyObject **objects = realloc(finds->objects, room * sizeof *objects);
        if (objects == NULL) {
            finds->is_short_of_memory = 1;
            return 0;
        }
        finds->objects = objects;
        finds->room = (Py_ssize_t)room;
    }
    Py_INCREF(op);
    finds->objects[finds->n++] = op;
    return 1;
}

/* The garbage collector's lists, by which it finds its objects.
 *
 * To go along them by its own PyUnstable_GC_VisitObjects() counts a reference to each object and takes it back: in a forked child
 * that copies every page that has one, of a large parent a gigabyte. Reading copies nothing. The structures are those of CPython
 * 3.10 to 3.14; who calls has compared (coopos_knows_lists) what they lead to with what the collector itself tells.
 */
struct coopos_gc_link { uintptr_t next, prev; };                          /* before each object; flags in the low bits */
struct coopos_gc_generation { struct coopos_gc_link head; int threshold, count; };

static inline struct coopos_gc_link *coopos_gc_linked(uintptr_t link)
{
    return (struct coopos_gc_link *)(link & ~(uintptr_t)7);
}

static inline int coopos_is_gc_list(struct coopos_gc_link *head)
{
    return coopos_gc_linked(head->next) != NULL && coopos_gc_linked(head->prev) != NULL
        && coopos_gc_linked(coopos_gc_linked(head->next)->prev) == head
        && coopos_gc_linked(coopos_gc_linked(head->prev)->next) == head;
}

/* Call *look* with each object until it returns 0; the number of objects it was called with, or -1 if the lists aren't there. */
static Py_ssize_t coopos_walk(int (*look)(PyObject *, void *), void *arg)
{
    struct coopos_gc_generation *young;
    struct coopos_gc_link *heads[4];
    Py_ssize_t n = 0;
    int i;
    PyObject *newest = PyList_New(0);      /* the last of the young: its next is their head */
    if (newest == NULL) {
        PyErr_Clear();
        return -1;
    }
    young = (struct coopos_gc_generation *)coopos_gc_linked(((struct coopos_gc_link *)newest - 1)->next);
    Py_DECREF(newest);
    for (i = 0; i < 4; i++) {
        heads[i] = &young[i].head;
        if (i == 3 && *(void **)heads[i] == young)       /* up to 3.13 a pointer stands before the permanent ones */
            heads[i] = (struct coopos_gc_link *)((void **)heads[i] + 1);
        if (!coopos_is_gc_list(heads[i]))
            return -1;
    }
    for (i = 0; i < 4; i++) {
        struct coopos_gc_link *link = coopos_gc_linked(heads[i]->next);
        for (; link != heads[i]; link = coopos_gc_linked(link->next), n++)
            if (!look((PyObject *)(link + 1), arg))
                return n + 1;
    }
    return n;
}

static int coopos_go_on(PyObject *op, void *arg)
{
    (void)op; (void)arg;
    return 1;
}

/* Whether the lists lead to as many objects as the collector knows. */
static inline int coopos_knows_lists(Py_ssize_t known)
{
    Py_ssize_t n = coopos_walk(coopos_go_on, NULL);
    return n >= 0 && n >= known - 8 && n <= known + 8;
}

/* Look at every object that the garbage collector knows, greenlets among them. -1 with an exception set. */
static inline int coopos_find(struct coopos_finds *finds, int knows_lists)
{
    /* Up to Python 3.11 an allocation may start a collection, which frees greenlets. */
    int is_enabled = PyGC_Disable();
    Py_ssize_t n = knows_lists ? coopos_walk(coopos_look_at, finds) : -1;
    if (is_enabled)
        PyGC_Enable();
    if (n < 0) {
        Py_ssize_t i;
        PyObject *all = NULL;
        PyObject *gc = PyImport_ImportModule("gc");
        if (gc != NULL)
            all = PyObject_CallMethod(gc, "get_objects", NULL);
        Py_XDECREF(gc);
        if (all == NULL)
            return -1;
        for (i = 0; i < PyList_GET_SIZE(all) && coopos_look_at(PyList_GET_ITEM(all, i), finds); i++)
            ;
        Py_DECREF(all);
    }
    if (finds->is_short_of_memory) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

/* Nobody frees it, and the garbage collector doesn't go through it. */
static inline void coopos_keep_for_good(PyObject *op)
{
    Py_INCREF(op);
    PyObject_GC_UnTrack(op);
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

#endif
