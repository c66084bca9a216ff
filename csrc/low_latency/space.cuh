// What the ranks of a low-latency group share, and how they meet: see docs/low_latency.md.
//
// A rank's space begins with a `Control`, followed, for each of two sets, by what peers send here: for every source a `List` of
// the tokens it sends and a slot for each of its tokens; then by where this rank's own rows went (`Place`), and by the rows of
// its experts that peers pull. A set serves one result at a time: a dispatch, then combines of it. The sets know nothing of
// each other. Flags hold the number of the dispatch, or combine, of their set, and only ever grow.
//
// With ranks on other nodes, which are reached by puts alone (csrc/rdma/low_latency.cu), follow what is put to them from here,
// and what they put here beside rows and lists.
#pragma once

#include <cstdint>

#include "../common/ptx.cuh"
#include "params.hpp"

namespace deepep_train::low_latency {

constexpr int kBlock = 128;  // values with one scale
constexpr int kMaxSlices = 2 * kMaxHidden / kSlice;
constexpr uint32_t kNoPlace = 0xffffffffu;
constexpr int kIndexBits = 22;  // of a pick's place: local expert << kIndexBits | its number among the source's picks of it

struct Control {
    // For each slice, what blocks of one rank have added.
    struct alignas(128) Slices {
        uint32_t at[kMaxRanks][kMaxSlices];
    };
    // Written by peer p at index p. Flags have 64 bits, as NVSHMEM's signals: the number is the lower half.
    struct alignas(128) Flags {
        uint64_t at[kMaxRanks];
    };
    struct alignas(128) Numbers {
        uint32_t at[kMaxRanks];
    };
    Flags sent[2];      // its rows are here
    Flags taken[2];     // it has read the rows sent to it
    Flags shown[2];     // its experts' rows may be pulled; upper half: enum Shown
    Flags pulled[2];    // it has pulled this rank's rows
    Numbers placed[2];  // the dispatch for which it has written `Place`s; of this node
    // Where in its arena they lie, if they are `kSpread`; if `kSliced`, what the counts of its slices will be after this
    // combine.
    alignas(128) int64_t shown_at[2][kMaxRanks];
    Slices slices_shown[2];   // its experts' rows may be pulled
    Slices slices_pulled[2];  // it has pulled this rank's rows
    Numbers alive;            // changes while it waits for others, which may be why it is late
    // Whether slices from `kTurns` on lie where earlier ones were; said before the first of these is shown.
    Numbers takes_turns[2];
    // Written by the owner.
    alignas(128) uint32_t closed;  // the buffer has been destroyed
    uint32_t dispatches[2];        // sent so far
    uint32_t combines[2];
    uint32_t arrived[2][6];  // blocks that have finished the current launch, by phase
    Numbers decided[2][2];   // by phase and source: number << 1 | 1 if it was given up
    Numbers sent_to[2];      // the last dispatch that went to a peer
    Numbers shown_to[2];
    Numbers sliced_to[2];  // combines in slices that a peer has been given, each of whose slices counts `kCombineInSlices`
    alignas(128) int32_t num_rows[2][kMaxExperts];  // received, by local expert
};

enum Phase { kDispatchSend, kDispatchReceive, kCombineSend, kCombineReceive, kDispatchPut, kCombinePut };
// How rows lie: as the experts have left them; one after another in the set; those in LogFMT. Of another node they come alone,
// to the place of their pick. Nowhere: the dispatch did not come. Sliced: slice by slice (combine_slices.cu).
enum Shown : uint32_t { kSpread, kCompact, kCompactLogfmt, kNowhere, kSliced };

constexpr uint32_t kCombineInSlices = 256;  // more than a rank has blocks

// Where a source's rows of one expert begin: among that expert's rows, and among all rows of the expert's rank.
struct Place {
    int32_t begin;
    int32_t compact;
};

#define DT_BOTH __host__ __device__ __forceinline__

DT_BOTH int64_t aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Offsets in a space.
struct Layout {
    int64_t list_bytes, slot_bytes, place_bytes, rows_bytes;
    int64_t slice_bytes;  // between a slice of the rows and the next, if they lie in slices
    int64_t came_bytes;
    int64_t lists, slots, places, rows;
    int64_t outgoing, begins, came;  // only with ranks on other nodes
    int64_t end;
    int ranks, tokens;

    DT_BOTH explicit Layout(const Common& c) {
        const int local = c.num_experts / c.num_ranks, picks = c.top_k < local ? c.top_k : local;
        ranks = c.num_ranks;
        tokens = c.max_tokens;
        list_bytes = aligned(4 * (2 + local + int64_t{c.max_tokens} * (1 + c.top_k)));  // see `List`
        slot_bytes = aligned(2 * int64_t{c.hidden});                                    // FP8 and its scales need less
        place_bytes = aligned(int64_t{c.num_experts} * sizeof(Place));
        rows_bytes = int64_t{c.num_ranks} * c.max_tokens * picks * 2 * c.hidden;
        slice_bytes = int64_t{c.num_ranks} * c.max_tokens * picks * kSlice;
        lists = aligned(sizeof(Control));
        slots = lists + 2 * ranks * list_bytes;
        places = slots + 2 * ranks * tokens * slot_bytes;
        rows = places + 2 * place_bytes;
        outgoing = rows + 2 * rows_bytes;
        end = outgoing;
        came_bytes = int64_t{c.max_tokens} * c.top_k * 2 * c.hidden;
        begins = outgoing + ranks * list_bytes;
        came = begins + 2 * place_bytes;
        if (c.num_local < c.num_ranks) end = came + 2 * came_bytes;
    }

    DT_BOTH int64_t list(int set, int source) const { return lists + (set * ranks + source) * list_bytes; }
    DT_BOTH int64_t slot(int set, int source, int64_t token) const {
        return slots + ((int64_t{set} * ranks + source) * tokens + token) * slot_bytes;
    }
    // Where the list for a rank of another node is put from.
    DT_BOTH int64_t outgoing_list(int peer) const { return outgoing + peer * list_bytes; }
};

// The parts of the list at `address`.
struct List {
    int32_t* head;     // [2]: tokens listed; 1 if their rows have stayed in the source's slots
    int32_t* counts;   // [L]: picks of each local expert
    int32_t* tokens;   // [M]
    uint32_t* places;  // [M, K]

    DT_DEVICE List(char* address, const Common& c) {
        head = reinterpret_cast<int32_t*>(address);
        counts = head + 2;
        tokens = counts + c.num_experts / c.num_ranks;
        places = reinterpret_cast<uint32_t*>(tokens + c.max_tokens);
    }
};

// The one place where the memory of a rank of this node is found.
DT_DEVICE char* space_of(const Common& c, int rank) { return reinterpret_cast<char* const*>(c.spaces)[rank]; }
DT_DEVICE Control* control_of(const Common& c, int rank) { return reinterpret_cast<Control*>(space_of(c, rank)); }
DT_DEVICE char* own_space(const Common& c) { return reinterpret_cast<char*>(c.own); }
DT_DEVICE Control* own_control(const Common& c) { return reinterpret_cast<Control*>(c.own); }

DT_DEVICE char* arena_of(const Common& c, int rank) { return reinterpret_cast<char* const*>(c.arenas)[rank]; }
DT_DEVICE bool is_local(const Common& c, int rank) {
    return static_cast<unsigned>(rank - c.first_local) < static_cast<unsigned>(c.num_local);
}
// Bytes of a row as it travels, with its scales.
DT_DEVICE int slot_bytes(const DispatchParams& p) {
    if (p.scales == kBf16) return 2 * p.hidden;
    return p.hidden + p.hidden / (p.scales == kPackedScales ? 4 * kBlock : kBlock) * 4;
}
// The places of a source on another node, [L], which stay here.
DT_DEVICE Place* begins_of(const Common& c, const Layout& layout, int source) {
    return reinterpret_cast<Place*>(own_space(c) + layout.begins + c.set * layout.place_bytes) +
           source * (c.num_experts / c.num_ranks);
}

DT_DEVICE bool reached(uint32_t count, uint32_t number) { return static_cast<int32_t>(count - number) >= 0; }
DT_DEVICE bool reached(uint64_t flag, uint32_t number) {
    return static_cast<int32_t>(static_cast<uint32_t>(flag) - number) >= 0;
}
DT_DEVICE bool is_in(uint64_t ranks, int rank) { return (ranks >> rank & 1) != 0; }

DT_DEVICE bool is_masked(const Common& c, int rank) { return reinterpret_cast<const volatile int32_t*>(c.mask)[rank] != 0; }
DT_DEVICE void give_up(const Common& c, int rank) { reinterpret_cast<volatile int32_t*>(c.mask)[rank] = 1; }

// By who waits, now and then: the first block tells the peers, every `step`-th from `first` on, that this rank runs.
DT_DEVICE void tell_alive(const Common& c, int first = 0, int step = 1) {
    if (blockIdx.x != 0) return;
    const auto word = static_cast<uint32_t>(global_timer());
    for (int peer = first; peer < c.num_ranks; peer += step)
        if (is_local(c, peer) && !is_masked(c, peer)) store_relaxed_sys(&control_of(c, peer)->alive.at[c.rank], word);
}

constexpr uint32_t kPolls = 64;  // the clock and the mask take longer to look at than a flag

// How long one peer has been late, and silent. Who waits for another that has stopped is late itself, as are those that wait
// for it in turn, but not silent.
struct Silence {
    uint64_t since = 0, late_since = 0;  // 0: it has not been looked at
    uint32_t heard = 0;

    // Whether it has stopped: it is masked by now, or has said nothing for a deadline, or, whatever it says, is late for four.
    DT_DEVICE bool is_over(const Common& c, int peer) {
        const uint64_t now = global_timer();
        const uint32_t word = load_acquire_sys(&own_control(c)->alive.at[peer]);
        if (since == 0 || word != heard) since = now;
        if (late_since == 0) late_since = now;
        heard = word;
        return is_masked(c, peer) || now - since > c.timeout_ns || now - late_since > 4 * c.timeout_ns;
    }
};

// By one warp: waits until each peer that is not masked has answered what was last given to it, so that it may be overwritten.
// Peers that do not in time are masked. Returns those that are left.
DT_DEVICE uint64_t wait_for_answers(const Common& c, const Control::Numbers& given, const Control::Flags& answered) {
    uint64_t present = 0;
    for (int base = 0; base < c.num_ranks; base += 32) {
        const int peer = base + threadIdx.x % 32;
        bool here = false;
        delay_at_random(base);
        if (peer < c.num_ranks) {
            const uint32_t number = given.at[peer];
            here = !is_masked(c, peer);
            Silence silence;
            for (uint32_t polls = 1; here && !reached(load_acquire_sys(answered.at + peer), number); ++polls) {
                if (polls % kPolls != 0) continue;
                tell_alive(c);
                if (!silence.is_over(c, peer)) continue;
                give_up(c, peer);
                here = false;
            }
        }
        __syncwarp();
        present |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, here)) << base;
    }
    return present;
}

// By one warp of each block: waits for every peer's flag to reach `value`. A peer that is masked, or does not come in time, is
// given up, and masked; the blocks of a launch, which is the `number`-th of its phase and set, agree on it through `decided`.
// Returns those that came; adds to `wait_ns`, unless it is 0, how long each was waited for.
DT_DEVICE uint64_t wait_for_peers(const Common& c, const Control::Flags& flags, uint32_t value, Control::Numbers& decided,
                                  uint32_t number, uint64_t wait_ns) {
    const uint64_t start = global_timer();
    uint64_t present = 0;
    for (int base = 0; base < c.num_ranks; base += 32) {
        const int peer = base + threadIdx.x % 32;
        bool here = false;
        delay_at_random(number);
        if (peer < c.num_ranks) {
            const bool masked = is_masked(c, peer);
            uint32_t verdict = *static_cast<volatile uint32_t*>(decided.at + peer);
            Silence silence;
            for (uint32_t polls = 1; !masked; ++polls) {
                here = reached(load_acquire_sys(flags.at + peer), value);
                if (here) break;
                if (polls % kPolls == 0) {
                    tell_alive(c);
                    if (silence.is_over(c, peer)) break;
                }
                __nanosleep(50);  // so many blocks ask that the answer would have to queue
            }
            const uint64_t waited = global_timer() - start;
            // The first block to see, or to give up, decides for all.
            const uint32_t mine = number << 1 | (here ? 0u : 1u);
            while (verdict >> 1 != mine >> 1) {
                const uint32_t before = atomicCAS(decided.at + peer, verdict, mine);
                verdict = before == verdict ? mine : before;
            }
            if (!here && (verdict & 1) == 0) load_acquire_sys(flags.at + peer);  // it has come since, as another block saw
            here = (verdict & 1) == 0;
            if (!here && !masked) give_up(c, peer);
            if (wait_ns != 0 && !masked)
                atomicAdd(reinterpret_cast<unsigned long long*>(wait_ns) + peer, static_cast<unsigned long long>(waited));
        }
        __syncwarp();
        present |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, here)) << base;
    }
    return present;
}

// By every thread of every block, after its writes: whether this block is the last of the launch to come here, all others'
// writes being visible to it, and, by a flag that it releases, to whoever acquires that.
DT_DEVICE bool is_last_block(Control* mine, const Common& c, Phase phase) {
    __shared__ bool last;
    delay_at_random(phase);
    __syncthreads();
    if (threadIdx.x == 0) {
        last = add_acq_rel_gpu(&mine->arrived[c.set][phase], 1) == gridDim.x - 1;
        if (last) mine->arrived[c.set][phase] = 0;
    }
    __syncthreads();
    return last;
}

// By one warp: each value becomes the sum of all up to it.
DT_DEVICE void sum_up(int32_t* values, int count) {
    const int lane = threadIdx.x % 32;
    int before = 0;
    for (int base = 0; base < count; base += 32) {
        int upto = base + lane < count ? values[base + lane] : 0;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, upto, distance);
            upto += lane >= distance ? other : 0;
        }
        if (base + lane < count) values[base + lane] = before + upto;
        before += __shfl_sync(0xffffffffu, upto, 31);
    }
}

// Copies rows by 16 bytes a lane: `kVectors` of them are loaded before the first is stored. Those that are loaded or stored for
// the last time in a while leave the L2 cache first.
template <int kVectors>
struct Piece {
    static constexpr int kBytes = kVectors * 512;
    uint4 v[kVectors];

    // From `start` on, of rows of `row_bytes`, a multiple of 16.
    DT_DEVICE void load(const char* row, int start, int row_bytes) {
        const int at = start + threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (i * 512 < row_bytes - at) v[i] = load_row(row + at + i * 512);
    }
    DT_DEVICE void load_last(const char* row, int start, int row_bytes) {
        const int at = start + threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (i * 512 < row_bytes - at) v[i] = load_row_last(row + at + i * 512);
    }
    DT_DEVICE void store(char* row, int start, int row_bytes) const {
        const int at = start + threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (i * 512 < row_bytes - at) store_row(row + at + i * 512, v[i]);
    }
    DT_DEVICE void store_last(char* row, int start, int row_bytes) const {
        const int at = start + threadIdx.x % 32 * 16;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (i * 512 < row_bytes - at) store_row_last(row + at + i * 512, v[i]);
    }
    static DT_BOTH int in(int row_bytes) { return (row_bytes + kBytes - 1) / kBytes; }
};

}  // namespace deepep_train::low_latency
