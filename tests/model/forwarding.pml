/* The dispatch of docs/rdma.md between 2 nodes of 2 ranks, for `spin -a`. States named here are those of that page.
 *
 * What is checked: no deadlock (spin's invalid end states), and by assertions: no slot is written before it was read, no
 * row is stored before its receiver opened the tensor, every row is in its final place once when the receiver ends.
 *
 * Rank r is local rank r % L of node r / L; stream r runs from rank r to the forwarder r % L of the other node. Rows for the
 * sender's own node take no slot and no part here. Rounds follow each other on a rank, without a barrier among ranks.
 *
 * -D NO_CREDIT, EARLY_SIGNAL, ONE_COUNT_SLOT, NO_OPEN, NO_DONE, LOST_CREDIT break the protocol on purpose; each must be found.
 */
#define L 2
#define R 4
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef T /* tokens of a rank in a round */
#define T 2
#endif
#ifndef W /* slots of a stream */
#define W 1
#endif
#ifndef ANY /* ranks whose tokens may go anywhere; those of the others are fixed */
#define ANY 2
#endif
#ifdef ONE_COUNT_SLOT
#define COUNT_SLOT(round) 0
#else
#define COUNT_SLOT(round) ((round) % 2)
#endif

#define OTHER(r) (L - (r) / L * L)              /* the first rank of the other node */
#define ROW(r, round, t) (1 + (r) * T * ROUNDS + (round) * T + (t)) /* names a row; 0 is none */
#define MASK(r, round, t) ((round) % 2 * 3 ^ masks[(r) * T + (t)])
#define FOR(mask, l) (((mask) >> (l)) & 1)

/* In the forwarder's memory, by stream. */
byte counts[R * 2 * L];   /* rows for each rank of the node, by slot */
byte counted[R * 2];      /* the round that they are of, counted from 1 */
byte slot_row[R * W];
byte slot_mask[R * W];
byte tail[R];             /* rows that have arrived, over all rounds */
/* In the sender's memory, by stream. */
byte credit[R];           /* rows that the forwarder has read, over all rounds */
/* In the receiver's memory. */
byte known[R * L];        /* by forwarder: the round that its counts are of */
byte number[R * L];       /* the counts themselves */
byte opened[R];           /* the round for which the tensor is there */
byte first[R * L];        /* where the rows of each forwarder begin */
byte place[R * L * T];    /* the tensor */
byte arrived[R * L];         /* by forwarder: the round whose rows are all in place */

/* What only the checks know. */
byte masks[R * T];        /* which ranks each token of the even rounds is for; in the odd rounds it is for the others */
byte round_of[R];         /* rounds that a rank has ended */
byte running[R];          /* its roles that are still at work in this round */

/* With ONE_WAY only rows from node 0 to node 1 are modelled. Of the other way remains that a rank of node 0 ends a round after
 * both ranks of node 1 have begun it: its own rows come from them. That is less than it really waits for, so that nothing
 * possible is left out. */
inline begin(r, round) {
#ifdef ONE_WAY
    round_of[r] == round && (r >= L || round == 0 || (round_of[L] >= round - 1 && round_of[L + 1] >= round - 1))
#else
    round_of[r] == round
#endif
}
#ifdef ONE_WAY
#define ROLES(r) ((r) < L -> 1 : 2)
#else
#define ROLES(r) 3
#endif
inline end(r) {
    atomic {
        running[r]--;
        if
        :: running[r] == 0 -> running[r] = ROLES(r); round_of[r]++
        :: else
        fi
    }
}

/* Counts, then rows, each put before its signal. */
proctype Sender(byte r) {
    byte round = 0, t, sent = 0;
    do
    :: round < ROUNDS ->
        begin(r, round);
        d_step { /* S1: counts to the forwarder; they fit into one message */
            counts[(r * 2 + COUNT_SLOT(round)) * L] = 0;
            counts[(r * 2 + COUNT_SLOT(round)) * L + 1] = 0;
            t = 0;
            do
            :: t < T ->
                counts[(r * 2 + COUNT_SLOT(round)) * L] = counts[(r * 2 + COUNT_SLOT(round)) * L] + FOR(MASK(r, round, t), 0);
                counts[(r * 2 + COUNT_SLOT(round)) * L + 1] = counts[(r * 2 + COUNT_SLOT(round)) * L + 1] + FOR(MASK(r, round, t), 1);
                t++
            :: else -> break
            od;
            assert(counted[r * 2 + COUNT_SLOT(round)] + 2 > round); /* else the slot was still to be read */
            counted[r * 2 + COUNT_SLOT(round)] = round + 1;
            t = 0
        };
        do
        :: t < T ->
            if
            :: MASK(r, round, t) == 0
            :: else ->
#ifndef NO_CREDIT
                sent < credit[r] + W; /* S2: a free slot */
#endif
#ifdef EARLY_SIGNAL
                tail[r]++;
#endif
                d_step { /* S3: the row is put */
                    assert(slot_row[r * W + sent % W] == 0);
                    slot_row[r * W + sent % W] = ROW(r, round, t);
                    slot_mask[r * W + sent % W] = MASK(r, round, t)
                };
#ifndef EARLY_SIGNAL
                d_step { tail[r]++; sent++ } /* S4: and signalled */
#else
                sent++
#endif
            fi;
            t++
        :: else -> break
        od;
        t = 0; round++;
        end(r)
    :: else -> break
    od
}

/* Of rank f, for the stream of its rail from the other node. */
proctype Forwarder(byte f) {
    byte round = 0, s = OTHER(f) + f % L, l, left, read = 0, row, mask, node = f / L * L, to, at0, at1;
    do
    :: round < ROUNDS ->
        begin(f, round);
        counted[s * 2 + COUNT_SLOT(round)] >= round + 1; /* F1: counts */
        d_step {
            assert(counted[s * 2 + COUNT_SLOT(round)] == round + 1); /* not those of a later round */
            left = 0; l = 0;
            do
            :: l < T -> left = left + (MASK(s, round, l) != 0); l++
            :: else -> break
            od;
            l = 0
        };
        d_step { /* F2: to every rank of the node */
            number[node * L + f % L] = counts[(s * 2 + COUNT_SLOT(round)) * L];
            number[(node + 1) * L + f % L] = counts[(s * 2 + COUNT_SLOT(round)) * L + 1];
            known[node * L + f % L] = round + 1;
            known[(node + 1) * L + f % L] = round + 1
        };
#ifndef NO_OPEN
        opened[node] >= round + 1 && opened[node + 1] >= round + 1; /* F3: the tensors are there, and so are the rows' places */
#endif
        at0 = first[node * L + f % L]; at1 = first[(node + 1) * L + f % L]; l = 0;
        do
        :: left > 0 ->
            tail[s] > read; /* F4: a row */
            d_step {
                row = slot_row[s * W + read % W];
                mask = slot_mask[s * W + read % W];
                assert(row != 0)
            };
            if
            :: FOR(mask, 0) ->
                d_step { assert(opened[node] == round + 1 && place[node * L * T + at0] == 0); place[node * L * T + at0] = row; at0++ }
            :: else
            fi;
            if
            :: FOR(mask, 1) ->
                d_step { assert(opened[node + 1] == round + 1 && place[(node + 1) * L * T + at1] == 0); place[(node + 1) * L * T + at1] = row; at1++ }
            :: else
            fi;
            d_step { /* F5: read to the end, the slot is free */
                assert(slot_row[s * W + read % W] == row);
                slot_row[s * W + read % W] = 0;
                slot_mask[s * W + read % W] = 0;
                read++; left--; row = 0; mask = 0
            };
#ifdef LOST_CREDIT
            if
            :: read != 2 -> credit[s]++
            :: else
            fi
#else
            credit[s]++
#endif
        :: else -> break
        od;
        atomic { /* F6: all of mine are in place */
            arrived[node * L + f % L] = round + 1;
            arrived[(node + 1) * L + f % L] = round + 1;
            at0 = 0; at1 = 0; round++
        };
        end(f)
    :: else -> break
    od
}

/* Of rank r: makes the tensor, waits for its rows, reads it. */
proctype Receiver(byte r) {
    byte round = 0, l, t, at, s;
    do
    :: round < ROUNDS ->
        begin(r, round);
        known[r * L] >= round + 1 && known[r * L + 1] >= round + 1; /* R1: all counts */
        d_step { /* R2: they fix every place; open */
            first[r * L] = 0;
            first[r * L + 1] = number[r * L];
            opened[r] = round + 1
        };
#ifndef NO_DONE
        arrived[r * L] >= round + 1 && arrived[r * L + 1] >= round + 1; /* R3: everything has come */
#endif
        d_step { /* every row once, by (source rank, token) */
            l = 0; at = 0;
            do
            :: l < L ->
                s = OTHER(r) + l; t = 0;
                do
                :: t < T ->
                    if
                    :: FOR(MASK(s, round, t), r % L) ->
                        assert(place[r * L * T + at] == ROW(s, round, t));
                        place[r * L * T + at] = 0; at++
                    :: else
                    fi;
                    t++
                :: else -> break
                od;
                l++
            :: else -> break
            od;
            do
            :: at < L * T -> assert(place[r * L * T + at] == 0); at++
            :: else -> break
            od;
            l = 0; t = 0; at = 0; s = 0; round++
        };
        end(r)
    :: else -> break
    od
}

init {
    atomic {
        byte r = 0, mask;
        do
        :: r < ANY * T -> select(mask : 0 .. 3); masks[r] = mask; r++
        :: r >= ANY * T && r < R * T -> masks[r] = (r % 2 -> 3 : 1); r++
        :: else -> break
        od;
        r = 0; mask = 0;
        do
        :: r < R ->
            running[r] = ROLES(r);
#ifdef ONE_WAY
            if
            :: r < L -> run Sender(r)
            :: else -> run Forwarder(r); run Receiver(r)
            fi;
#else
            run Sender(r); run Forwarder(r); run Receiver(r);
#endif
            r++
        :: else -> break
        od
    }
}
