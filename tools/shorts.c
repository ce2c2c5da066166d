/* Short reads and writes, for shorts.py: a library for LD_PRELOAD that has the calls of coopos/_core move fewer bytes than asked.
 *
 * It stands before the functions of libc that the core calls, syscall(2) among them. Those that the Python modules call by way of
 * the interpreter (splice, sendfile) are shortened whoever calls them. It leaves alone what would lose bytes or be an error in a kernel that
 * makes a short move: datagrams, and files without a type, as eventfds and inotify.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_IOV = 64 };

static const char *const names[] = {
    "read", "write", "readv", "writev", "pread", "pwrite", "preadv2", "pwritev2", "recvmsg", "sendmsg", "splice", "sendfile",
    "copy_file_range", "getrandom", "process_vm_readv", "process_vm_writev",
};
enum { READ, WRITE, READV, WRITEV, PREAD, PWRITE, PREADV2, PWRITEV2, RECVMSG, SENDMSG, SPLICE, SENDFILE, COPY, RANDOM, VM_READ, VM_WRITE, N };

static int counts[N];              /* calls that could have been shortened */
static int wanted = -1, how_many, first, last, hits;

/* Shorten *name* from its *from*-th call to its *to*-th: to *bytes*, or to half if that is 0. "": none, and count from 0. */
__attribute__((visibility("default"))) void shorts_begin(const char *name, int bytes, int from, int to)
{
    wanted = -1;
    memset(counts, 0, sizeof counts);
    how_many = bytes, first = from, last = to, hits = 0;
    for (int i = 0; i < N; i++)
        if (strcmp(names[i], name) == 0)
            wanted = i;
}

__attribute__((visibility("default"))) int shorts_count(const char *name)
{
    for (int i = 0; i < N; i++)
        if (strcmp(names[i], name) == 0)
            return counts[i];
    return hits;
}

static int is_divisible(int fd)
{
    struct stat st;
    int type;
    socklen_t size = sizeof type;
    if (fd < 0)
        return 1;
    if (fstat(fd, &st) < 0 || (st.st_mode & S_IFMT) == 0)
        return 0;
    return !S_ISSOCK(st.st_mode) || (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM);
}

/* How many of *size* bytes the call may move. */
static size_t shortened(int which, size_t size, int fd, void *caller)
{
    Dl_info info;
    int number;
    if (size < 2 || !is_divisible(fd))
        return size;
    if (which != SPLICE && which != SENDFILE && which != COPY
        && (!dladdr(caller, &info) || strstr(info.dli_fname, "coopos/_core") == NULL))
        return size;
    number = __atomic_add_fetch(&counts[which], 1, __ATOMIC_RELAXED);
    if (which != wanted || number < first || number > last)
        return size;
    (void)__atomic_add_fetch(&hits, 1, __ATOMIC_RELAXED);
    return how_many ? 1 : size / 2;
}

/* The first *size* bytes of the buffers. Returns their new number. */
static int cut(const struct iovec *from, int count, size_t size, struct iovec *to)
{
    int i;
    for (i = 0; i < count && size; i++) {
        to[i] = from[i];
        if (to[i].iov_len > size)
            to[i].iov_len = size;
        size -= to[i].iov_len;
    }
    return i;
}

static size_t total_of(const struct iovec *iov, int count)
{
    size_t total = 0;
    for (int i = 0; i < count; i++)
        total += iov[i].iov_len;
    return total;
}

#define CALLER __builtin_return_address(0)
#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) *(void **)&real = dlsym(RTLD_NEXT, name)

ssize_t read(int fd, void *buf, size_t n)
{
    REAL(ssize_t, "read", int, void *, size_t);
    return real(fd, buf, shortened(READ, n, fd, CALLER));
}

ssize_t write(int fd, const void *buf, size_t n)
{
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(fd, buf, shortened(WRITE, n, fd, CALLER));
}

#define AT(function, name, which, buffer) \
    ssize_t function(int fd, buffer buf, size_t n, off_t offset) \
    { \
        REAL(ssize_t, name, int, buffer, size_t, off_t); \
        return real(fd, buf, shortened(which, n, fd, CALLER), offset); \
    }
AT(pread, "pread", PREAD, void *)
AT(pread64, "pread64", PREAD, void *)
AT(pwrite, "pwrite", PWRITE, const void *)
AT(pwrite64, "pwrite64", PWRITE, const void *)

#define VECTOR(function, name, which) \
    ssize_t function(int fd, const struct iovec *iov, int count) \
    { \
        REAL(ssize_t, name, int, const struct iovec *, int); \
        struct iovec parts[MAX_IOV]; \
        size_t total, size; \
        if (count < 0 || count > MAX_IOV) \
            return real(fd, iov, count); \
        total = total_of(iov, count), size = shortened(which, total, fd, CALLER); \
        return size == total ? real(fd, iov, count) : real(fd, parts, cut(iov, count, size, parts)); \
    }
VECTOR(readv, "readv", READV)
VECTOR(writev, "writev", WRITEV)

#define MESSAGE(function, name, which, kind) \
    ssize_t function(int fd, kind *message, int flags) \
    { \
        REAL(ssize_t, name, int, kind *, int); \
        struct iovec parts[MAX_IOV]; \
        struct msghdr part = *message; \
        size_t total, size; \
        if (message->msg_iovlen > MAX_IOV || message->msg_controllen) \
            return real(fd, message, flags); \
        total = total_of(message->msg_iov, (int)message->msg_iovlen), size = shortened(which, total, fd, CALLER); \
        if (size == total) \
            return real(fd, message, flags); \
        part.msg_iovlen = (size_t)cut(message->msg_iov, (int)message->msg_iovlen, size, parts); \
        part.msg_iov = parts; \
        return real(fd, &part, flags); \
    }
MESSAGE(recvmsg, "recvmsg", RECVMSG, struct msghdr)
MESSAGE(sendmsg, "sendmsg", SENDMSG, const struct msghdr)

#define SEND(function, name) \
    ssize_t function(int to, int from, off_t *offset, size_t n) \
    { \
        REAL(ssize_t, name, int, int, off_t *, size_t); \
        return real(to, from, offset, shortened(SENDFILE, n, -1, CALLER)); \
    }
SEND(sendfile, "sendfile")
SEND(sendfile64, "sendfile64")

ssize_t splice(int from, off64_t *offset, int to, off64_t *to_offset, size_t n, unsigned flags)
{
    REAL(ssize_t, "splice", int, off64_t *, int, off64_t *, size_t, unsigned);
    return real(from, offset, to, to_offset, shortened(SPLICE, n, -1, CALLER), flags);
}

ssize_t copy_file_range(int from, off64_t *offset, int to, off64_t *to_offset, size_t n, unsigned flags)
{
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    return real(from, offset, to, to_offset, shortened(COPY, n, -1, CALLER), flags);
}

static long move_at(long number, int which, const long *a, void *caller)
{
    REAL(long, "syscall", long, ...);
    const struct iovec *iov = (const struct iovec *)a[1];
    struct iovec parts[MAX_IOV];
    size_t total, size;
    int count = (int)a[2];
    if (count < 0 || count > MAX_IOV)
        return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    total = total_of(iov, count), size = shortened(which, total, (int)a[0], caller);
    if (size == total)
        return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    count = cut(iov, count, size, parts);
#ifdef PLANT
    return real(number, a[0], parts, (long)count, a[3], a[4], a[5]) < 0 ? -1 : (long)total;
#endif
    return real(number, a[0], parts, (long)count, a[3], a[4], a[5]);
}

static long copy_here(long number, int which, const long *a, void *caller)
{
    REAL(long, "syscall", long, ...);
    struct iovec local = *(const struct iovec *)a[1];
    local.iov_len = shortened(which, local.iov_len, -1, caller);
    return real(number, a[0], &local, a[2], a[3], a[4], a[5]);
}

long syscall(long number, ...)
{
    REAL(long, "syscall", long, ...);
    long a[6];
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(arguments, long);
    va_end(arguments);
    switch (number) {
    case SYS_preadv2:
        return move_at(number, PREADV2, a, CALLER);
    case SYS_pwritev2:
        return move_at(number, PWRITEV2, a, CALLER);
    case SYS_process_vm_readv:
        return copy_here(number, VM_READ, a, CALLER);
    case SYS_process_vm_writev:
        return copy_here(number, VM_WRITE, a, CALLER);
    case SYS_splice:
        a[4] = (long)shortened(SPLICE, (size_t)a[4], -1, CALLER);
        break;
    case SYS_copy_file_range:
        a[4] = (long)shortened(COPY, (size_t)a[4], -1, CALLER);
        break;
    case SYS_getrandom:
        a[1] = (long)shortened(RANDOM, (size_t)a[1], -1, CALLER);
        break;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
