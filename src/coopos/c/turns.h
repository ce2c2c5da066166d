/* Whether a greenlet that never has to wait has kept the hub from running for too long. The state is one for each thread.

   A turn is due if nothing says that the hub has run for COOPOS_TURN_US. That it ran is known from the waits of coopos. It may run
   for others' waits, too: so a ready call asks the loop after COOPOS_ASK_US to tell when it has polled, and if it hasn't after as long
   again, a turn is due already. */

#ifndef COOPOS_TURNS_H
#define COOPOS_TURNS_H

#include "system.h"

/* The coarse clock costs a few nanoseconds. It goes on in steps of 1 to 10 ms (CONFIG_HZ), and may be some milliseconds late. So it
   only tells when to look at the exact one. */
enum { COOPOS_ASK_US = 3000, COOPOS_TURN_US = 10000 };

enum coopos_turn { COOPOS_NO_TURN, COOPOS_ASK_LOOP, COOPOS_TURN_IS_DUE };

static _Thread_local struct {
    long long since_us;        /* when the hub ran last, or the loop was asked; 0 before the first call */
    long long seen_us;         /* what the coarse clock said at the last call */
    int calls;                 /* how many ready calls there were since the caller waited */
    int is_asked;
} coopos_ready;

/* The caller has waited: the hub has run. */
static inline void coopos_has_waited(void)
{
    coopos_ready.calls = 0;
    coopos_ready.since_us = coopos_coarse_now_us();
}

/* The hub runs now, or has run. */
static inline void coopos_turn_taken(void)
{
    coopos_ready.since_us = coopos_now_us();
    coopos_ready.calls = coopos_ready.is_asked = 0;
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
    now_us = coopos_now_us();
    passed_us = coopos_ready.since_us ? now_us - coopos_ready.since_us : COOPOS_ASK_US;
    if (passed_us >= (coopos_ready.is_asked ? COOPOS_ASK_US : COOPOS_TURN_US))
        return COOPOS_TURN_IS_DUE;
    if (passed_us < COOPOS_ASK_US)
        return COOPOS_NO_TURN;
    coopos_ready.since_us = now_us;
    coopos_ready.is_asked = 1;
    return COOPOS_ASK_LOOP;
}

#endif
