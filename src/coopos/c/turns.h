/* Whether a greenlet that never has to wait has kept the hub from running for too long. The state is one for each thread.

   A ready call asks only a coarse clock. After COOPOS_TURN_US it has the loop tell when it has polled: if it has by the next question,
   the hub had its turn by itself. If it hasn't after COOPOS_TURN_US more, a turn is due. */

#ifndef COOPOS_TURNS_H
#define COOPOS_TURNS_H

#include "system.h"

/* The coarse clock goes on in steps of 1 to 10 ms (CONFIG_HZ), and may be some milliseconds late: it tells when to look at the exact
   one. So a turn is due 6 to 20 ms after the last, with 250 Hz 8. Even the coarse clock costs 2 % of a ready read, so as long as it
   stands still only one call in COOPOS_CALLS_A_LOOK looks at it. */
enum { COOPOS_TURN_US = 3000, COOPOS_CALLS_A_LOOK = 8 };

enum coopos_turn { COOPOS_NO_TURN, COOPOS_ASK_LOOP, COOPOS_TURN_IS_DUE };

static _Thread_local struct {
    long long since_us;        /* when the hub ran last, or the loop was asked */
    long long seen_us;         /* what the coarse clock said when a call looked last */
    int calls;                 /* how many ready calls there were since the caller waited */
    int unseen;                /* how many more don't look at the clock */
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

/* Count a ready call: a turn is due after max_calls of them, too. */
static inline enum coopos_turn coopos_count_ready_call(int max_calls)
{
    long long now_us;
    if (++coopos_ready.calls > max_calls)
        return COOPOS_TURN_IS_DUE;
    if (--coopos_ready.unseen > 0)
        return COOPOS_NO_TURN;
    now_us = coopos_coarse_now_us();
    if (now_us == coopos_ready.seen_us) {
        coopos_ready.unseen = COOPOS_CALLS_A_LOOK;
        return COOPOS_NO_TURN;
    }
    coopos_ready.seen_us = now_us;
    coopos_ready.unseen = 0;
    now_us = coopos_now_us();
    if (now_us - coopos_ready.since_us < COOPOS_TURN_US)
        return COOPOS_NO_TURN;
    if (coopos_ready.is_asked)
        return COOPOS_TURN_IS_DUE;
    coopos_ready.since_us = now_us;
    coopos_ready.is_asked = 1;
    return COOPOS_ASK_LOOP;
}

#endif
