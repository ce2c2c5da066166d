/* libev's own interest in SIGCHLD, and that of a program's signal watchers.
 *
 * The default loop has a signal watcher of libev's for SIGCHLD, childev, whose callback collects every child of the process. We
 * never want that, but childev also keeps the program's own watchers for SIGCHLD deaf: libev installs its handler with the first
 * watcher of a signal, and gevent takes the handler back (gevent_ev_default_loop). Two things follow. A watcher of ours that stays in
 * the list keeps a later default loop from installing the handler. And the program's watchers are found in that list, by a watcher
 * of ours that is started and stopped, and fed with the event.
 *
 * Known of libev: its functions, which gevent's module or the system's library exports, and struct ev_signal of its <ev.h>. Whether
 * that has EV_COMMON's member is the build's choice, gevent's own has not. A watcher of ours that is right in both forms shows which:
 * libev writes its `next`. If a function is missing, or nothing is written, nothing of this is done.
 * https://github.com/gevent/gevent/blob/26.9.0/deps/libev/ev.h https://github.com/gevent/gevent/blob/26.9.0/_setuplibev.py
 */
#ifndef COOPOS_LIBEV_H
#define COOPOS_LIBEV_H

#include <dlfcn.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>

typedef void coopos_ev_callback(void *loop, void *watcher, int revents);

union coopos_ev_signal {
    struct {
        int active, pending, priority;
        coopos_ev_callback *cb;
        void *next;
        int signum;
    } bare;                /* EV_COMMON is empty */
    struct {
        int active, pending, priority;
        void *data;
        coopos_ev_callback *cb;
        void *next;
        int signum;
    } common;
};

enum { COOPOS_EV_SIGNAL = 0x400 };

static struct {
    void (*signal_start)(void *loop, void *watcher);
    void (*signal_stop)(void *loop, void *watcher);
    void (*feed_event)(void *loop, void *watcher, int revents);
    void (*unref)(void *loop);
    size_t next;                           /* its offset in an ev_signal */
    union coopos_ev_signal ours;           /* stays in the list for good */
    const void *childev;                   /* NULL: libev isn't known */
} coopos_ev;

static void coopos_libev_ignore(void *loop, void *watcher, int revents)
{
    (void)loop; (void)watcher; (void)revents;
}

static void coopos_libev_init(union coopos_ev_signal *watcher)
{
    memset(watcher, 0, sizeof *watcher);
    watcher->common.cb = coopos_libev_ignore;
    watcher->common.signum = SIGCHLD;
    watcher->bare.cb = coopos_libev_ignore;
    watcher->bare.signum = SIGCHLD;        /* where the other form has `next`, which libev writes */
}

static void *coopos_libev_next(const void *watcher)
{
    void *next;
    memcpy(&next, (const char *)watcher + coopos_ev.next, sizeof next);
    return next;
}

/* In the default loop's thread. Once for all loops: libev's list is the process's. */
static void coopos_libev_begin(const char *path, void *loop)
{
    void *library, *each;
    union coopos_ev_signal before;
    Dl_info library_of, its;
    if (coopos_ev.ours.bare.active)
        return;
    library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (library == NULL)
        return;
    *(void **)&coopos_ev.signal_start = dlsym(library, "ev_signal_start");
    *(void **)&coopos_ev.signal_stop = dlsym(library, "ev_signal_stop");
    *(void **)&coopos_ev.feed_event = dlsym(library, "ev_feed_event");
    *(void **)&coopos_ev.unref = dlsym(library, "ev_unref");
    if (!coopos_ev.signal_start || !coopos_ev.signal_stop || !coopos_ev.feed_event || !coopos_ev.unref)
        return;
    coopos_libev_init(&coopos_ev.ours);
    before = coopos_ev.ours;
    coopos_ev.signal_start(loop, &coopos_ev.ours);
    coopos_ev.unref(loop);
    if (memcmp(&coopos_ev.ours.bare.next, &before.bare.next, sizeof before.bare.next) != 0)
        coopos_ev.next = offsetof(union coopos_ev_signal, bare.next);
    else if (memcmp(&coopos_ev.ours.common.next, &before.common.next, sizeof before.common.next) != 0)
        coopos_ev.next = offsetof(union coopos_ev_signal, common.next);
    else
        return;
    /* childev is the library's own; all others are somebody's objects. */
    if (dladdr(*(void **)&coopos_ev.signal_start, &library_of))
        for (each = coopos_libev_next(&coopos_ev.ours); each && !coopos_ev.childev; each = coopos_libev_next(each))
            if (dladdr(each, &its) && its.dli_fbase == library_of.dli_fbase)
                coopos_ev.childev = each;
}

/* In the default loop's thread: feed the program's watchers for SIGCHLD. Ours leaves the list as it was; it is never empty, so that
 * no handler is installed or taken away.
 */
static void coopos_libev_tell(void *loop)
{
    union coopos_ev_signal probe;
    void *each;
    if (coopos_ev.childev == NULL)
        return;
    coopos_libev_init(&probe);
    coopos_ev.signal_start(loop, &probe);
    for (each = coopos_libev_next(&probe); each; each = coopos_libev_next(each))
        if (each != coopos_ev.childev && each != &coopos_ev.ours)
            coopos_ev.feed_event(loop, each, COOPOS_EV_SIGNAL);
    coopos_ev.signal_stop(loop, &probe);
}

#endif
