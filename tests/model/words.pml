/* A fresh dispatch's three exchanges along a rail, and a combine's (deepep_train/engines/rdma.py, `dispatch`): rows lie in their
   segment until the words that say where they go have come, behind them. rail.pml has the rest of the protocol.

   The rows' exchange is launched before the CPU knows of the counts; where these do not allow it, all ranks find so and none enters it: there the
   round ends, as the CPU raises. (Where there was no room, the CPU makes it, and the exchange that follows is the same.)

   2 nodes of one rank, 2 queue pairs each, ROUNDS rounds of counts, rows, words and sums without anything between them. A segment has
   two places: its begin, where counts, rows and sums lie, and what is behind the rows. Every exchange has one row each way, so that what
   several puts of an exchange, and the memory that they are read from, may do is rail.pml's alone.

   Broken on purpose: NO_OFFSET (words lie where the rows do), NO_READY, ROWS_LAST (the next exchange begins before the rows have been
   passed on). */
#ifndef ROUNDS
#define ROUNDS 3
#endif
#define BEGIN 0
#ifdef NO_OFFSET
#define BEHIND 0
#else
#define BEHIND 1
#endif
#define WORD(rank) ((rank) * 2 + number % 2)
#define PLACE(rank, at) ((rank) * 2 + (at))

byte recv[4];     /* the number of the exchange whose row lies there */
bool unread[4];
byte ready[4];    /* of each rank: what the other says, two words in turns */
byte arrived[2];
byte leaving[2];
bool goes[ROUNDS]; /* of each round's counts */

chan net[4] = [2] of {byte, byte};

proctype Network(byte r; byte pair)
{
    byte at, what;
end:
    do
    :: d_step {
        net[r * 2 + pair] ? at, what ->
        assert(!unread[PLACE(1 - r, at)]); /* a place is overwritten before it was read */
        recv[PLACE(1 - r, at)] = what;
        unread[PLACE(1 - r, at)] = true;
        leaving[r]--;
        arrived[1 - r]++
    }
    od
}

/* `rail_kernel`: its number, *ready*, a row over either queue pair, quiet, *arrived*. */
inline exchange(at)
{
    number++;
    ready[WORD(1 - r)] = number;
#ifndef NO_READY
    (ready[WORD(r)] >= number);
    assert(ready[WORD(r)] == number); /* ready is gone before it was read */
#endif
    if
    :: atomic { leaving[r]++; net[r * 2] ! at, number }
    :: atomic { leaving[r]++; net[r * 2 + 1] ! at, number }
    fi;
    (leaving[r] == 0);
    seen++;
    (arrived[r] == seen)
}

/* The kernel behind it, which passes on, or adds up, what exchange `which` has brought. */
inline pass_on(at, which)
{
    d_step {
        assert(recv[PLACE(r, at)] == which); /* recv holds another exchange's row */
        unread[PLACE(r, at)] = false
    }
}

proctype Rank(byte r)
{
    byte number = 0, seen = 0, round = 0;
    do
    :: round < ROUNDS ->
        exchange(BEGIN); /* counts */
        pass_on(BEGIN, number);
        if
        :: !goes[round] -> round++; goto next
        :: else -> skip
        fi;
        exchange(BEGIN); /* rows */
        exchange(BEHIND); /* words */
        pass_on(BEHIND, number);
#ifdef ROWS_LAST
        exchange(BEGIN);
        pass_on(BEGIN, number - 2);
#else
        pass_on(BEGIN, number - 1);
        exchange(BEGIN); /* sums */
        pass_on(BEGIN, number);
#endif
        round++;
next:   skip
    :: else -> break
    od
}

init
{
    byte r = 0;
    atomic {
        do
        :: r < ROUNDS -> if :: goes[r] = true :: goes[r] = false fi; r++
        :: else -> break
        od;
        r = 0;
        do
        :: r < 2 -> run Network(r, 0); run Network(r, 1); run Rank(r); r++
        :: else -> break
        od
    }
}
