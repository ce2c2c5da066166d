/* A close(2) that is put off until all parties that use the number have left. The last one closes it; that may be a worker. */
#ifndef COOPOS_CLOSING_H
#define COOPOS_CLOSING_H

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct coopos_closing {
    int fd;
    int parties;               /* how many have not left yet */
    int refs;                  /* one of each party and one of the maker */
    int is_made;
    dev_t dev;                 /* of the file that the number belonged to */
    ino_t ino;
};

/* With one party, the caller. NULL with errno: the descriptor is not open, or there is no memory. */
static inline struct coopos_closing *coopos_closing_new(int fd)
{
    struct coopos_closing *closing;
    struct stat st;
    if (fstat(fd, &st) < 0)
        return NULL;
    closing = malloc(sizeof *closing);
    if (closing != NULL) {
        closing->fd = fd;
        closing->parties = 1;
        closing->refs = 2;
        closing->is_made = 0;
        closing->dev = st.st_dev;
        closing->ino = st.st_ino;
    }
    return closing;
}

static inline void coopos_closing_drop(struct coopos_closing *closing)
{
    if (__atomic_sub_fetch(&closing->refs, 1, __ATOMIC_ACQ_REL) == 0)
        free(closing);
}

/* Whether the close has still to be made: not if the program has closed the number by other means and used it again. */
static inline int coopos_closing_is_due(struct coopos_closing *closing)
{
    struct stat st;
    return !__atomic_load_n(&closing->is_made, __ATOMIC_ACQUIRE) && fstat(closing->fd, &st) == 0 && st.st_dev == closing->dev
        && st.st_ino == closing->ino;
}

static inline void coopos_closing_enter(struct coopos_closing *closing)
{
    (void)__atomic_add_fetch(&closing->parties, 1, __ATOMIC_ACQ_REL);
    (void)__atomic_add_fetch(&closing->refs, 1, __ATOMIC_ACQ_REL);
}

/* A party leaves; the last one makes the close, if the number is still that file's. */
static inline void coopos_closing_leave(struct coopos_closing *closing)
{
    if (closing == NULL)
        return;
    if (__atomic_sub_fetch(&closing->parties, 1, __ATOMIC_ACQ_REL) == 0 && coopos_closing_is_due(closing)) {
        /* Before the close: after it, the number may belong to another file. */
        __atomic_store_n(&closing->is_made, 1, __ATOMIC_RELEASE);
        (void)close(closing->fd);
    }
    coopos_closing_drop(closing);
}

#endif
