/* The combine of docs/rdma.md between 2 nodes of 2 ranks, for `spin -a`. States named here are those of that page.
 *
 * Tokens of ranks 0 and 1 come back from node 1; the other way is the same and shares nothing with this one but that a rank
 * ends its rounds with both, which is left out: here ranks may run further ahead than they can. Stream s runs from the
 * forwarder, rank L + s, back to rank s.
 *
 * Checked: no deadlock, and by assertions: no slot is written before it was read, the forwarder sums the rows of its round
 * and no others, every token gets the sum of exactly its ranks once, in order.
 *
 * -D NO_CREDIT, EARLY_SIGNAL, NO_READY, NO_RELEASE, LOST_CREDIT break the protocol on purpose; each must be found.
 */
#define L 2
#ifndef ROUNDS
#define ROUNDS 3
#endif
#ifndef T /* tokens of a rank in a round */
#define T 2
#endif
#ifndef ANY /* ranks whose tokens may go anywhere; those of the others are fixed */
#define ANY 2
#endif
#ifndef W /* slots of a stream */
#define W 1
#endif

#define ROW(round, t) (1 + (round) * T + (t)) /* names a row of a stream; 0 is none */
#define MASK(s, round, t) ((round) % 2 * 3 ^ masks[(s) * T + (t)])
#define FOR(mask, l) (((mask) >> (l)) & 1)

/* In the memory of node 1's ranks. */
byte rows[L];          /* the round whose rows are in a rank's memory */
byte ready[L];         /* the round that it has announced */
byte released[L * L];  /* by rank and forwarder: the round whose rows are summed */
byte credit[L];        /* by stream: sums that the token's rank has read, over all rounds */
/* In the memory of the tokens' ranks, by stream. */
byte slot_row[L * W];
byte slot_sum[L * W];  /* whose rows are in it */
byte tail[L];          /* sums that have arrived, over all rounds */

byte masks[L * T];     /* what only the checks know: ranks of each token in even rounds; in odd rounds it is the others */
byte round_of[L];      /* rounds that a rank of node 1 has ended */
byte running[L];       /* its roles that are still at work */

inline end(l) {
    atomic {
        running[l]--;
        if
        :: running[l] == 0 -> running[l] = 2; round_of[l]++
        :: else
        fi
    }
}

/* Of rank L + l: has rows to combine, and writes new ones in the next round. */
proctype Owner(byte l) {
    byte round = 0;
    do
    :: round < ROUNDS ->
        round_of[l] == round;
        rows[l] = round + 1;
        ready[l] = round + 1; /* C1 */
#ifndef NO_RELEASE
        released[l * L] >= round + 1 && released[l * L + 1] >= round + 1;
#endif
        round++;
        end(l)
    :: else -> break
    od
}

/* Of rank L + s: sums for stream s. */
proctype Forwarder(byte s) {
    byte round = 0, t, l, sum, sent = 0;
    do
    :: round < ROUNDS ->
        round_of[s] == round;
#ifndef NO_READY
        ready[0] >= round + 1 && ready[1] >= round + 1;
#endif
        do
        :: t < T ->
            if
            :: MASK(s, round, t) == 0
            :: else ->
                do /* C2: by ascending rank */
                :: l < L && FOR(MASK(s, round, t), l) -> d_step { assert(rows[l] == round + 1); sum = sum | (1 << l); l++ }
                :: l < L && !FOR(MASK(s, round, t), l) -> l++
                :: else -> break
                od;
#ifdef NO_CREDIT
                true;
#else
                sent < credit[s] + W; /* C3: a free slot */
#endif
#ifdef EARLY_SIGNAL
                tail[s]++;
#endif
                d_step {
                    assert(slot_row[s * W + sent % W] == 0);
                    slot_row[s * W + sent % W] = ROW(round, t);
                    slot_sum[s * W + sent % W] = sum
                };
#ifdef EARLY_SIGNAL
                sent++;
#else
                d_step { tail[s]++; sent++ };
#endif
                l = 0; sum = 0
            fi;
            t++
        :: else -> break
        od;
        atomic { /* C5 */
            released[s] = round + 1;
            released[L + s] = round + 1;
            t = 0; round++
        };
        end(s)
    :: else -> break
    od
}

/* Of rank s: takes the sums of its tokens in order. */
proctype Tokens(byte s) {
    byte round = 0, t, read = 0;
    do
    :: round < ROUNDS ->
        do
        :: t < T ->
            if
            :: MASK(s, round, t) == 0
            :: else ->
                tail[s] > read; /* C4 */
                d_step {
                    assert(slot_row[s * W + read % W] == ROW(round, t));
                    assert(slot_sum[s * W + read % W] == MASK(s, round, t));
                    slot_row[s * W + read % W] = 0;
                    slot_sum[s * W + read % W] = 0;
                    read++
                };
#ifdef LOST_CREDIT
                if
                :: read != 2 -> credit[s]++
                :: else
                fi
#else
                credit[s]++
#endif
            fi;
            t++
        :: else -> break
        od;
        t = 0; round++
    :: else -> break
    od
}

init {
    atomic {
        byte r = 0, mask;
        do
        :: r < ANY * T -> select(mask : 0 .. 3); masks[r] = mask; r++
        :: r >= ANY * T && r < L * T -> masks[r] = (r % 2 -> 3 : 1); r++
        :: else -> break
        od;
        r = 0; mask = 0;
        do
        :: r < L -> running[r] = 2; run Owner(r); run Forwarder(r); run Tokens(r); r++
        :: else -> break
        od
    }
}
