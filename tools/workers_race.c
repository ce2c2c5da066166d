/* The workers (c/workers.h, closing.h, locks.h) under ThreadSanitizer: hubs that submit jobs, give them up, close their descriptors and
 * interrupt them, while the limit changes. sanitizers.py compiles it and runs it.
 *
 * What a hub does under the GIL in coopos it does here under the mutex *gil*. Races between hubs are thus none, and those between a hub
 * and a worker are found. With -DCOOPOS_PLANTED_RACE a hub looks at a job's state without the pool's lock; TSan has to report that.
 */
#define _GNU_SOURCE
#include <stdio.h>

#include "workers.h"

enum { HUBS = 3, JOBS = 10000, FILE_BYTES = 64 * 1024 };
enum ending { ARRIVES, GIVEN_UP, CLOSED, ENDINGS };

static pthread_mutex_t gil = PTHREAD_MUTEX_INITIALIZER;
static const char *path;
static sem_t semaphore;
static int is_over;
static int reached[COOPOS_RANDOM + 1][ENDINGS];

static void give_way(void)
{
    const struct timespec pause = {0, 20000};
    (void)pthread_mutex_unlock(&gil);
    (void)nanosleep(&pause, NULL);
    (void)pthread_mutex_lock(&gil);
}

static enum coopos_state state_of(struct coopos_job *job)
{
#ifdef COOPOS_PLANTED_RACE
    return job->state;
#else
    return coopos_job_state(job);
#endif
}

static void wait_for(struct coopos_mailbox *mailbox, struct coopos_job *job)
{
    while (state_of(job) != COOPOS_DONE)
        give_way();
    coopos_bell_hush(mailbox->bell);
    while (coopos_mailbox_take(mailbox) != NULL)
        ;
}

/* A job of a kind that *seed* picks, on a descriptor of its own. A pipe's other end goes to *peer*. */
static struct coopos_job *make_job(unsigned *seed, int *peer)
{
    static const enum coopos_operation kinds[] = {
        COOPOS_MOVE, COOPOS_MOVE, COOPOS_SETLK, COOPOS_FLOCK, COOPOS_SEM_WAIT, COOPOS_FSYNC, COOPOS_OPEN, COOPOS_RANDOM};
    enum coopos_operation kind = kinds[rand_r(seed) % 8];
    int reads_pipe = kind == COOPOS_MOVE && rand_r(seed) % 2, ends[2];
    struct coopos_job *job = coopos_job_new(kind == COOPOS_MOVE ? FILE_BYTES - rand_r(seed) % 4096 : kind == COOPOS_RANDOM ? 64 : 4096);
    if (job == NULL)
        abort();
    job->operation = kind;
    job->waits_for_peer = reads_pipe || kind == COOPOS_SETLK || kind == COOPOS_FLOCK || kind == COOPOS_SEM_WAIT;
    *peer = -1;
    if (reads_pipe) {
        if (pipe2(ends, O_CLOEXEC) < 0)
            abort();
        job->fd = ends[0];
        *peer = ends[1];
    }
    else if (kind != COOPOS_SEM_WAIT && kind != COOPOS_RANDOM)
        job->fd = kind == COOPOS_OPEN ? AT_FDCWD : open(path, O_RDWR | O_CLOEXEC);
    if (kind == COOPOS_MOVE)
        job->is_undoable = !reads_pipe;
    if (kind == COOPOS_OPEN) {
        job->flags = O_RDONLY | O_CLOEXEC;
        (void)strcpy(job->buf, path);
    }
    if (kind == COOPOS_FLOCK)
        job->flags = LOCK_EX;
    if (kind == COOPOS_SETLK || kind == COOPOS_FLOCK) {
        off_t start = rand_r(seed) % 8;
        if (!coopos_job_claim(job, coopos_range_of(F_WRLCK, start, 1 + rand_r(seed) % 4)))
            abort();
        coopos_job_note_held(job, coopos_range_of(F_RDLCK, start, 1));
        coopos_locks_note(kind == COOPOS_FLOCK, job->fd, coopos_range_of(F_RDLCK, start + 1, 1));
    }
    if (kind == COOPOS_SEM_WAIT)
        job->semaphore = &semaphore;
    return job;
}

/* As give_up() in workers.pxi does, when a greenlet is killed. */
static void give_up(struct coopos_mailbox *mailbox, struct coopos_job *job)
{
    if (coopos_job_take_back(job))
        return;
    if (job->waits_for_peer)
        (void)coopos_job_interrupt(job);
    coopos_job_abandon(job);
    if (!coopos_mailbox_recall(job))
        wait_for(mailbox, job);
}

/* As close() in closing.pxi does. */
static void close_under(struct coopos_mailbox *mailbox, struct coopos_job *job)
{
    const int is_useless = job->waits_for_peer && job->operation != COOPOS_MOVE;
    struct coopos_closing *closing = coopos_closing_new(job->fd);
    int is_taken_back;
    if (closing == NULL)
        abort();
    is_taken_back = coopos_job_take_back(job);
    if (!is_taken_back && coopos_job_keep_open(job, 0, closing, is_useless) && job->waits_for_peer)
        (void)coopos_job_interrupt(job);
    coopos_closing_leave(closing);
    coopos_closing_drop(closing);
    if (!is_taken_back)
        wait_for(mailbox, job);
    job->fd = -1;
}

static void *run_hub(void *arg)
{
    unsigned seed = (unsigned)(size_t)arg;
    struct coopos_mailbox *mailbox;
    struct coopos_job *job;
    enum ending ending;
    int i, peer;
    (void)pthread_mutex_lock(&gil);
    if ((mailbox = coopos_mailbox_new()) == NULL)
        abort();
    for (i = 0; i < JOBS; i++) {
        job = make_job(&seed, &peer);
        ending = rand_r(&seed) % ENDINGS;
        if (ending == CLOSED && job->fd < 0)
            ending = GIVEN_UP;
        if (coopos_job_submit(job, mailbox))
            abort();
        reached[job->operation][ending]++;
        if (rand_r(&seed) % 2)
            give_way();
        if (job->operation == COOPOS_SEM_WAIT && ending == ARRIVES)
            (void)sem_post(&semaphore);
        if (peer >= 0 && ending == ARRIVES && write(peer, "x", 1) != 1)
            abort();
        if (ending == ARRIVES)
            wait_for(mailbox, job);
        else if (ending == GIVEN_UP)
            give_up(mailbox, job);
        else
            close_under(mailbox, job);
        if (job->operation == COOPOS_OPEN && ending == ARRIVES)
            (void)close((int)job->rc);
        if (job->fd >= 0)
            (void)close(job->fd);
        if (peer >= 0)
            (void)close(peer);
        coopos_job_free(job);
    }
    coopos_mailbox_shut(mailbox);
    (void)pthread_mutex_unlock(&gil);
    return NULL;
}

static void *change_limit(void *arg)
{
    int limit = 0;
    (void)arg;
    (void)pthread_mutex_lock(&gil);
    while (!is_over) {
        coopos_pool_set_limit(1 + limit++ % 3);
        give_way();
    }
    (void)pthread_mutex_unlock(&gil);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t hubs[HUBS], changer;
    int i, ending;
    char bytes[FILE_BYTES] = {0};
    int fd = argc < 2 ? -1 : open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    path = argv[1];
    if (fd < 0 || write(fd, bytes, sizeof bytes) != (ssize_t)sizeof bytes || sem_init(&semaphore, 0, 0))
        return 2;
    for (i = 0; i < HUBS; i++)
        if (pthread_create(&hubs[i], NULL, run_hub, (void *)(size_t)(i + 1)))
            return 2;
    if (pthread_create(&changer, NULL, change_limit, NULL))
        return 2;
    for (i = 0; i < HUBS; i++)
        (void)pthread_join(hubs[i], NULL);
    (void)pthread_mutex_lock(&gil);
    is_over = 1;
    (void)pthread_mutex_unlock(&gil);
    (void)pthread_join(changer, NULL);
    coopos_pool_end();
    for (i = 0; i <= COOPOS_RANDOM; i++)
        for (ending = 0; ending < ENDINGS; ending++)
            if (reached[i][ending])
                (void)printf("operation %d, ending %d: %d jobs\n", i, ending, reached[i][ending]);
    return 0;
}
