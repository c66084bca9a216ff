/* The rdma engine's protocol (docs/rdma.md, csrc/rdma/rail.cu): exchanges along the rail into fixed slots, and operations of the
   nvlink engine within the node.

   2 nodes x 2 ranks, T tokens a rank, ROUNDS rounds of a dispatch and a combine with nothing between them. Rank r is on node
   r / 2; its rail leads to r ^ 2, its node's other rank is r ^ 1. A rank is a sequence of kernels on one stream; the network is a
   process for every queue pair, and reads what it puts when it delivers it. docs/rdma.md says what is not modelled.

   ANY=n: the first n tokens of rank 0 go to any ranks, so that it may send nothing; the others' routing is fixed. Broken on
   purpose: NO_READY, ONE_SLOT, EARLY_SIGNAL, NO_QUIET, NO_ARRIVED, NO_MEETING, NO_FINISH, NO_RELEASE. */
#ifndef T
#define T 2
#endif
#ifndef ROUNDS
#define ROUNDS 2
#endif
#ifndef ANY
#define ANY 1
#endif
#define R 4
#define PAIRS 2 /* queue pairs of a rank */
#define RAIL(r) ((r) ^ 2)
#define MATE(r) ((r) ^ 1)
#define OF_NODE(mask, r) (((mask) >> ((r) & 2)) & 3) /* which ranks of r's node, as bits */
#ifdef ONE_SLOT
#define SLOT(r) ((r) * 2)
#else
#define SLOT(r) ((r) * 2 + number % 2)
#endif
#define VALUE(source, t, round) (1 + (source) * T + (t) + R * T * ((round) - 1))
#define SUM 128 /* added to the value of a row that comes back */

byte goes[R * T];        /* ranks of each token, as bits */
byte send[R * 2 * T];    /* of each rank: T slots for the rail, T for sums of its own tokens */
byte recv[R * T];        /* of each rank: a slot for every row that may come */
bool unread[R * T];      /* it has come and not been read */
byte ready[R * 2];       /* what the rail says of its exchange: two slots, in turns */
byte arrived[R], leaving[R];
byte met[R], finished[R];    /* by the node's other rank: the operation it is in, and has finished */
byte opened[R];          /* whose tensor may be written to */
byte place[R * R * T];   /* of each rank's tensor: what lies in the place of (source, token) */
byte shown[R];           /* the round whose rows may be pulled */

chan net[R * PAIRS] = [T] of {byte, byte}; /* slot there, slot here */

#define DELIVER \
    assert(!unread[RAIL(r) * T + there]); /* a slot is overwritten before it was read */ \
    recv[RAIL(r) * T + there] = send[r * 2 * T + here]; \
    unread[RAIL(r) * T + there] = true; \
    leaving[r]--

proctype Network(byte r; byte pair) /* ends with its rank */
{
    byte there, here;
end:
    do
#ifdef EARLY_SIGNAL
    :: net[r * PAIRS + pair] ? [there, here] ->
        arrived[RAIL(r)]++;
        d_step { net[r * PAIRS + pair] ? there, here; DELIVER }
#else
    /* A row and its signal at once: nobody looks at a row before its signal. */
    :: d_step { net[r * PAIRS + pair] ? there, here -> DELIVER; arrived[RAIL(r)]++ }
#endif
    od
}

/* A launch of rail_kernel: what it does first, */
inline say_ready()
{
    number++;
    ready[SLOT(RAIL(r))] = number
}

/* then, in a dispatch, */
inline pack()
{
    d_step {
        t = 0;
        slot = 0;
        do
        :: t < T ->
            if
            :: OF_NODE(goes[r * T + t], RAIL(r)) != 0 -> send[r * 2 * T + slot] = VALUE(r, t, round); slot++
            :: else
            fi;
            t++
        :: else -> break
        od;
        t = 0
    }
}

/* and then: `count` rows leave, `expected` come. */
inline exchange(count, expected)
{
#ifndef NO_READY
    (ready[SLOT(r)] >= number);
    assert(ready[SLOT(r)] == number); /* what it said of this exchange is gone before it was read */
#endif
    slot = 0;
    do
    :: slot < count -> atomic { leaving[r]++; net[r * PAIRS + slot % PAIRS] ! slot, slot }; slot++
    :: else -> break
    od;
#ifndef NO_QUIET
    (leaving[r] == 0);
#endif
#ifndef NO_ARRIVED
    (arrived[r] == seen + expected);
#endif
    d_step { seen = seen + expected; slot = 0 }
}

/* Every row that this rank forwards or sums: `source` with token t, in recv at `slot`, or its own, where slot is T + t. */
#define EACH_ROW(body) \
    t = 0; \
    slot = 0; \
    do \
    :: t < T -> \
        if \
        :: OF_NODE(goes[RAIL(r) * T + t], r) != 0 -> source = RAIL(r); at = slot; body; slot++ \
        :: else \
        fi; \
        if \
        :: OF_NODE(goes[r * T + t], r) != 0 -> source = r; at = T + t; body \
        :: else \
        fi; \
        t++ \
    :: else -> break \
    od; \
    t = 0; \
    slot = 0; \
    source = 0; \
    at = 0

#define STORE(rank) \
    if \
    :: (goes[source * T + t] >> (rank)) & 1 -> \
        assert(opened[rank] == operation); /* stored where no tensor is */ \
        assert(place[(rank) * R * T + source * T + t] == 0); /* twice */ \
        place[(rank) * R * T + source * T + t] = VALUE(source, t, round) \
    :: else \
    fi

#define FORWARD \
    if \
    :: source != r -> \
        assert(recv[r * T + at] == VALUE(source, t, round)); /* forwarded before it came */ \
        unread[r * T + at] = false \
    :: else \
    fi; \
    STORE(r); \
    STORE(MATE(r))

#define PULL(rank) \
    if \
    :: (goes[source * T + t] >> (rank)) & 1 -> assert(shown[rank] == round) /* summed before it is there, or after */ \
    :: else \
    fi

#define ADD_UP \
    PULL(r); \
    PULL(MATE(r)); \
    send[r * 2 * T + at] = SUM + VALUE(source, t, round)

inline meet()
{
    met[MATE(r)] = operation;
#ifndef NO_MEETING
    (met[r] >= operation);
#endif
}

inline finish()
{
    finished[MATE(r)] = operation;
#ifndef NO_FINISH
    (finished[r] >= operation);
#endif
}

proctype Rank(byte r)
{
    byte round = 1, number = 0, operation = 0, seen = 0, leave = 0, come = 0, t = 0, slot = 0, source = 0, at = 0;
    d_step {
        do
        :: t < T ->
            leave = leave + (OF_NODE(goes[r * T + t], RAIL(r)) != 0 -> 1 : 0);
            come = come + (OF_NODE(goes[RAIL(r) * T + t], r) != 0 -> 1 : 0);
            t++
        :: else -> break
        od;
        t = 0
    }
    do
    :: round <= ROUNDS ->
        /* dispatch, 1: over the rail */
        say_ready();
        pack();
        exchange(leave, come);
        /* dispatch, 2: within the node */
        operation++;
        opened[r] = operation;
        meet();
        d_step { EACH_ROW(FORWARD) };
        finish();
        d_step { /* the receiver reads its tensor, and it is gone */
            t = 0;
            do
            :: t < R * T ->
                if
                :: (goes[t] >> r) & 1 -> assert(place[r * R * T + t] == VALUE(0, t, round)) /* a row is lost */
                :: else -> assert(place[r * R * T + t] == 0)
                fi;
                place[r * R * T + t] = 0;
                t++
            :: else -> break
            od;
            t = 0;
            opened[r] = 0
        }
        /* combine, 1: within the node */
        operation++;
        shown[r] = round;
        meet();
        d_step { EACH_ROW(ADD_UP) };
#ifdef NO_RELEASE
        finished[MATE(r)] = operation;
#else
        finish();
#endif
        shown[r] = 0; /* the caller overwrites its rows */
        /* combine, 2 and 3: back over the rail, and the last sum */
        say_ready();
        exchange(come, leave);
        d_step {
            t = 0;
            slot = 0;
            do
            :: t < T ->
                if
                :: OF_NODE(goes[r * T + t], RAIL(r)) != 0 ->
                    assert(recv[r * T + slot] == SUM + VALUE(r, t, round)); /* summed before it came */
                    unread[r * T + slot] = false;
                    slot++
                :: else
                fi;
                if
                :: OF_NODE(goes[r * T + t], r) != 0 -> assert(send[r * 2 * T + T + t] == SUM + VALUE(r, t, round))
                :: else
                fi;
                t++
            :: else -> break
            od;
            t = 0;
            slot = 0
        };
        round++
    :: else -> break
    od
}

init
{
    byte t = 0, any = 0;
    do
    :: t < R * T ->
        if
        :: t < ANY -> select(any : 0 .. 15); goes[t] = any
        :: else -> goes[t] = (t == 1 -> 3 : (t % 4 == 0 -> 15 : (t % 4 == 1 -> 9 : (t % 4 == 2 -> 4 : 6))))
        fi;
        t++
    :: else -> break
    od;
    atomic {
        t = 0;
        do
        :: t < R -> run Network(t, 0); run Network(t, 1); run Rank(t); t++
        :: else -> break
        od
    }
}
