/* Moving bytes: one attempt in each of the ways that don't block, and the guard, which ends a call that blocks all the same.
 *
 * The guard uses a signal that no other code sends, and sends it to a single thread. The program's own signals are not touched. Our
 * handler stays installed, so that a late signal does no harm. The same signal interrupts workers that wait for a peer.
 *
 * The state here is static, so only one compiled module may include this file. All functions need the GIL, except where they run in
 * a worker.
 */
#ifndef COOPOS_MOVING_H
#define COOPOS_MOVING_H

#include "system.h"

/* ---- one attempt at moving bytes, in the ways that don't block ---- */

enum {
    COOPOS_REFUSED,            /* no call: ENOSYS, because the kernel doesn't know RWF_NOWAIT */
    COOPOS_NOWAIT,             /* RWF_NOWAIT, whatever the descriptor's flags: Linux 4.14 (read), 4.16 (write) */
    COOPOS_DONTWAIT,           /* MSG_DONTWAIT, for sockets */
    COOPOS_PLAIN,              /* a plain call, which blocks if the descriptor is in blocking mode */
    COOPOS_GUARDED,            /* poll(2), then a plain call under the guard: coopos_move_guarded() */
    COOPOS_GUARDED_UNPOLLED    /* the same without poll(2) */
};

struct coopos_move {
    int fd;
    int how;
    int writes;
    struct iovec *iov;
    int count;                 /* of iov */
    off_t offset;              /* -1: the file's own offset */
    int flags;                 /* those of preadv2(2) */
    int may_block;             /* a wait in the hub blocks, instead of raising BlockingSwitchOutError */
    int as_os;                 /* as the function of os: plain in the hub, EAGAIN in non-blocking mode */
    int would_block;           /* set where that EAGAIN is raised */
    int has_parked;            /* it was woken, and has moved nothing since */
    size_t max_bytes;          /* how much a guarded read may take; 0: as much as fits into the buffers */
};

static inline ssize_t coopos_move_plainly(const struct coopos_move *move)
{
    if (move->flags)
        return coopos_move_at(move->fd, move->writes, move->iov, move->count, move->offset, move->flags);
    if (move->offset < 0) {
        if (move->count == 1)
            return move->writes ? write(move->fd, move->iov->iov_base, move->iov->iov_len)
                                : read(move->fd, move->iov->iov_base, move->iov->iov_len);
        return move->writes ? writev(move->fd, move->iov, move->count) : readv(move->fd, move->iov, move->count);
    }
    if (move->count == 1)
        return move->writes ? pwrite(move->fd, move->iov->iov_base, move->iov->iov_len, move->offset)
                            : pread(move->fd, move->iov->iov_base, move->iov->iov_len, move->offset);
    return coopos_move_at(move->fd, move->writes, move->iov, move->count, move->offset, 0);
}

static inline ssize_t coopos_move(const struct coopos_move *move)
{
    struct msghdr message;
    if (move->how == COOPOS_REFUSED)
        return coopos_unsupported();
    if (move->how == COOPOS_NOWAIT)
        return coopos_move_at(move->fd, move->writes, move->iov, move->count, move->offset, move->flags | RWF_NOWAIT);
    if (move->how == COOPOS_DONTWAIT && move->offset < 0) {
        memset(&message, 0, sizeof message);
        message.msg_iov = move->iov;
        message.msg_iovlen = move->count;
        return move->writes ? sendmsg(move->fd, &message, MSG_DONTWAIT) : recvmsg(move->fd, &message, MSG_DONTWAIT);
    }
    return coopos_move_plainly(move);
}

/* Copy *size* bytes from the caller's buffers to our own memory (*to_ours*), or back. The kernel makes the copy: a buffer may be a
 * mapping of a file that was truncated, which then is EFAULT, and not SIGBUS. Returns how many bytes, or -1 with errno for none.
 */
static inline ssize_t coopos_copy_buffers(const struct iovec *buffers, int count, char *ours, size_t size, int to_ours)
{
    size_t done = 0, n;
    int i;
    ssize_t copied = coopos_copy_by_kernel(buffers, count, ours, size, to_ours);
    if (copied >= 0 || (errno != ENOSYS && errno != EPERM))
        return copied;
    for (i = 0; i < count && done < size; i++, done += n) {
        n = buffers[i].iov_len < size - done ? buffers[i].iov_len : size - done;
        if (to_ours)
            memcpy(ours + done, buffers[i].iov_base, n);
        else
            memcpy(buffers[i].iov_base, ours + done, n);
    }
    return (ssize_t)done;
}

/* Whether a read or write of this descriptor at this offset is allowed: 0, or -1 with errno. Moves no byte. */
static inline int coopos_may_move(int fd, int writes, off_t offset)
{
    struct coopos_move nothing = {fd, COOPOS_PLAIN, writes, NULL, 0, offset, 0, 0, 0, 0, 0};
    int rc;
    if (!COOPOS_HAVE_EMPTY_MOVES)
        return fcntl(fd, F_GETFL) < 0 ? -1 : 0;
    do
        rc = (int)coopos_move_plainly(&nothing);
    while (rc < 0 && errno == EINTR);
    return rc;
}

/* ---- the guard ---- */

/* How long a call may take before the guard interrupts it. 4 ms, because a timer that is due after the kernel's next tick needs no
 * programming of the hardware. Less for writes to a terminal: poll(2) often calls it ready when it has less room than we write, and
 * the hub stands still for that time.
 */
enum { COOPOS_GUARD_US = 4000, COOPOS_GUARD_TERMINAL_US = 200, COOPOS_GUARD_MAX_US = 1000000 };

struct coopos_guard {
    int signal;
    sigset_t before;
    pthread_t caller;
    pthread_t thread;
    int bell[2];
    int has_timer, has_thread;
};

/* There is one guard at most, because it holds the GIL. */
static volatile sig_atomic_t coopos_guard_us;   /* microseconds until its next signal; 0: there is no timer */
static coopos_timer coopos_guard_timer;

static inline int coopos_guard_later(int period)
{
    return period < COOPOS_GUARD_MAX_US / 2 ? 2 * period : COOPOS_GUARD_MAX_US;
}

/* Sets the timer again: this signal may have come before the call has begun. Each time it waits longer: under a debugger the
 * delivery of a signal may take longer than the interval, and the call would never begin.
 */
static inline void coopos_on_signal(int signal)
{
    int err = errno;
    (void)signal;
    if (coopos_guard_us) {
        coopos_guard_us = coopos_guard_later(coopos_guard_us);
        (void)coopos_timer_set(&coopos_guard_timer, coopos_guard_us);
    }
    errno = err;
}

/* Returns the number of our signal, with our handler installed, or 0 if no signal is free. First choice: SIGSTKFLT or SIGEMT, which
 * no kernel sends any more (signal(7)). If the program has a handler for it we use a real-time signal. Those are second choice:
 * they can't be sent when the user has too many pending (RLIMIT_SIGPENDING, getrlimit(2)).
 */
static inline int coopos_signal_take(void)
{
    static int number;
    struct sigaction now, ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_handler = coopos_on_signal;
    ours.sa_flags = SA_ONSTACK;        /* no SA_RESTART: the system call has to end */
    sigemptyset(&ours.sa_mask);
    if (number == 0)
#if defined(SIGSTKFLT)
        number = SIGSTKFLT;
#elif defined(SIGEMT)
        number = SIGEMT;
#else
        number = SIGURG;
#endif
    for (;;) {
        if (sigaction(number, NULL, &now) == 0) {
            if (now.sa_handler == coopos_on_signal)
                return number;
            if ((now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN) && sigaction(number, &ours, NULL) == 0)
                return number;
        }
#if defined(SIGRTMAX)
        number = number < SIGRTMIN ? SIGRTMAX : number - 1;
        if (number >= SIGRTMIN)
            continue;
#endif
        number = 0;
        return 0;
    }
}

/* Unblock our signal in the calling thread. *before* gets the thread's old mask. 0, or an errno: nothing has changed. */
static inline int coopos_signal_admit(int number, sigset_t *before)
{
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, number);
    return pthread_sigmask(SIG_UNBLOCK, &ours, before);
}

static inline void *coopos_guard_run(void *arg)
{
    struct coopos_guard *guard = arg;
    struct pollfd bell;
    int period_us = 1000;
    bell.fd = guard->bell[0];
    bell.events = POLLIN;
    while (poll(&bell, 1, period_us / 1000) <= 0) {    /* -1: EINTR */
        (void)pthread_kill(guard->caller, guard->signal);
        period_us = coopos_guard_later(period_us);
    }
    return NULL;
}

static inline int coopos_guard_start_timer(const struct coopos_guard *guard, int period_us)
{
    if (coopos_timer_new(&coopos_guard_timer, guard->signal) < 0)
        return 0;
    coopos_guard_us = period_us;
    if (coopos_timer_set(&coopos_guard_timer, period_us) == 0)
        return 1;
    coopos_guard_us = 0;
    coopos_timer_delete(&coopos_guard_timer);
    return 0;
}

/* Start a guard: a timer, or a thread if no timer is available. -1: there is neither. */
static inline int coopos_guard_begin(struct coopos_guard *guard, int period_us)
{
    guard->signal = coopos_signal_take();
    if (guard->signal == 0 || coopos_signal_admit(guard->signal, &guard->before) != 0)
        return -1;
    guard->has_thread = 0;
    guard->has_timer = coopos_guard_start_timer(guard, period_us);
    /* Send one to ourselves first: a real-time signal fails if too many are pending. */
    if (!guard->has_timer && pthread_kill(pthread_self(), guard->signal) == 0 && coopos_bell_new(guard->bell) == 0) {
        guard->caller = pthread_self();
        guard->has_thread = coopos_thread_start(&guard->thread, coopos_guard_run, guard) == 0;
        if (!guard->has_thread)
            coopos_bell_close(guard->bell);
    }
    if (guard->has_timer || guard->has_thread)
        return 0;
    (void)pthread_sigmask(SIG_SETMASK, &guard->before, NULL);
    return -1;
}

static inline void coopos_guard_end(struct coopos_guard *guard)
{
    coopos_guard_us = 0;
    if (guard->has_timer)
        coopos_timer_delete(&coopos_guard_timer);
    if (guard->has_thread) {
        (void)coopos_bell_ring(guard->bell);
        (void)pthread_join(guard->thread, NULL);
        coopos_bell_close(guard->bell);
    }
    /* The last signal has been delivered by now, at the return of one of the calls above. */
    (void)pthread_sigmask(SIG_SETMASK, &guard->before, NULL);
}

/* One plain call under a guard. It may block though poll(2) calls the descriptor ready: another reader or writer was faster, or a
 * terminal has less room than we write. Then the guard ends it: with EINTR if it has moved nothing, else with the number of bytes.
 * It writes at most PIPE_BUF bytes, which a ready pipe takes at once (pipe(7)). ENOSYS: no guard is available; nothing was moved.
 */
#if defined(__GNUC__)
__attribute__((noinline, cold, unused))    /* inlined, its large frame would be part of every caller's */
#endif
static ssize_t coopos_move_guarded(const struct coopos_move *move)
{
    struct coopos_move part = *move;
    struct coopos_guard guard;
    struct pollfd ready;
    size_t left = move->writes ? PIPE_BUF : move->max_bytes ? move->max_bytes : SIZE_MAX, cut = 0;
    struct iovec *last;
    ssize_t moved = -1;
    int err, is_ready = 1;
    for (part.count = 0; part.count < move->count && left; part.count++) {
        last = &part.iov[part.count];
        if (last->iov_len > left) {
            cut = last->iov_len - left;
            last->iov_len = left;
        }
        left -= last->iov_len;
    }
    ready.fd = move->fd;
    ready.events = move->writes ? POLLOUT : POLLIN;
    if (move->how != COOPOS_GUARDED_UNPOLLED)
        while ((is_ready = poll(&ready, 1, 0)) < 0 && errno == EINTR)
            ;
    err = is_ready ? errno : EAGAIN;
    if (is_ready > 0) {
        if (coopos_guard_begin(&guard, move->writes && isatty(move->fd) ? COOPOS_GUARD_TERMINAL_US : COOPOS_GUARD_US) == 0) {
            moved = coopos_move_plainly(&part);
            err = errno;
            coopos_guard_end(&guard);
        }
        else
            err = ENOSYS;
    }
    if (cut)
        part.iov[part.count - 1].iov_len += cut;
    errno = err;
    return moved;
}

#endif
