/* The low-latency calls between nodes (docs/low_latency.md, csrc/rdma/low_latency.cu): puts, flags and their answers.

   2 ranks, each a node, with one token each way; two sets, ROUNDS rounds in each of which both sets carry a dispatch and then none,
   one or two combines of it, in the first round one: of both sets all is sent before any is received, and each rank
   receives in an order of its own. After the first round all begin anew, as clean_low_latency_buffer does. A rank is a sequence of
   kernels on one stream; the network is a process for every queue pair, and reads what it puts when it delivers it.

   Not modelled: peers of the same node, deadlines and masks. Broken on purpose: EARLY_FLAG, LATE_FLAG, NO_TAKEN, NO_PULLED. */
#ifndef ROUNDS
#define ROUNDS 3
#endif
#define PAIRS 2 /* queue pairs of a rank */
#define PEER (1 - r)
#define OWN(set) (r * 2 + (set))
#define THERE(set) (PEER * 2 + (set))

mtype = { ROW, LIST, PUSH, SENT, TAKEN, SHOWN, PULLED };

byte own_slot[4];    /* of each rank and set: what is put to its peer's slot */
byte outgoing[2];    /* of each rank: the list, for both sets */
byte slot[4], list[4], came[4]; /* what the peer has put here */
bool unread[4], unsummed[4];
byte rows[4];        /* its experts' rows, copied */
byte sent[4], taken[4], shown[4], pulled[4];
byte leaving[2];     /* puts and signals of a rank that have not arrived */
byte waiting[2];     /* barriers that a rank has come to */
byte combines[ROUNDS + 1]; /* of a round's dispatches */

chan net[2 * PAIRS] = [4] of { mtype, byte, byte }; /* what, set, a flag's value */

proctype Network(byte r; byte pair) /* ends with its rank */
{
    byte set, value;
end:
    do
    :: atomic { net[r * PAIRS + pair] ? ROW, set, value ->
        assert(!unread[THERE(set)]); /* a slot is overwritten before it was read */
        slot[THERE(set)] = own_slot[OWN(set)]; unread[THERE(set)] = true; leaving[r]-- }
    :: atomic { net[r * PAIRS + pair] ? LIST, set, value -> list[THERE(set)] = outgoing[r]; leaving[r]-- }
    :: atomic { net[r * PAIRS + pair] ? PUSH, set, value ->
        assert(!unsummed[THERE(set)]); /* likewise a row that has come back */
        came[THERE(set)] = rows[OWN(set)]; unsummed[THERE(set)] = true; leaving[r]-- }
    :: atomic { net[r * PAIRS + pair] ? SENT, set, value -> sent[THERE(set)] = value; leaving[r]-- }
    :: atomic { net[r * PAIRS + pair] ? TAKEN, set, value -> taken[THERE(set)] = value; leaving[r]-- }
    :: atomic { net[r * PAIRS + pair] ? SHOWN, set, value -> shown[THERE(set)] = value; leaving[r]-- }
    :: atomic { net[r * PAIRS + pair] ? PULLED, set, value -> pulled[THERE(set)] = value; leaving[r]-- }
    od
}

inline leave(pair, what, set, value) { atomic { leaving[r]++; net[r * PAIRS + pair] ! what, set, value } }

inline tell(what, set, number) /* finish_puts, then set_flag over any block's queue pair */
{
#ifndef EARLY_FLAG
    (leaving[r] == 0);
#endif
    if
    :: leave(0, what, set, number)
    :: leave(1, what, set, number)
    fi;
#ifndef LATE_FLAG
    (leaving[r] == 0)
#else
    skip
#endif
}

inline dispatch_send(set)
{
#ifndef NO_TAKEN
    (taken[OWN(set)] >= dispatch - 1);
#endif
    own_slot[OWN(set)] = round;
    outgoing[r] = round * 2 + set;
    leave(0, ROW, set, 0);
    leave(1, LIST, set, 0);
    tell(SENT, set, dispatch)
}

inline dispatch_receive(set)
{
    (sent[OWN(set)] >= dispatch);
    atomic {
        assert(slot[OWN(set)] == round && list[OWN(set)] == round * 2 + set); /* read before it came */
        unread[OWN(set)] = false
    };
    tell(TAKEN, set, dispatch)
}

inline combine_send(set)
{
#ifndef NO_PULLED
    (pulled[OWN(set)] >= combine - 1);
#endif
    rows[OWN(set)] = value;
    assert(list[OWN(set)] == round * 2 + set); /* places of another dispatch */
    leave(1, PUSH, set, 0);
    tell(SHOWN, set, combine)
}

inline combine_receive(set)
{
    (shown[OWN(set)] >= combine);
    atomic {
        assert(came[OWN(set)] == value); /* summed before it came, or after */
        unsummed[OWN(set)] = false
    };
    tell(PULLED, set, combine)
}

inline barrier()
{
    waiting[r]++;
    (waiting[PEER] >= waiting[r])
}

/* Everything of this rank's has ended, and everyone's; then counters are 0. */
inline begin_anew()
{
    barrier();
    d_step {
        sent[OWN(0)] = 0; taken[OWN(0)] = 0; shown[OWN(0)] = 0; pulled[OWN(0)] = 0;
        sent[OWN(1)] = 0; taken[OWN(1)] = 0; shown[OWN(1)] = 0; pulled[OWN(1)] = 0;
        dispatch = 0;
        combine = 0
    };
    (waiting[PEER] >= waiting[r]);
    barrier()
}

proctype Rank(byte r)
{
    byte round = 1, dispatch = 0, combine = 0, value = 0, left;
    do
    :: round <= ROUNDS ->
        dispatch++;
        dispatch_send(0);
        dispatch_send(1);
        if
        :: dispatch_receive(0); dispatch_receive(1)
        :: dispatch_receive(1); dispatch_receive(0)
        fi;
        left = combines[round];
        do
        :: left > 0 ->
            combine++;
            value++;
            combine_send(0);
            combine_send(1);
            if
            :: combine_receive(0); combine_receive(1)
            :: combine_receive(1); combine_receive(0)
            fi;
            left--
        :: else -> break
        od;
        if
        :: round == 1 -> begin_anew()
        :: else
        fi;
        round++
    :: else -> break
    od;
    leaving[r] == 0
}

init
{
    byte round = 1;
    atomic {
        do
        :: round <= ROUNDS ->
            if
            :: round > 1 -> combines[round] = 0
            :: combines[round] = 1
            :: round > 1 -> combines[round] = 2
            fi;
            round++
        :: else -> break
        od;
        run Rank(0); run Rank(1);
        run Network(0, 0); run Network(0, 1); run Network(1, 0); run Network(1, 1)
    }
}
