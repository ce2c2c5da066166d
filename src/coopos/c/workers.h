/* Threads of C that make the system calls which may block, and never touch Python or its GIL.
 *
 * A job is a struct with its operation, its descriptors and its own buffer. The thread that submits it and its worker share it under
 * one lock. The number of jobs that use a disk at once is limited; the others wait in order of arrival. A job that waits for a peer
 * gets a worker at once, however many there are. An idle worker waits for COOPOS_LINGER_S, then ends.
 *
 * The state here is static, so only one compiled module may include this file.
 */
#ifndef COOPOS_WORKERS_H
#define COOPOS_WORKERS_H

#include <stdlib.h>

#include "closing.h"
#include "locks.h"
#include "moving.h"

enum coopos_operation {
    COOPOS_MOVE, COOPOS_OPEN, COOPOS_SETLK, COOPOS_FLOCK, COOPOS_SEM_WAIT, COOPOS_WAITID, COOPOS_FSYNC, COOPOS_FDATASYNC, COOPOS_SYNC,
    COOPOS_FTRUNCATE, COOPOS_TRUNCATE, COOPOS_FALLOCATE, COOPOS_COPY, COOPOS_SENDFILE, COOPOS_SPLICE, COOPOS_RANDOM
};

enum coopos_state { COOPOS_IDLE, COOPOS_QUEUED, COOPOS_BEGUN, COOPOS_DONE };

/* Where the finished jobs of one hub arrive. */
struct coopos_mailbox {
    struct coopos_job *first, *last;
    int bell[2];
    int refs;                  /* its hub's, and one for each job */
    int is_shut;               /* its hub is gone: finished jobs do not arrive */
};

struct coopos_job {
    struct coopos_job *next;   /* in the queue, later in the mailbox */
    struct coopos_mailbox *mailbox;
    void *owner;               /* the Python object that submitted it */
    struct coopos_closing *closing[2];   /* closes of *fd* and *other* that wait for its end */
    pthread_t thread;
    int has_thread;
    enum coopos_operation operation;
    enum coopos_state state;
    int refs;                  /* its owner's, and its worker's or the queue's */
    int waits_for_peer;        /* and not for a disk: it may take for ever, and can be interrupted */
    int is_abandoned;          /* its greenlet is gone: the worker undoes it */
    int is_interrupted;
    int is_closed;             /* the number may be another file's once the job is over */
    int is_undone;
    int signal;                /* interrupts it */
    int fd, other;
    int flags;
    mode_t mode;
    off_t offset, other_offset, length;  /* an offset of -1: the descriptor's own */
    idtype_t idtype;
    id_t id;
    sem_t *semaphore;
    struct coopos_claim *claim;          /* to the lock that it waits for, or NULL */
    int writes;
    int is_undoable;           /* to undo a move, the offset is moved back */
    size_t size;               /* bytes to be moved */
    size_t room;               /* in *buf* */
    char *buf;                 /* aligned to COOPOS_ALIGNMENT; or a path */
    ssize_t rc;
    int err;
    off_t end;                 /* the descriptor's own offset after an undoable move, or -1 */
};

enum { COOPOS_ALIGNMENT = 4096, COOPOS_LINGER_S = 1 };

/* One buffer of such a size is kept for the next job: a new page costs more than the copy of its bytes. */
enum { COOPOS_SPARE_MIN = 32 * 1024, COOPOS_SPARE_MAX = 1024 * 1024 };

struct coopos_worker {
    struct coopos_worker *next;          /* the next idle one */
    struct coopos_job *job;
    pthread_cond_t has_job;
};

static struct coopos_pool {
    pthread_mutex_t lock;
    struct coopos_worker *idle;          /* the one that became idle last comes first, so that the others can end */
    struct coopos_job *first, *last;     /* the queue for the disks */
    int limit;                           /* of jobs that use the disks at once */
    int at_disks;
    int threads;
    int begun;                           /* jobs of either kind that have a worker */
    int is_ending;                       /* the process exits: idle workers end at once */
    int is_held;                         /* for tests: workers stop before the system call */
    pthread_cond_t is_let_go;
    char *spare;                         /* an unused buffer, or NULL */
    size_t spare_room;
} coopos_pool = {PTHREAD_MUTEX_INITIALIZER, NULL, NULL, NULL, 64, 0, 0, 0, 0, 0, PTHREAD_COND_INITIALIZER, NULL, 0};

static inline void coopos_pool_lock(void)
{
    (void)pthread_mutex_lock(&coopos_pool.lock);
}

static inline void coopos_pool_unlock(void)
{
    (void)pthread_mutex_unlock(&coopos_pool.lock);
}

/* ---- the system calls ---- */

static inline ssize_t coopos_job_move(struct coopos_job *job)
{
    struct iovec iov = {job->buf, job->size};
    struct coopos_move move = {job->fd, COOPOS_PLAIN, job->writes, &iov, 1, job->offset, job->flags, 0, 0, 0, 0, 0};
    ssize_t moved = coopos_move_plainly(&move);
    if (moved > 0 && job->is_undoable && job->offset < 0)
        job->end = lseek(job->fd, 0, SEEK_CUR);
    return moved;
}

static inline ssize_t coopos_job_call(struct coopos_job *job)
{
    siginfo_t info;
    int err;
    switch (job->operation) {
    case COOPOS_MOVE:
        return coopos_job_move(job);
    case COOPOS_OPEN:
        return openat(job->fd, job->buf, job->flags, job->mode);
    case COOPOS_SETLK:
        return coopos_lock_range(job->fd, F_SETLKW, job->claim->wanted);
    case COOPOS_FLOCK:
        return flock(job->fd, job->flags);
    case COOPOS_SEM_WAIT:
        return sem_wait(job->semaphore);
    case COOPOS_WAITID:
        return waitid(job->idtype, job->id, &info, job->flags);
    case COOPOS_FSYNC:
        return fsync(job->fd);
    case COOPOS_FDATASYNC:
        return coopos_fdatasync(job->fd);
    case COOPOS_SYNC:
        sync();
        return 0;
    case COOPOS_FTRUNCATE:
        return ftruncate(job->fd, job->length);
    case COOPOS_TRUNCATE:
        return truncate(job->buf, job->length);
    case COOPOS_FALLOCATE:
        err = coopos_fallocate(job->fd, job->offset, job->length);
        errno = err;
        return err ? -1 : 0;
    case COOPOS_COPY:
        return coopos_copy(job->fd, job->offset, job->other, job->other_offset, job->size);
    case COOPOS_SENDFILE:
        return coopos_sendfile(job->other, job->fd, job->offset, job->size);
    case COOPOS_SPLICE:
        return coopos_splice(job->fd, job->offset, job->other, job->other_offset, job->size, (unsigned)job->flags);
    case COOPOS_RANDOM:
        return coopos_random(job->buf, job->size, (unsigned)job->flags);
    }
    errno = ENOSYS;
    return -1;
}

/* Make the system call, in any thread. EINTR: signal handlers have to run, or the job was interrupted. */
static inline void coopos_job_make(struct coopos_job *job)
{
    job->end = -1;
    job->rc = coopos_job_call(job);
    job->err = job->rc < 0 ? errno : 0;
}

/* Try a job that waits for a peer, without waiting. EAGAIN, EACCES: it would have to wait. ENOSYS: it can't be tried so. */
static inline void coopos_job_poll(struct coopos_job *job)
{
    errno = ENOSYS;
    if (job->operation == COOPOS_SETLK)
        job->rc = coopos_lock_range(job->fd, F_SETLK, job->claim->wanted);
    else if (job->operation == COOPOS_FLOCK)
        job->rc = flock(job->fd, job->flags | LOCK_NB);
    else
        job->rc = job->operation == COOPOS_SEM_WAIT ? sem_trywait(job->semaphore) : -1;
    job->err = job->rc < 0 ? errno : 0;
    if (job->rc >= 0 && job->claim != NULL) {
        coopos_pool_lock();
        coopos_claim_got(job->claim);
        coopos_pool_unlock();
    }
}

/* Give back what a job has got, because its greenlet is gone. The offset stays where it is if others have moved it since. */
static inline void coopos_job_undo(struct coopos_job *job)
{
    if (job->rc < 0 || job->is_undone)
        return;
    job->is_undone = 1;
    switch (job->operation) {
    case COOPOS_OPEN:
        (void)close((int)job->rc);
        break;
    case COOPOS_SETLK:
    case COOPOS_FLOCK:
        coopos_claim_give_back(job->claim);
        break;
    case COOPOS_SEM_WAIT:
        (void)sem_post(job->semaphore);
        break;
    case COOPOS_MOVE:
        if (job->end >= 0 && lseek(job->fd, 0, SEEK_CUR) == job->end)
            (void)lseek(job->fd, job->end - (off_t)job->rc, SEEK_SET);
        break;
    default:
        break;
    }
}

/* ---- jobs and mailboxes ---- */

/* Use high numbers, and leave the low ones to the program: open(2) takes the lowest that is free. */
static inline void coopos_mailbox_step_aside(struct coopos_mailbox *mailbox)
{
    const int lowest = 512, is_one = mailbox->bell[0] == mailbox->bell[1];
    int i, moved;
    for (i = 0; i < 2 - is_one; i++)
        if ((moved = fcntl(mailbox->bell[i], F_DUPFD_CLOEXEC, lowest)) >= 0) {
            (void)close(mailbox->bell[i]);
            mailbox->bell[i] = moved;
        }
    if (is_one)
        mailbox->bell[1] = mailbox->bell[0];
}

static inline struct coopos_mailbox *coopos_mailbox_new(void)
{
    struct coopos_mailbox *mailbox = calloc(1, sizeof *mailbox);
    if (mailbox != NULL && coopos_bell_new(mailbox->bell) < 0) {
        int err = errno;
        free(mailbox);
        errno = err;
        return NULL;
    }
    if (mailbox != NULL) {
        coopos_mailbox_step_aside(mailbox);
        mailbox->refs = 1;
    }
    return mailbox;
}

/* With the lock held. */
static inline void coopos_mailbox_drop(struct coopos_mailbox *mailbox)
{
    if (--mailbox->refs == 0)
        free(mailbox);
}

static inline struct coopos_job *coopos_job_new(size_t room)
{
    struct coopos_job *job = calloc(1, sizeof *job);
    void *buf = NULL;
    if (job == NULL)
        return NULL;
    job->size = job->room = room;
    if (room >= COOPOS_SPARE_MIN) {
        coopos_pool_lock();
        if (coopos_pool.spare_room >= room) {
            buf = coopos_pool.spare;
            job->room = coopos_pool.spare_room;
            coopos_pool.spare = NULL;
            coopos_pool.spare_room = 0;
        }
        coopos_pool_unlock();
    }
    if (room && buf == NULL && posix_memalign(&buf, COOPOS_ALIGNMENT, room) != 0) {
        free(job);
        return NULL;
    }
    job->buf = buf;
    job->refs = 1;
    job->fd = job->other = -1;
    job->offset = job->other_offset = -1;
    return job;
}

/* With the lock held. */
static inline void coopos_job_drop(struct coopos_job *job)
{
    char *buf = job->buf;
    if (--job->refs == 0) {
        coopos_claim_free(job->claim);
        if (job->room >= COOPOS_SPARE_MIN && job->room <= COOPOS_SPARE_MAX && job->room > coopos_pool.spare_room) {
            buf = coopos_pool.spare;
            coopos_pool.spare = job->buf;
            coopos_pool.spare_room = job->room;
        }
        free(buf);
        free(job);
    }
}

static inline void coopos_job_free(struct coopos_job *job)
{
    coopos_pool_lock();
    coopos_job_drop(job);
    coopos_pool_unlock();
}

/* With the lock held: separate the job from its mailbox. Its owner may still have the job. */
static inline void coopos_job_part(struct coopos_job *job)
{
    struct coopos_mailbox *mailbox = job->mailbox;
    job->mailbox = NULL;
    coopos_mailbox_drop(mailbox);
    coopos_job_drop(job);
}

/* With the lock held: the next job that has arrived, or NULL. */
static inline struct coopos_job *coopos_mailbox_next(struct coopos_mailbox *mailbox)
{
    struct coopos_job *job = mailbox->first;
    if (job != NULL) {
        mailbox->first = job->next;
        if (mailbox->first == NULL)
            mailbox->last = NULL;
        coopos_job_part(job);
    }
    return job;
}

static inline struct coopos_job *coopos_mailbox_take(struct coopos_mailbox *mailbox)
{
    struct coopos_job *job;
    coopos_pool_lock();
    job = coopos_mailbox_next(mailbox);
    coopos_pool_unlock();
    return job;
}

/* Close the mailbox's descriptor: its hub is gone, the process was forked, or no loop wants the answer. */
static inline void coopos_mailbox_shut(struct coopos_mailbox *mailbox)
{
    coopos_pool_lock();
    mailbox->is_shut = 1;
    coopos_bell_close(mailbox->bell);
    while (coopos_mailbox_next(mailbox) != NULL)
        ;
    coopos_mailbox_drop(mailbox);
    coopos_pool_unlock();
}

/* Take a certain job out of its mailbox; whether it was there. */
static inline int coopos_mailbox_recall(struct coopos_job *job)
{
    struct coopos_mailbox *mailbox;
    struct coopos_job *before = NULL, *each;
    coopos_pool_lock();
    mailbox = job->mailbox;
    for (each = mailbox != NULL ? mailbox->first : NULL; each != NULL && each != job; each = each->next)
        before = each;
    if (each != NULL) {
        if (before != NULL)
            before->next = job->next;
        else
            mailbox->first = job->next;
        if (mailbox->last == job)
            mailbox->last = before;
        coopos_job_part(job);
    }
    coopos_pool_unlock();
    return each != NULL;
}

/* ---- workers ---- */

/* With the lock held: a job is over. The caller makes the closes in *closing* once it has released the lock. */
static inline void coopos_job_arrive(struct coopos_job *job, struct coopos_closing **closing)
{
    struct coopos_mailbox *mailbox = job->mailbox;
    closing[0] = job->closing[0];
    closing[1] = job->closing[1];
    job->closing[0] = job->closing[1] = NULL;
    job->state = COOPOS_DONE;
    coopos_pool.begun--;
    if (!job->waits_for_peer)
        coopos_pool.at_disks--;
    if (mailbox->is_shut) {
        coopos_job_part(job);
        return;
    }
    job->next = NULL;
    if (mailbox->last != NULL)
        mailbox->last->next = job;
    else
        mailbox->first = job;
    mailbox->last = job;
    (void)coopos_bell_ring(mailbox->bell);
}

/* With the lock held: the next job in the queue for the disks, or NULL if there is none or no room. */
static inline struct coopos_job *coopos_pool_next(void)
{
    struct coopos_job *job = coopos_pool.first;
    if (job == NULL || coopos_pool.at_disks >= coopos_pool.limit)
        return NULL;
    coopos_pool.first = job->next;
    if (coopos_pool.first == NULL)
        coopos_pool.last = NULL;
    return job;
}

/* With the lock held: from here on the job can't be taken back. */
static inline void coopos_job_begin(struct coopos_job *job)
{
    job->state = COOPOS_BEGUN;
    coopos_pool.begun++;
    if (!job->waits_for_peer)
        coopos_pool.at_disks++;
}

/* With the lock held: wait for a job. NULL: none came within COOPOS_LINGER_S. */
static inline struct coopos_job *coopos_worker_linger(struct coopos_worker *self)
{
    struct coopos_worker **link;
    struct timespec until;
    if (coopos_pool.is_ending)
        return NULL;
    self->job = NULL;
    self->next = coopos_pool.idle;
    coopos_pool.idle = self;
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += COOPOS_LINGER_S;
    while (self->job == NULL && !coopos_pool.is_ending)
        if (pthread_cond_timedwait(&self->has_job, &coopos_pool.lock, &until) == ETIMEDOUT)
            break;
    if (self->job == NULL)
        for (link = &coopos_pool.idle; *link != NULL; link = &(*link)->next)
            if (*link == self) {
                *link = self->next;
                break;
            }
    return self->job;
}

static inline void *coopos_worker_run(void *arg)
{
    struct coopos_worker self;
    struct coopos_job *job = arg;
    struct coopos_closing *closing[2];
    int signal, err;
    sigset_t none;
    (void)pthread_cond_init(&self.has_job, NULL);
    coopos_pool_lock();
    for (;;) {
        job->thread = pthread_self();
        job->has_thread = 1;
        signal = job->waits_for_peer ? job->signal : 0;
        while (coopos_pool.is_held && !job->is_interrupted)
            (void)pthread_cond_wait(&coopos_pool.is_let_go, &coopos_pool.lock);
        coopos_pool_unlock();
        err = signal ? coopos_signal_admit(signal, &none) : 0;
        if (err) {             /* nothing could interrupt it */
            job->rc = -1;
            job->err = err;
        }
        else
            do
                coopos_job_make(job);
            while (job->rc < 0 && job->err == EINTR && !__atomic_load_n(&job->is_interrupted, __ATOMIC_RELAXED));
        if (signal && !err)
            (void)pthread_sigmask(SIG_SETMASK, &none, NULL);
        coopos_pool_lock();
        if (job->rc >= 0 && job->claim != NULL)
            coopos_claim_got(job->claim);
        if (job->is_abandoned)
            coopos_job_undo(job);
        coopos_job_arrive(job, closing);
        if (closing[0] != NULL || closing[1] != NULL) {
            coopos_pool_unlock();
            coopos_closing_leave(closing[0]);
            coopos_closing_leave(closing[1]);
            coopos_pool_lock();
        }
        job = coopos_pool_next();
        if (job != NULL)
            coopos_job_begin(job);
        else if ((job = coopos_worker_linger(&self)) == NULL)
            break;
    }
    coopos_pool.threads--;
    coopos_pool_unlock();
    (void)pthread_cond_destroy(&self.has_job);
    return NULL;
}

/* With the lock held: give a job that has begun to a worker. 0 or an errno. */
static inline int coopos_pool_hand_over(struct coopos_job *job)
{
    struct coopos_worker *worker = coopos_pool.idle;
    pthread_t thread;
    int err;
    if (worker != NULL) {
        coopos_pool.idle = worker->next;
        worker->job = job;
        (void)pthread_cond_signal(&worker->has_job);
        return 0;
    }
    err = coopos_thread_start(&thread, coopos_worker_run, job);
    if (err == 0) {
        (void)pthread_detach(thread);
        coopos_pool.threads++;
    }
    return err;
}

/* Say what the job is to lock. 0: the descriptor is not open, or there is no memory. */
static inline int coopos_job_claim(struct coopos_job *job, struct coopos_range wanted)
{
    coopos_pool_lock();
    job->claim = coopos_claim_new(job->operation == COOPOS_FLOCK, job->fd, wanted);
    coopos_pool_unlock();
    return job->claim != NULL;
}

/* Record a lock that this process holds on the job's file. */
static inline void coopos_job_note_held(struct coopos_job *job, struct coopos_range range)
{
    coopos_pool_lock();
    coopos_claim_add(job->claim, range);
    coopos_pool_unlock();
}

/* Whether a job waits for any lock: only then locks have to be recorded. */
static inline int coopos_has_claims(void)
{
    int has_claims;
    coopos_pool_lock();
    has_claims = coopos_claims != NULL;
    coopos_pool_unlock();
    return has_claims;
}

static inline void coopos_locks_note(int is_flock, int fd, struct coopos_range range)
{
    coopos_pool_lock();
    coopos_claims_note(is_flock, fd, range);
    coopos_pool_unlock();
}

/* Queue the job or start it; it arrives in the mailbox when it is over. 0, or an errno: no thread can be started. */
static inline int coopos_job_submit(struct coopos_job *job, struct coopos_mailbox *mailbox)
{
    int err = 0;
    coopos_pool_lock();
    job->is_abandoned = job->is_interrupted = job->is_closed = job->is_undone = job->has_thread = 0;
    job->signal = job->waits_for_peer ? coopos_signal_take() : 0;
    if (!job->waits_for_peer && coopos_pool.at_disks >= coopos_pool.limit) {
        job->state = COOPOS_QUEUED;
        job->next = NULL;
        if (coopos_pool.last != NULL)
            coopos_pool.last->next = job;
        else
            coopos_pool.first = job;
        coopos_pool.last = job;
    }
    else {
        coopos_job_begin(job);
        err = coopos_pool_hand_over(job);
        if (err) {
            job->state = COOPOS_IDLE;
            coopos_pool.begun--;
            if (!job->waits_for_peer)
                coopos_pool.at_disks--;
        }
    }
    if (err == 0) {
        job->mailbox = mailbox;
        mailbox->refs++;
        job->refs++;
    }
    coopos_pool_unlock();
    return err;
}

/* Set the limit, and begin the jobs that have room now. */
static inline void coopos_pool_set_limit(int limit)
{
    struct coopos_job *job;
    coopos_pool_lock();
    coopos_pool.limit = limit;
    while ((job = coopos_pool_next()) != NULL) {
        coopos_job_begin(job);
        if (coopos_pool_hand_over(job)) {
            coopos_pool.begun--;
            coopos_pool.at_disks--;
            job->state = COOPOS_QUEUED;
            job->next = coopos_pool.first;
            coopos_pool.first = job;
            if (coopos_pool.last == NULL)
                coopos_pool.last = job;
            break;
        }
    }
    coopos_pool_unlock();
}

static inline void coopos_pool_hold(int is_held)
{
    coopos_pool_lock();
    coopos_pool.is_held = is_held;
    (void)pthread_cond_broadcast(&coopos_pool.is_let_go);
    coopos_pool_unlock();
}

/* How many jobs wait until fewer use the disks. */
static inline int coopos_pool_queued(void)
{
    struct coopos_job *each;
    int n = 0;
    coopos_pool_lock();
    for (each = coopos_pool.first; each != NULL; each = each->next)
        n++;
    coopos_pool_unlock();
    return n;
}

/* Take a job out of the queue; whether it was there. Then it is not made, and does not arrive. */
static inline int coopos_job_take_back(struct coopos_job *job)
{
    struct coopos_job *before = NULL, *each;
    int was_queued;
    coopos_pool_lock();
    was_queued = job->state == COOPOS_QUEUED;
    if (was_queued) {
        for (each = coopos_pool.first; each != job; each = each->next)
            before = each;
        if (before != NULL)
            before->next = job->next;
        else
            coopos_pool.first = job->next;
        if (coopos_pool.last == job)
            coopos_pool.last = before;
        job->state = COOPOS_IDLE;
        coopos_job_part(job);
    }
    coopos_pool_unlock();
    return was_queued;
}

static inline enum coopos_state coopos_job_state(struct coopos_job *job)
{
    enum coopos_state state;
    coopos_pool_lock();
    state = job->state;
    coopos_pool_unlock();
    return state;
}

/* The number of a job's descriptor is being closed. Returns whether the job keeps it open: it has begun, and is not over. If it is over
 * and has not arrived, a result that is useless without the descriptor is undone now, while the number is still this file's.
 */
static inline int coopos_job_keep_open(struct coopos_job *job, int which, struct coopos_closing *closing, int is_useless)
{
    int has_to;
    coopos_pool_lock();
    has_to = job->state == COOPOS_BEGUN;
    if (has_to) {
        coopos_closing_enter(closing);
        job->closing[which] = closing;
        if (is_useless)
            job->is_abandoned = 1;
    }
    else if (job->state == COOPOS_DONE && is_useless)
        coopos_job_undo(job);
    job->is_closed |= has_to || job->state == COOPOS_DONE;
    coopos_pool_unlock();
    return has_to;
}

/* Make the system call of a job that waits for a peer fail with EINTR. The GIL is held, so this takes a moment at most: a call that
 * no signal interrupts is left to its worker. Returns whether the job is over.
 *
 * Not pthread_cancel(3): in glibc before 2.41 it also takes effect when the call has just succeeded, and its result is lost:
 * https://sourceware.org/bugzilla/show_bug.cgi?id=12683. A signal that comes before the thread is in its system call ends nothing,
 * so it is sent again.
 */
enum { COOPOS_INTERRUPT_US = 50, COOPOS_INTERRUPTS = 300 };

static inline int coopos_job_interrupt(struct coopos_job *job)
{
    struct timespec pause = {0, COOPOS_INTERRUPT_US * 1000L};
    int attempt, is_over = 0;
    /* Meanwhile the program may have installed a handler of its own. */
    const int attempts = job->signal && job->signal == coopos_signal_take() ? COOPOS_INTERRUPTS : 0;
    for (attempt = 0; attempt <= attempts && !is_over; attempt++) {
        if (attempt)
            (void)nanosleep(&pause, NULL);
        if (attempt > COOPOS_INTERRUPTS / 3)
            pause.tv_nsec = 1000000L;
        coopos_pool_lock();
        __atomic_store_n(&job->is_interrupted, 1, __ATOMIC_RELAXED);
        is_over = job->state != COOPOS_BEGUN;
        if (!is_over && job->has_thread && attempts)
            (void)pthread_kill(job->thread, job->signal);
        if (coopos_pool.is_held)
            (void)pthread_cond_broadcast(&coopos_pool.is_let_go);
        coopos_pool_unlock();
    }
    return is_over;
}

/* The greenlet is gone. If the job is over it is undone here, otherwise by its worker. */
static inline void coopos_job_abandon(struct coopos_job *job)
{
    coopos_pool_lock();
    if (job->state == COOPOS_DONE) {
        if (!job->is_closed || job->operation == COOPOS_OPEN)
            coopos_job_undo(job);
    }
    else
        job->is_abandoned = 1;
    coopos_pool_unlock();
}

/* ---- the process's end, and forks ---- */

/* At exit: wait for the jobs that use the disks, for about a second at most. */
static inline void coopos_pool_end(void)
{
    const struct timespec pause = {0, 1000000L};
    struct coopos_worker *worker;
    int attempt, is_over = 0;
    for (attempt = 0; attempt < 1000 && !is_over; attempt++) {
        coopos_pool_lock();
        coopos_pool.is_ending = 1;
        for (worker = coopos_pool.idle; worker != NULL; worker = worker->next)
            (void)pthread_cond_signal(&worker->has_job);
        is_over = coopos_pool.threads <= coopos_pool.begun - coopos_pool.at_disks && coopos_pool.at_disks == 0;
        coopos_pool_unlock();
        if (!is_over)
            (void)nanosleep(&pause, NULL);
    }
}

static inline void coopos_pool_in_child(void)
{
    static const pthread_mutex_t unlocked = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t nobody = PTHREAD_COND_INITIALIZER;
    coopos_pool.lock = unlocked;
    coopos_pool.is_let_go = nobody;
    coopos_pool.idle = NULL;
    coopos_pool.first = coopos_pool.last = NULL;
    coopos_pool.at_disks = coopos_pool.threads = coopos_pool.begun = coopos_pool.is_held = 0;
    coopos_claims_in_child();
}

/* The lock is held during a fork, so that no job is half changed in the child. */
static inline int coopos_pool_hear_of_forks(void)
{
    return pthread_atfork(coopos_pool_lock, coopos_pool_unlock, coopos_pool_in_child);
}

/* In a forked child, which has no workers: make the job its owner's alone. Returns the state that it had. */
static inline enum coopos_state coopos_job_orphan(struct coopos_job *job)
{
    enum coopos_state state = job->state;
    if (!coopos_mailbox_recall(job) && job->mailbox != NULL)
        coopos_job_part(job);
    job->state = COOPOS_IDLE;
    job->closing[0] = job->closing[1] = NULL;
    return state;
}

#endif
