/* Whether a greenlet that never has to wait has kept the hub from running for too long. The state is one for each thread.

   After COOPOS_ASK_US a ready call has the loop tell when it has polled: the hub may run for anybody's waits. A turn is due if it
   hasn't after COOPOS_TURN_US more. A call that has given the hub a turn asks again at once, for the next call. */

#ifndef COOPOS_TURNS_H
#define COOPOS_TURNS_H

#include "system.h"

/* The coarse clock costs a few nanoseconds. It goes on in steps of 1 to 10 ms (CONFIG_HZ), and may be some milliseconds late. So it
   only tells when to look at the exact one. */
enum { COOPOS_ASK_US = 3000, COOPOS_TURN_US = 7000 };

enum coopos_turn { COOPOS_NO_TURN, COOPOS_ASK_LOOP, COOPOS_TURN_IS_DUE };

static _Thread_local struct {
    long long since_us;        /* when the hub ran last, or the loop was asked */
    long long seen_us;         /* what the coarse clock said at the last call */
    int calls;                 /* how many ready calls there were since the caller waited */
    int is_asked;
} coopos_ready;

/* The caller waits: others run now. */
static inline void coopos_forget_ready_calls(void)
{
    coopos_ready.calls = 0;
}

/* The hub runs now, or has run. */
static inline void coopos_turn_taken(void)
{
    coopos_ready.since_us = coopos_now_us();
    coopos_ready.calls = coopos_ready.is_asked = 0;
}

/* The loop is going to tell. */
static inline void coopos_loop_asked(void)
{
    coopos_ready.since_us = coopos_now_us();
    coopos_ready.is_asked = 1;
}

/* Count a ready call: a turn is due after max_calls of them, too. */
static inline enum coopos_turn coopos_count_ready_call(int max_calls)
{
    long long now_us, passed_us;
    if (++coopos_ready.calls > max_calls)
        return COOPOS_TURN_IS_DUE;
    now_us = coopos_coarse_now_us();
    if (now_us == coopos_ready.seen_us)
        return COOPOS_NO_TURN;
    coopos_ready.seen_us = now_us;
    passed_us = coopos_now_us() - coopos_ready.since_us;
    if (coopos_ready.is_asked)
        return passed_us >= COOPOS_TURN_US ? COOPOS_TURN_IS_DUE : COOPOS_NO_TURN;
    return passed_us >= COOPOS_ASK_US ? COOPOS_ASK_LOOP : COOPOS_NO_TURN;
}

#endif
