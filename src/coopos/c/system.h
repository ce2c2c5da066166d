/* What differs between operating systems: ints, and functions that fail with ENOSYS where the system has no such call.
 *
 * Other code branches on the HAVE_ ints and on errno, never on a platform's name. New Linux calls go through syscall(2): old glibc
 * and musl have no functions for them.
 */
#ifndef COOPOS_SYSTEM_H
#define COOPOS_SYSTEM_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#  include <sys/epoll.h>
#  include <sys/eventfd.h>
#  include <sys/sendfile.h>
#  include <sys/syscall.h>
#  include <sys/vfs.h>
#  include <utmp.h>
#elif defined(__APPLE__) || defined(__NetBSD__) || defined(__OpenBSD__)
#  include <util.h>
#else
#  include <libutil.h>
#endif

#if defined(__linux__)
enum { HAVE_PIDFD = 1 };
#else
enum { HAVE_PIDFD = 0 };
#endif

/* For C libraries older than the calls. Most architectures share the numbers; alpha and mips have others:
 * https://github.com/torvalds/linux/blob/master/include/uapi/asm-generic/unistd.h */
#if defined(__linux__) && !defined(SYS_pidfd_open)
#  define SYS_pidfd_open 434
#endif
#if defined(__linux__) && !defined(SYS_pidfd_send_signal)
#  define SYS_pidfd_send_signal 424
#endif
#if defined(__linux__) && !defined(SYS_close_range)
#  define SYS_close_range 436
#endif

#ifndef RWF_NOWAIT
#  define RWF_NOWAIT 0x00000008
#endif

/* The option bits that wait4(2) accepts; any other is EINVAL. In hex: __WNOTHREAD, __WALL, __WCLONE. */
#if defined(__linux__)
#  define COOPOS_WAIT_OPTIONS ((int)(WNOHANG | WUNTRACED | WCONTINUED | 0x20000000u | 0x40000000u | 0x80000000u))
#else
#  define COOPOS_WAIT_OPTIONS (WNOHANG | WUNTRACED | WCONTINUED)
#endif
/* Those that waitid(2) accepts: WSTOPPED instead of WUNTRACED, and two more. */
#define COOPOS_WAITID_OPTIONS ((COOPOS_WAIT_OPTIONS & ~WUNTRACED) | WSTOPPED | WEXITED | WNOWAIT)

/* __WNOTHREAD leaves out the children of other threads; __WCLONE those that end with SIGCHLD, the ordinary ones. */
#if defined(__linux__)
#  define COOPOS_WNOTHREAD 0x20000000
#  define COOPOS_WCLONE ((int)0x80000000u)
#else
#  define COOPOS_WNOTHREAD 0
#  define COOPOS_WCLONE 0
#endif

/* Whether *options* ask for no ordinary child, only for those that clone(2) made without SIGCHLD. */
static inline int coopos_wants_clones(int options)
{
#if defined(__linux__)
    return ((unsigned)options & 0xc0000000u) == 0x80000000u;   /* __WCLONE without __WALL */
#else
    (void)options;
    return 0;
#endif
}

/* The idtype of a pidfd in waitid(2); without pidfds, one that waitid refuses. */
#if defined(__linux__)
#  define COOPOS_P_PIDFD ((idtype_t)3)
#else
#  define COOPOS_P_PIDFD ((idtype_t)-1)
#endif

/* The most bytes that we give to one read(2) or write(2). macOS refuses more than INT_MAX:
 * https://github.com/apple-oss-distributions/xnu/blob/main/bsd/kern/sys_generic.c */
#if defined(__APPLE__)
#  define COOPOS_IO_MAX ((size_t)INT_MAX)
#else
#  define COOPOS_IO_MAX ((size_t)SSIZE_MAX)
#endif

static inline int coopos_unsupported(void)
{
    errno = ENOSYS;
    return -1;
}

/* ---- waiting for children ---- */

/* The answer of waitid(2) about a child. */
struct coopos_report {
    pid_t pid;             /* 0: no child has changed its state */
    uid_t uid;             /* the child's real user */
    int code;              /* si_code: CLD_EXITED, CLD_KILLED, CLD_DUMPED, CLD_STOPPED, CLD_TRAPPED, CLD_CONTINUED */
    int status;            /* the raw wait status, as from wait(2) */
    struct rusage usage;
};

/* waitid(2) without blocking, and with the resource usage. 0, also if no child has changed its state, or -1 with errno. */
static inline int coopos_wait(idtype_t idtype, id_t id, int options, struct coopos_report *report)
{
    siginfo_t info;
    memset(report, 0, sizeof *report);
    memset(&info, 0, sizeof info);
#if defined(__linux__)
    if (syscall(SYS_waitid, idtype, id, &info, options | WNOHANG, &report->usage) < 0)
        return -1;
    report->status = info.si_status;
#else
    /* The portable waitid gives no usage. It only finds the child here; wait4 collects it. */
    for (;;) {
        if (waitid(idtype, id, &info, options | WNOHANG | WNOWAIT) < 0)
            return -1;
        report->status = info.si_status;
        if (info.si_pid == 0 || (options & WNOWAIT))
            break;
        if (info.si_code == CLD_EXITED || info.si_code == CLD_KILLED || info.si_code == CLD_DUMPED) {
            pid_t pid = wait4(info.si_pid, &report->status, WNOHANG, &report->usage);
            if (pid < 0 && errno != ECHILD)
                return -1;
            if (pid <= 0)
                continue;      /* another thread has collected it */
            report->pid = pid;
            report->uid = info.si_uid;
            report->code = info.si_code;
            return 0;
        }
        if (waitid(P_PID, (id_t)info.si_pid, &info, (options & (WSTOPPED | WCONTINUED)) | WNOHANG) < 0 && errno != ECHILD)
            return -1;
        if (info.si_pid != 0)
            break;
    }
#endif
    report->pid = info.si_pid;
    report->uid = info.si_uid;
    report->code = info.si_code;
    switch (report->pid ? report->code : CLD_EXITED) {
    case CLD_EXITED:
        report->status = (report->status & 0xff) << 8;
        break;
    case CLD_KILLED:
        report->status &= 0x7f;
        break;
    case CLD_DUMPED:
        report->status = (report->status & 0x7f) | 0x80;
        break;
    case CLD_CONTINUED:
        report->status = 0xffff;
        break;
    default:                   /* CLD_STOPPED, CLD_TRAPPED; a trap's status also has ptrace(2)'s event */
        report->status = report->status << 8 | 0x7f;
    }
    return 0;
}

/* ---- pidfds: Linux 5.3 (pidfd_open(2)), 5.4 (waitid(2) with P_PIDFD) ---- */

static inline int coopos_pidfd_open(pid_t pid)
{
#if defined(__linux__)
    return (int)syscall(SYS_pidfd_open, pid, 0);   /* always close-on-exec */
#else
    (void)pid;
    return coopos_unsupported();
#endif
}

/* kill(2) by pidfd: it can't hit another process that has got the same pid. */
static inline int coopos_pidfd_signal(int pidfd, int signum)
{
#if defined(__linux__)
    return (int)syscall(SYS_pidfd_send_signal, pidfd, signum, NULL, 0);
#else
    (void)pidfd;
    (void)signum;
    return coopos_unsupported();
#endif
}

/* The first version of the kernel's struct pidfd_info (Linux 6.13; exit_code since 6.15):
 * https://github.com/torvalds/linux/blob/master/include/uapi/linux/pidfd.h */
struct coopos_pidfd_info {
    uint64_t mask;         /* in: the fields we want; out: the fields that are filled */
    uint64_t cgroupid;
    uint32_t pid, tgid, ppid;
    uint32_t ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    int32_t exit_code;     /* the raw wait status */
};

/* The pid of a pidfd's process; -1 if the kernel doesn't tell it. */
static inline pid_t coopos_pidfd_pid(int pidfd)
{
#if defined(__linux__)
    struct coopos_pidfd_info info;
    memset(&info, 0, sizeof info);
    info.mask = 1u << 0;   /* PIDFD_INFO_PID */
    if (ioctl(pidfd, _IOWR(0xFF, 11, struct coopos_pidfd_info), &info) == 0)
        return (pid_t)info.pid;
    return -1;
#else
    (void)pidfd;
    return (pid_t)coopos_unsupported();
#endif
}

/* Get the status of a child that other code has reaped. 0, or -1 if the kernel doesn't tell it. *report* keeps its usage and user:
 * the kernel never tells those.
 */
static inline int coopos_pidfd_reaped(int pidfd, struct coopos_report *report)
{
#if defined(__linux__)
    const uint64_t info_exit = 1u << 3;   /* PIDFD_INFO_EXIT */
    struct coopos_pidfd_info info;
    struct pollfd reaped = {pidfd, 0, 0};
    int attempt;
    for (attempt = 0; attempt < 2; attempt++) {
        memset(&info, 0, sizeof info);
        info.mask = info_exit;
        errno = 0;
        if (ioctl(pidfd, _IOWR(0xFF, 11, struct coopos_pidfd_info), &info) == 0 && (info.mask & info_exit)) {
            report->status = info.exit_code;
            report->code = WIFEXITED(info.exit_code) ? CLD_EXITED : info.exit_code & 0x80 ? CLD_DUMPED : CLD_KILLED;
            return 0;
        }
        if (errno == ENOTTY || errno == EINVAL)
            break;
        /* When another thread reaps the child there is a moment with neither a zombie nor an exit record. POLLHUP ends it:
         * pidfd_poll in https://github.com/torvalds/linux/blob/master/fs/pidfs.c */
        if (attempt == 0)
            while (poll(&reaped, 1, 50) < 0 && errno == EINTR)
                ;
    }
    errno = ECHILD;
    return -1;
#else
    (void)pidfd; (void)report;
    return coopos_unsupported();
#endif
}

/* The inode of a pidfd. All pidfds of a process have the same one, and no other process has it. 0 before Linux 6.9, where all
 * pidfds share one inode.
 */
static inline ino_t coopos_pidfd_inode(int pidfd)
{
#if defined(__linux__)
    static dev_t pidfs;        /* 0 until it is known */
    struct stat st;
    struct statfs fs;
    if (fstat(pidfd, &st) < 0)
        return 0;
    if (st.st_dev == pidfs)
        return st.st_ino;
    if (fstatfs(pidfd, &fs) == 0 && fs.f_type == 0x50494446) {     /* PID_FS_MAGIC */
        pidfs = st.st_dev;
        return st.st_ino;
    }
#else
    (void)pidfd;
#endif
    return 0;
}

/* ---- a set of descriptors behind one: epoll(7) ---- */

#if defined(__linux__)
enum { COOPOS_HAVE_EPOLL = 1 };
#else
enum { COOPOS_HAVE_EPOLL = 0 };
#endif

enum { COOPOS_READ = 1, COOPOS_WRITE = 2, COOPOS_SET_BATCH = 256 };

/* One event of a set. */
struct coopos_event {
    int fd;
    int events;            /* COOPOS_READ, COOPOS_WRITE or both */
};

static inline long long coopos_now_us(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

/* The same clock, some milliseconds late, for a few nanoseconds where there is such a thing. */
static inline long long coopos_coarse_now_us(void)
{
#if defined(__linux__)
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
#else
    return coopos_now_us();
#endif
}

static inline int coopos_set_new(void)
{
#if defined(__linux__)
    return epoll_create1(EPOLL_CLOEXEC);
#else
    return coopos_unsupported();
#endif
}

/* Ask the set for one event of *fd*: that it is ready for one of *events*. This replaces what it was armed for before. E2BIG: the
 * open file is in 500 sets already that are themselves in a set (path_limits in
 * https://github.com/torvalds/linux/blob/master/fs/eventpoll.c).
 */
static inline int coopos_set_arm(int set, int fd, int events)
{
#if defined(__linux__)
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    event.events = EPOLLONESHOT | (events & COOPOS_READ ? EPOLLIN : 0) | (events & COOPOS_WRITE ? EPOLLOUT : 0);
    event.data.fd = fd;
    if (epoll_ctl(set, EPOLL_CTL_MOD, fd, &event) == 0)
        return 0;
    /* Most files are in the set already. Closing an open file takes it out (epoll(7)), so a reused number needs an ADD. */
    if (errno == ENOENT) {
        if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &event) == 0)
            return 0;
        if (errno == EINVAL)
            errno = E2BIG;
    }
    return -1;
#else
    (void)set; (void)fd; (void)events;
    return coopos_unsupported();
#endif
}

/* Get the events of the set, without waiting: at most *max*, which is at most COOPOS_SET_BATCH. Returns how many. */
#if defined(__GNUC__)
__attribute__((noinline, unused))  /* inlined, its large frame would be copied when a greenlet switches */
#endif
static int coopos_set_ready(int set, struct coopos_event *ready, int max)
{
#if defined(__linux__)
    struct epoll_event events[COOPOS_SET_BATCH];
    int i, n;
    do
        n = epoll_wait(set, events, max, 0);
    while (n < 0 && errno == EINTR);
    for (i = 0; i < n; i++) {
        /* An error or a hangup wakes readers and writers. */
        uint32_t all = events[i].events & (EPOLLERR | EPOLLHUP);
        ready[i].fd = events[i].data.fd;
        ready[i].events = (events[i].events & EPOLLIN || all ? COOPOS_READ : 0)
                          | (events[i].events & EPOLLOUT || all ? COOPOS_WRITE : 0);
    }
    return n;
#else
    (void)set; (void)ready; (void)max;
    return coopos_unsupported();
#endif
}

/* Whether *fd* is, or may be, in the set *set*, which is the event loop's. */
static inline int coopos_set_has(int set, int fd)
{
#if defined(__linux__)
    struct epoll_event nothing;
    memset(&nothing, 0, sizeof nothing);
    if (epoll_ctl(set, EPOLL_CTL_ADD, fd, &nothing) == 0) {
        (void)epoll_ctl(set, EPOLL_CTL_DEL, fd, &nothing);
        return 0;
    }
    return errno != EPERM;         /* EPERM: a regular file, which can't be in a set */
#else
    (void)set; (void)fd;
    return 1;
#endif
}

/* Whether *fd* is a pipe with one byte in it. */
static inline int coopos_holds_one_byte(int fd)
{
    int n = 0;
    return ioctl(fd, FIONREAD, &n) == 0 && n == 1;
}

/* close(2) every descriptor from first to last. */
static inline void coopos_close_run(int first, int last)
{
#if defined(__linux__)
    if (syscall(SYS_close_range, (unsigned)first, (unsigned)last, 0u) == 0)
        return;
#endif
    for (; first <= last; first++)
        (void)close(first);
}

/* ---- a bell: a descriptor that any thread makes readable, for good ---- */

/* Make bell[0] readable by a write to bell[1]; on Linux both are one eventfd. Returns whether it is readable: not if the program
 * has closed the number. EAGAIN: it is full, so it is readable already. Any other error is tried again: whoever waits for the bell
 * hears of nothing else.
 */
static inline int coopos_bell_ring(const int *bell)
{
    uint64_t one = 1;
    ssize_t rc;
    int attempts = 5;
    do
        rc = write(bell[1], &one, sizeof one);
    while (rc < 0 && errno != EAGAIN && (errno == EINTR || --attempts));
    return rc >= 0 || errno == EAGAIN;
}

/* Make it not readable, until the next ring. */
static inline void coopos_bell_hush(const int *bell)
{
    uint64_t rings[8];
    ssize_t nread;
    do
        nread = read(bell[0], rings, sizeof rings);
    while ((nread < 0 && errno == EINTR) || (bell[0] != bell[1] && nread == (ssize_t)sizeof rings));
}

static inline void coopos_bell_close(const int *bell)
{
    (void)close(bell[0]);
    if (bell[1] != bell[0])
        (void)close(bell[1]);
}

static inline int coopos_bell_new(int *bell)
{
#if defined(__linux__)
    bell[0] = bell[1] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return bell[0] < 0 ? -1 : 0;
#else
    int i, err;
    if (pipe(bell) < 0)
        return -1;
    for (i = 0; i < 2; i++) {
        (void)fcntl(bell[i], F_SETFD, FD_CLOEXEC);
        (void)fcntl(bell[i], F_SETFL, O_NONBLOCK);
    }
    /* macOS allocates a pipe's buffer at the first write, which fails if memory is short. Here we can report that, later not:
     * https://github.com/apple-oss-distributions/xnu/blob/main/bsd/kern/sys_pipe.c */
    if (!coopos_bell_ring(bell)) {
        err = errno;
        coopos_bell_close(bell);
        errno = err;
        return -1;
    }
    coopos_bell_hush(bell);
    return 0;
#endif
}

/* ---- threads ---- */

/* Start a thread that blocks all signals. Returns 0 or an errno. */
static inline int coopos_thread_start(pthread_t *thread, void *(*run)(void *), void *arg)
{
    enum { STACK_BYTES = 512 * 1024 };
    sigset_t all, before;
    pthread_attr_t attr;
    int err;
    sigfillset(&all);
    if ((err = pthread_attr_init(&attr)) != 0)
        return err;
    (void)pthread_attr_setstacksize(&attr, STACK_BYTES);
    err = pthread_sigmask(SIG_SETMASK, &all, &before);
    if (err == 0) {
        err = pthread_create(thread, &attr, run, arg);
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    (void)pthread_attr_destroy(&attr);
    return err;
}

/* A timer that sends its signal to the thread that has made it. */
#if defined(__linux__)
typedef timer_t coopos_timer;
/* The documented name of this field (timer_create(2)), which older glibc lacks:
 * https://github.com/bminor/glibc/blob/master/sysdeps/unix/sysv/linux/bits/types/sigevent_t.h */
#  if defined(__GLIBC__) && !defined(sigev_notify_thread_id)
#    define sigev_notify_thread_id _sigev_un._tid
#  endif
#else
typedef int coopos_timer;
#endif

static inline int coopos_timer_new(coopos_timer *timer, int signal)
{
#if defined(__linux__)
    struct sigevent event;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = signal;
    event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
    return timer_create(CLOCK_MONOTONIC, &event, timer);
#else
    (void)timer; (void)signal;
    return coopos_unsupported();
#endif
}

/* Make it send its signal once, after *us* microseconds. Async-signal-safe: signal-safety(7). */
static inline int coopos_timer_set(const coopos_timer *timer, long us)
{
#if defined(__linux__)
    struct itimerspec when;
    memset(&when, 0, sizeof when);
    when.it_value.tv_sec = us / 1000000;
    when.it_value.tv_nsec = us % 1000000 * 1000L;
    return timer_settime(*timer, 0, &when, NULL);
#else
    (void)timer; (void)us;
    return coopos_unsupported();
#endif
}

static inline void coopos_timer_delete(const coopos_timer *timer)
{
#if defined(__linux__)
    (void)timer_delete(*timer);
#else
    (void)timer;
#endif
}

/* sem_getvalue(3). On macOS that always fails with ENOSYS. */
static inline int coopos_sem_value(sem_t *semaphore, int *value)
{
#if defined(__APPLE__)
    (void)semaphore; (void)value;
    return coopos_unsupported();
#else
    return sem_getvalue(semaphore, value);
#endif
}

/* Whether a pipe has taken *data*, whole and at once, as it does up to PIPE_BUF bytes when poll(2) calls it ready. If not, nothing
 * is written.
 */
static inline int coopos_write_at_once(int fd, const void *data, size_t size)
{
    struct pollfd room = {.fd = fd, .events = POLLOUT};
    return size <= PIPE_BUF && poll(&room, 1, 0) == 1 && room.revents == POLLOUT && write(fd, data, size) == (ssize_t)size;
}

/* ---- Linux calls that move bytes ---- */

/* preadv2(2) and pwritev2(2); an offset of -1 is the file's own. The kernel takes the offset in two halves, and on 64-bit machines
 * ignores the second (pos_from_hilo in https://github.com/torvalds/linux/blob/master/fs/read_write.c).
 */
static inline ssize_t coopos_move_at(int fd, int writes, const struct iovec *iov, int count, off_t offset, int flags)
{
#if defined(__linux__) && defined(SYS_preadv2) && defined(SYS_pwritev2)
    long high = (long)((uint64_t)offset >> 32);
    return syscall(writes ? SYS_pwritev2 : SYS_preadv2, fd, iov, (long)count, (long)offset, high, flags);
#else
    (void)fd; (void)writes; (void)iov; (void)count; (void)offset; (void)flags;
    return coopos_unsupported();
#endif
}

/* Whether a move of 0 buffers fails with the same errno as one of some, for a wrong descriptor or offset. */
#if defined(__linux__)
enum { COOPOS_HAVE_EMPTY_MOVES = 1 };
#else
enum { COOPOS_HAVE_EMPTY_MOVES = 0 };
#endif

/* process_vm_readv(2) and process_vm_writev(2) on this process: a copy that fails with EFAULT where memcpy(3) gets a SIGBUS. */
static inline ssize_t coopos_copy_by_kernel(const struct iovec *buffers, int count, char *ours, size_t size, int to_ours)
{
#if defined(__linux__) && defined(SYS_process_vm_readv) && defined(SYS_process_vm_writev)
    struct iovec local;
    local.iov_base = ours;
    local.iov_len = size;
    return syscall(to_ours ? SYS_process_vm_readv : SYS_process_vm_writev, getpid(), &local, 1ul, buffers, (unsigned long)count, 0ul);
#else
    (void)buffers; (void)count; (void)ours; (void)size; (void)to_ours;
    return coopos_unsupported();
#endif
}

/* ---- calls that only a worker makes ---- */

static inline int coopos_fdatasync(int fd)
{
#if defined(__APPLE__)
    return fsync(fd);
#else
    return fdatasync(fd);
#endif
}

/* posix_fallocate(3): 0, or an errno. */
static inline int coopos_fallocate(int fd, off_t offset, off_t length)
{
#if defined(__APPLE__)
    (void)fd; (void)offset; (void)length;
    return ENOSYS;
#else
    return posix_fallocate(fd, offset, length);
#endif
}

/* In the next three an offset of -1 is the file's own. */
static inline ssize_t coopos_copy(int source, off_t offset, int target, off_t target_offset, size_t size)
{
#if defined(__linux__) && defined(SYS_copy_file_range)
    int64_t from = offset, to = target_offset;
    return syscall(SYS_copy_file_range, source, from < 0 ? NULL : &from, target, to < 0 ? NULL : &to, size, 0u);
#else
    (void)source; (void)offset; (void)target; (void)target_offset; (void)size;
    return coopos_unsupported();
#endif
}

static inline ssize_t coopos_sendfile(int target, int source, off_t offset, size_t size)
{
#if defined(__linux__)
    return sendfile(target, source, offset < 0 ? NULL : &offset, size);
#else
    (void)target; (void)source; (void)offset; (void)size;
    return coopos_unsupported();
#endif
}

static inline ssize_t coopos_splice(int source, off_t offset, int target, off_t target_offset, size_t size, unsigned flags)
{
#if defined(__linux__)
    int64_t from = offset, to = target_offset;
    return syscall(SYS_splice, source, from < 0 ? NULL : &from, target, to < 0 ? NULL : &to, size, flags);
#else
    (void)source; (void)offset; (void)target; (void)target_offset; (void)size; (void)flags;
    return coopos_unsupported();
#endif
}

static inline ssize_t coopos_random(char *buf, size_t size, unsigned flags)
{
#if defined(__linux__) && defined(SYS_getrandom)
    return syscall(SYS_getrandom, buf, size, flags);
#else
    (void)buf; (void)size; (void)flags;
    return coopos_unsupported();
#endif
}

/* Whether poll(2) supports a device: then epoll_ctl(2) accepts it. On other systems 0, since we can't know. */
static inline int coopos_can_poll(int fd)
{
#if defined(__linux__)
    struct epoll_event event;
    int rc, set = epoll_create1(EPOLL_CLOEXEC);
    memset(&event, 0, sizeof event);
    rc = epoll_ctl(set, EPOLL_CTL_ADD, fd, &event);    /* EPERM: poll(2) always calls it ready */
    if (set >= 0)
        (void)close(set);
    return rc == 0;
#else
    (void)fd;
    return 0;
#endif
}

/* ---- terminals ---- */

static inline int coopos_open_slave(int master)
{
    char name[128];
    int slave = -1;
#if defined(TIOCGPTPEER)
    /* Linux 4.13. It needs no path, which another mount namespace may lack: https://man7.org/linux/man-pages/man2/TIOCGPTPEER.2const.html */
    slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
#endif
    if (slave < 0 && (errno = ptsname_r(master, name, sizeof name)) == 0)
        slave = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    return slave;
}

/* forkpty(3), but both descriptors are close-on-exec from the start. Those of libc's are not: a program that the process starts then
 * or later would keep the terminal open, and could read what is typed there. In the child *master is -1. */
static inline pid_t coopos_forkpty(int *master, const struct winsize *size)
{
    int err, slave = -1;
    pid_t pid = -1;
#if defined(__linux__)
    int fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
#else
    int fd = posix_openpt(O_RDWR | O_NOCTTY);      /* macOS refuses other flags */
    if (fd >= 0)
        (void)fcntl(fd, F_SETFD, FD_CLOEXEC);
#endif
    *master = -1;
    if (fd < 0)
        return -1;
    if (grantpt(fd) == 0 && unlockpt(fd) == 0 && (slave = coopos_open_slave(fd)) >= 0) {
        if (size != NULL)
            (void)ioctl(slave, TIOCSWINSZ, size);
        pid = fork();
    }
    err = errno;
    if (pid > 0)
        *master = fd;
    else
        close(fd);                     /* in the child before login_tty(3), which may give its number to the terminal */
    if (pid == 0) {
        /* Where the parent has closed its standard streams the slave may have such a number, which it keeps. */
        if (slave <= STDERR_FILENO)
            (void)fcntl(slave, F_SETFD, 0);
        if (login_tty(slave))
            _exit(1);
    } else if (slave >= 0)
        close(slave);
    errno = err;
    return pid;
}

/* Whether *fd* is the master of a pseudoterminal. Its termios(3) and its foreground group are those of the slave: they don't govern
 * reads and writes of the master.
 */
static inline int coopos_is_master(int fd)
{
#if defined(TIOCGPKT)
    int is_packet_mode;
    return ioctl(fd, TIOCGPKT, &is_packet_mode) == 0;   /* only for masters: ioctl_tty(2) */
#elif defined(TIOCPTYGNAME)
    char name[128];
    return ioctl(fd, TIOCPTYGNAME, name) == 0;
#else
    (void)fd;
    return 0;
#endif
}

/* Whether *fd* is our controlling terminal and we are in the background. Then a read, or with TOSTOP a write, doesn't wait for the
 * terminal: it stops our process group, or it fails, or (a write) succeeds. See __tty_check_change in
 * https://github.com/torvalds/linux/blob/master/drivers/tty/tty_jobctrl.c
 */
static inline int coopos_is_in_background(int fd, int writes)
{
    struct termios mode;
    pid_t foreground = tcgetpgrp(fd);
    if (foreground < 0 || foreground == getpgrp() || coopos_is_master(fd))
        return 0;
    return !writes || (tcgetattr(fd, &mode) == 0 && (mode.c_lflag & TOSTOP));
}

/* Whether VMIN and VTIME decide how long a read of the terminal waits: non-canonical mode with a VMIN other than 1 (termios(3)).
 * Else it waits for one line or one byte. *min* gets VMIN, *tenths* gets VTIME, in tenths of a second.
 */
static inline int coopos_vmin_vtime(int fd, int *min, int *tenths)
{
    struct termios mode;
    if (tcgetattr(fd, &mode) < 0 || (mode.c_lflag & ICANON) || mode.c_cc[VMIN] == 1 || coopos_is_master(fd))
        return 0;
    *min = mode.c_cc[VMIN];
    *tenths = mode.c_cc[VTIME];
    return 1;
}

/* How many bytes a read of a terminal would find; -1: a hangup or an error, which read(2) reports. */
static inline int coopos_bytes_available(int fd)
{
    struct pollfd ready = {fd, POLLIN, 0};
    int n;
    /* poll(2) also makes the kernel pass on the bytes that have arrived (n_tty_poll in
     * https://github.com/torvalds/linux/blob/master/drivers/tty/n_tty.c). */
    if (poll(&ready, 1, 0) > 0 && (ready.revents & ~POLLIN))
        return -1;
    return ioctl(fd, FIONREAD, &n) < 0 ? -1 : n;
}

#endif
