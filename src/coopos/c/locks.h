/* Locks that are waited for on behalf of a greenlet, and how one is given back if the greenlet is gone.
 *
 * A lock of fcntl(2) belongs to the process, one of flock(2) to the open file; neither belongs to a greenlet. So a lock can't simply be
 * released for a greenlet that was killed just when its worker had got it: other greenlets may hold parts of the same range. While a
 * job waits for a lock, its claim lists what others of this process hold: what they held before (from /proc/locks) and, in order,
 * what they have got or released since. Only the rest is given back.
 *
 * The caller holds one lock for all claims: the pool's.
 */
#ifndef COOPOS_LOCKS_H
#define COOPOS_LOCKS_H

#include <stdlib.h>
#include <sys/file.h>

#include "system.h"

struct coopos_range {
    const struct coopos_claim *owner;    /* or NULL: it was not got by a job, or that job is over */
    off_t start, end;                    /* COOPOS_TO_THE_END: as far as a file can reach */
    int kind;                            /* F_RDLCK, F_WRLCK, F_UNLCK */
};

struct coopos_claim {
    struct coopos_claim *next;
    int is_flock, fd;                    /* for flock(2) the descriptor counts, for fcntl(2) the file */
    dev_t dev;
    ino_t ino;
    struct coopos_range wanted;
    struct coopos_range *others;
    int n_others;
};

#define COOPOS_TO_THE_END ((off_t)((UINT64_C(1) << 63) - 1))

static struct coopos_claim *coopos_claims;

/* The bytes that fcntl(2) means by an offset and a length, which may be negative or, for all that follows, 0. */
static inline struct coopos_range coopos_range_of(int kind, off_t offset, off_t length)
{
    struct coopos_range range = {NULL, offset, COOPOS_TO_THE_END, kind};
    if (length < 0) {
        range.start = offset + length;
        range.end = offset;
    }
    else if (length > 0 && offset <= COOPOS_TO_THE_END - length)
        range.end = offset + length;
    return range;
}

/* The latest entry for a byte says what the process holds of it. What a later entry of the same owner covers is dropped. Without memory
 * the range is not recorded, and may be released with ours.
 */
static inline void coopos_claim_add(struct coopos_claim *claim, struct coopos_range range)
{
    struct coopos_range *others = claim->others;
    int i, n = 0, overlaps = 0;
    for (i = 0; i < claim->n_others; i++) {
        if (others[i].owner == range.owner && others[i].start >= range.start && others[i].end <= range.end)
            continue;
        overlaps |= others[i].start < range.end && others[i].end > range.start;
        others[n++] = others[i];
    }
    claim->n_others = n;
    if (range.kind == F_UNLCK && !overlaps)
        return;
    others = realloc(others, (size_t)(n + 1) * sizeof *others);
    if (others != NULL) {
        others[claim->n_others++] = range;
        claim->others = others;
    }
}

static inline int coopos_claim_is_of(const struct coopos_claim *claim, int is_flock, int fd, dev_t dev, ino_t ino)
{
    return claim->is_flock == is_flock && (!is_flock || claim->fd == fd) && claim->dev == dev && claim->ino == ino;
}

/* NULL: the descriptor is not open, or there is no memory. */
static inline struct coopos_claim *coopos_claim_new(int is_flock, int fd, struct coopos_range wanted)
{
    struct coopos_claim *claim;
    struct stat st;
    if (fstat(fd, &st) < 0 || (claim = calloc(1, sizeof *claim)) == NULL)
        return NULL;
    claim->is_flock = is_flock;
    claim->fd = fd;
    claim->dev = st.st_dev;
    claim->ino = st.st_ino;
    claim->wanted = wanted;
    claim->wanted.owner = claim;
    claim->next = coopos_claims;
    coopos_claims = claim;
    return claim;
}

/* What *before* has to other claims: they forget whose it was (*is_given_back* 0), or that it was there. */
static inline void coopos_claim_disown(const struct coopos_claim *before, int is_given_back)
{
    struct coopos_claim *each;
    int i;
    for (each = coopos_claims; each != NULL; each = each->next)
        for (i = 0; i < each->n_others; i++)
            if (each->others[i].owner == before) {
                each->others[i].owner = NULL;
                if (is_given_back)
                    each->others[i].end = each->others[i].start;
            }
}

static inline void coopos_claim_free(struct coopos_claim *claim)
{
    struct coopos_claim **link = &coopos_claims;
    if (claim == NULL)
        return;
    while (*link != claim)
        link = &(*link)->next;
    *link = claim->next;
    coopos_claim_disown(claim, 0);
    free(claim->others);
    free(claim);
}

/* The job has its lock: the others of that file have to know. */
static inline void coopos_claim_got(const struct coopos_claim *claim)
{
    struct coopos_claim *each;
    for (each = coopos_claims; each != NULL; each = each->next)
        if (each != claim && coopos_claim_is_of(each, claim->is_flock, claim->fd, claim->dev, claim->ino))
            coopos_claim_add(each, claim->wanted);
}

/* Somebody has got or released (F_UNLCK) a lock without a job. */
static inline void coopos_claims_note(int is_flock, int fd, struct coopos_range range)
{
    struct coopos_claim *each;
    struct stat st;
    if (coopos_claims == NULL || fstat(fd, &st) < 0)
        return;
    for (each = coopos_claims; each != NULL; each = each->next)
        if (coopos_claim_is_of(each, is_flock, fd, st.st_dev, st.st_ino))
            coopos_claim_add(each, range);
}

/* In a forked child, which has none of its parent's locks of fcntl(2), but shares its open files. */
static inline void coopos_claims_in_child(void)
{
    struct coopos_claim *each;
    for (each = coopos_claims; each != NULL; each = each->next)
        if (!each->is_flock)
            each->n_others = 0;
}

static inline int coopos_lock_range(int fd, int command, struct coopos_range range)
{
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = (short)range.kind;
    lock.l_whence = SEEK_SET;
    lock.l_start = range.start;
    lock.l_len = range.end == COOPOS_TO_THE_END ? 0 : range.end - range.start;
    return fcntl(fd, command, &lock);
}

/* Give back what the claim has got, but not what others hold of it: where they hold it in another way, the lock becomes theirs. */
static inline void coopos_claim_give_back(struct coopos_claim *claim)
{
    struct coopos_range piece = claim->wanted;
    int i, kind;
    coopos_claim_disown(claim, 1);
    for (; piece.start < claim->wanted.end; piece.start = piece.end) {
        piece.end = claim->wanted.end;
        kind = F_UNLCK;
        for (i = 0; i < claim->n_others; i++) {
            const struct coopos_range *other = &claim->others[i];
            if (other->start >= other->end || other->end <= piece.start)
                continue;
            if (other->start > piece.start) {
                if (other->start < piece.end)
                    piece.end = other->start;
                continue;
            }
            if (other->end < piece.end)
                piece.end = other->end;
            kind = other->kind;
        }
        piece.kind = kind;
        if (claim->is_flock) {
            if (kind == F_UNLCK)
                (void)flock(claim->fd, LOCK_UN);
        }
        else if (kind != claim->wanted.kind)
            (void)coopos_lock_range(claim->fd, F_SETLK, piece);
    }
}

#endif
