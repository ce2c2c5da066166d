/* Two handlers of one signal, one after the other.

   faulthandler.register(chain=True) calls the handler before it by raise(3), with SA_NODEFER: in a burst of signals its frames pile up
   until the stack is full. https://github.com/python/cpython/blob/main/Modules/faulthandler.c (faulthandler_user) */

#ifndef COOPOS_SIGNALS_H
#define COOPOS_SIGNALS_H

#include <errno.h>
#include <signal.h>

#ifndef NSIG
#define NSIG 65
#endif

static struct sigaction coopos_first[NSIG], coopos_second[NSIG];

static void coopos_handle_twice(int signum)
{
    int err = errno;
    coopos_first[signum].sa_handler(signum);
    coopos_second[signum].sa_handler(signum);
    errno = err;
}

/* The handler that is there now shall be the second. */
static inline int coopos_keep_handler(int signum)
{
    return sigaction(signum, NULL, &coopos_second[signum]);
}

/* The handler that is there now is the first: have both called. The signal interrupts system calls as the second has asked for. */
static inline int coopos_call_kept_handler_too(int signum)
{
    struct sigaction both;
    if (sigaction(signum, NULL, &coopos_first[signum]))
        return -1;
    both = coopos_second[signum];
    both.sa_handler = coopos_handle_twice;
    both.sa_flags |= coopos_first[signum].sa_flags & SA_ONSTACK;
    return sigaction(signum, &both, NULL);
}

#endif
