/* Exchanges along a rail in stages (deepep_train/engines/rail_stages.py): what comes in one is passed on while the next is under
   way. rail.pml has the rest of the protocol; here nodes have one rank each, so that nobody meets within one.

   3 nodes, so 2 stages of a turn each; ROUNDS rounds of a dispatch and a combine. A rank has two streams: its network's, whose
   kernels exchange, and its node's, whose kernels read `recv` (dispatch) or fill `send` (combine). They part when an operation
   begins and join when it ends. The network is a process for every rank, and reads what it puts when it delivers it.

   Broken on purpose: NO_EVENT (the second hop does not wait for the first), NO_JOIN (the next operation does not wait for the node's
   stream), NO_FORK (it begins before the last has ended), NO_READY. */
#ifndef ROUNDS
#define ROUNDS 2
#endif
#define N 3
#define FORTH 1
#define BACK 2
#define WAY(stage) (FORTH + (stage) / 2 % 2)
#define VALUE(from, to, way, round) (1 + (from) + N * ((to) + N * ((way) - 1 + 2 * ((round) - 1))))

byte send[N * N];      /* of each node, for each node: its row's value */
byte recv[N * N];      /* of each node, from each node */
bool unread[N * N];
byte ready[N * N * 2]; /* of each node, from each node: two words, in turns */
byte arrived[N * N];
byte leaving[N];
byte crossed[N];       /* stages that a rank's network stream has finished, since ever */
byte passed[N];        /* the same of its node's stream */
byte begun[N];         /* stages that its network's stream may enter */

chan net[N] = [2] of {byte};

#define TO(r, turn) (((r) + (turn)) % N)
#define FROM(r, turn) (((r) + N - (turn)) % N)
#define WORD(at, of) (((at) * N + (of)) * 2 + number % 2)

proctype Network(byte r)
{
    byte to;
end:
    do
    :: d_step {
        net[r] ? to ->
        assert(!unread[to * N + r]); /* a segment is overwritten before it was read */
        recv[to * N + r] = send[r * N + to];
        unread[to * N + r] = true;
        leaving[r]--;
        arrived[to * N + r]++
    }
    od
}

/* A launch of rail_kernel for one stage: its number, then who is ready, puts, quiet, and what comes. */
proctype NetworkStream(byte r)
{
    byte number = 0, turn = 0, peer = 0, round = 1, seen[N];
    do
    :: number < 4 * ROUNDS ->
#ifndef NO_FORK
        (begun[r] > number);
#endif
#ifndef NO_EVENT
        (WAY(number) == FORTH || passed[r] > number); /* the node has made what leaves now */
#endif
        number++;
        turn = 1 + (number - 1) % 2;
        d_step {
            round = 1 + (number - 1) / 4;
            ready[WORD(TO(r, 1), r)] = number;
            ready[WORD(TO(r, 2), r)] = number;
            if
            :: WAY(number - 1) == FORTH -> send[r * N + TO(r, turn)] = VALUE(r, TO(r, turn), FORTH, round)
            :: else
            fi
        }
#ifndef NO_READY
        (ready[WORD(r, TO(r, 1))] >= number && ready[WORD(r, TO(r, 2))] >= number);
        assert(ready[WORD(r, TO(r, 1))] == number && ready[WORD(r, TO(r, 2))] == number); /* gone before it was read */
#endif
        atomic { leaving[r]++; net[r] ! TO(r, turn) };
        (leaving[r] == 0);
        peer = FROM(r, turn);
        d_step { seen[peer]++ };
        (arrived[r * N + peer] == seen[peer]);
        crossed[r] = number
    :: else -> break
    od
}

/* The node's kernels, and what begins and ends operations, which is its stream as well. */
proctype NodeStream(byte r)
{
    byte stage = 0, turn = 0, peer = 0, round = 1;
    do
    :: stage < 4 * ROUNDS ->
        if
        :: stage % 2 == 0 -> /* an operation begins */
            begun[r] = stage + 2
        :: else
        fi;
        turn = 1 + stage % 2;
        round = 1 + stage / 4;
        if
        :: WAY(stage) == FORTH ->
#ifndef NO_EVENT
            (crossed[r] > stage);
#endif
            peer = FROM(r, turn);
            d_step {
                assert(recv[r * N + peer] == VALUE(peer, r, FORTH, round)); /* forwarded before it came */
                unread[r * N + peer] = false
            }
        :: else ->
            peer = TO(r, turn);
            send[r * N + peer] = VALUE(r, peer, BACK, round)
        fi;
        stage++;
        passed[r] = stage;
        if
        :: stage % 2 == 0 -> /* and ends: its streams join */
#ifndef NO_JOIN
            (crossed[r] == stage);
#endif
            if
            :: WAY(stage - 1) == BACK -> /* the sum, of all that has come back */
                d_step {
                    assert(recv[r * N + TO(r, 1)] == VALUE(TO(r, 1), r, BACK, round));
                    assert(recv[r * N + TO(r, 2)] == VALUE(TO(r, 2), r, BACK, round));
                    unread[r * N + TO(r, 1)] = false;
                    unread[r * N + TO(r, 2)] = false
                }
            :: else
            fi
        :: else
        fi
    :: else -> break
    od
}

init
{
    byte r = 0;
    atomic {
        do
        :: r < N -> run Network(r); run NetworkStream(r); run NodeStream(r); r++
        :: else -> break
        od
    }
}
