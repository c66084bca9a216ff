// Combine in one launch, for ranks that share a GPU: rows are copied, pulled and written over slice by slice, so that the
// copies live and die in the L2 cache instead of crossing the memory twice. See docs/low_latency.md.
//
// A slice is `kSlice` bytes of every row. Of each block some warps copy its share of this rank's rows, some pull its share of
// the tokens, two announce what all of its warps have done, and two watch what the peers announce. If all ranks that come are
// in a launch like this, slices take turns in `kTurns` places; a peer that pulls later, by a hook, would hold up all, so then
// each has its own. Each rank decides that for its own, and says it: masks, and so who comes, are each rank's own, too.
#include <stdexcept>

#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kCopiers = 8, kPullers = 8;  // warps
constexpr int kAnnouncers = kCopiers + kPullers, kWatchers = kAnnouncers + 2;
constexpr int kThreads = 32 * (kWatchers + 2);
constexpr int kMeetings = kPullers + 3;               // warps: these, the watchers, and the announcer of copies
constexpr int kTogether = 4;                          // rows of which a copier loads a slice at once
constexpr int kVectors = kSlice / 512;                // of 16 bytes a lane
enum Barriers : int { kRowsFound = 1, kPicksFound };  // 0: all threads

enum Work : int { kCopied, kPulled };

struct Shared {
    Pulling pulling;
    // By local expert.
    int32_t first[kMaxExperts + 1];  // its first row among all, without those for this rank itself, which are not copied
    int32_t own_begin[kMaxExperts], own_count[kMaxExperts];  // those, among the expert's rows
    int32_t compact[kMaxExperts];                            // its first row among all
    uint32_t done[2][kMaxSlices];                            // by `Work`: warps that have finished a slice
    uint32_t seen[2];                                        // by `Work`: slices with which all peers have
    uint64_t present;                                        // peers that came
    // To whom nothing is announced: the mask, which takes longer to look at, as this block knows it.
    unsigned long long left_out;
    unsigned long long turns;  // peers whose slices take turns, from slice `kTurns` on
    bool takes_turns;          // this rank's
};

DT_DEVICE void meet(Barriers barrier, int warps) {
    __syncwarp();
    asm volatile("bar.sync %0, %1;" ::"r"(static_cast<int>(barrier)), "r"(32 * warps) : "memory");
}

DT_DEVICE void wait_shared(const uint32_t* count, uint32_t value) {
    while (load_acquire_shared(count) < value) {
    }
    __syncwarp();
}

// By every thread: where the rows lie; and that the peers have pulled what was copied before.
DT_DEVICE void prepare(const CombineParams& p, Control* mine, uint32_t number, Shared& shared) {
    const int local = p.num_experts / p.num_ranks;
    const Layout layout(p);
    const auto* places = reinterpret_cast<const Place*>(own_space(p) + layout.places + p.set * layout.place_bytes);
    const List own(own_space(p) + layout.list(p.set, p.rank), p);
    for (int e = threadIdx.x; e < local; e += kThreads) {
        const Place place = places[p.rank * local + e];
        shared.own_begin[e] = place.begin;
        shared.own_count[e] = own.counts[e];
        shared.compact[e] = place.compact - place.begin;
        shared.first[e + 1] = mine->num_rows[p.set][e] - own.counts[e];
    }
    for (int i = threadIdx.x; i < 2 * kMaxSlices; i += kThreads) shared.done[i / kMaxSlices][i % kMaxSlices] = 0;
    if (threadIdx.x == 0) shared.first[0] = shared.seen[kCopied] = shared.seen[kPulled] = shared.turns = 0;
    if (threadIdx.x < 32) {
        const uint64_t answered = wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
        if (threadIdx.x == 0) shared.left_out = ~answered | 1ull << p.rank;
        for (int peer = threadIdx.x; blockIdx.x == 0 && peer < p.num_ranks; peer += 32) {
            if (is_masked(p, peer)) continue;
            Control* there = control_of(p, peer);
            there->shown_at[p.set][p.rank] = (mine->sliced_to[p.set].at[peer] + 1) * kCombineInSlices;
            store_release_sys(&there->shown[p.set].at[p.rank], uint64_t{kSliced} << 32 | number);
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) sum_up(shared.first + 1, local);
    __syncthreads();
}

// By the copiers. A lane knows where a row is and where it goes: of 32 of this warp's rows, from its `group` on.
DT_DEVICE void copy_rows(const CombineParams& p, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, local = p.num_experts / p.num_ranks;
    const int total = shared.first[local], stride = gridDim.x * kCopiers, start = blockIdx.x + warp * gridDim.x;
    const int mine = start < total ? (total - start - 1) / stride + 1 : 0, num_slices = 2 * p.hidden / kSlice;
    const int64_t slots = int64_t{p.num_ranks} * p.max_tokens;
    const Layout layout(p);
    char* rows = own_space(p) + layout.rows + p.set * layout.rows_bytes;
    const char* from = nullptr;
    char* to = nullptr;
    for (int slice = 0; slice < num_slices; ++slice) {
        bool is_free = slice < kTurns;
        int turn = slice;
        for (int group = 0; group < mine; group += 32) {
            if (const int row = start + (group + lane) * stride; row < total && (slice == 0 || mine > 32)) {
                int e = 0;  // the last expert that begins at this row or before, and has it
                for (int step = kMaxExperts / 2; step != 0; step /= 2)
                    if (e + step < local && shared.first[e + step] <= row) e += step;
                int among = row - shared.first[e];
                if (among >= shared.own_begin[e]) among += shared.own_count[e];
                from = reinterpret_cast<const char*>(p.y) + (e * slots + among) * 2 * p.hidden;
                to = rows + int64_t{shared.compact[e] + among} * kSlice;
            }
            const int count = min(mine - group, 32);
            for (int base = 0; base < count; base += kTogether) {
                uint4 v[kTogether][kVectors];
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const auto row = reinterpret_cast<uint64_t>(from);
                    const char* at = reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, row, (base + i) % 32)) +
                                     slice * kSlice + lane * 16;
#pragma unroll
                    for (int j = 0; j < kVectors; ++j)
                        if (base + i < count) v[i][j] = load_row_last(at + j * 512);
                }
                if (!is_free) {
                    wait_shared(&shared.seen[kPulled], slice - kTurns + 1);
                    is_free = true;
                    if (shared.takes_turns) turn = slice % kTurns;
                }
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const auto row = reinterpret_cast<uint64_t>(to);
                    char* at = reinterpret_cast<char*>(__shfl_sync(0xffffffffu, row, (base + i) % 32)) +
                               turn * layout.slice_bytes + lane * 16;
#pragma unroll
                    for (int j = 0; j < kVectors; ++j)
                        if (base + i < count) store_row_kept(at + j * 512, v[i][j]);
                }
            }
        }
        __syncwarp();
        if (lane == 0) add_release_shared(&shared.done[kCopied][slice], 1);
    }
}

// By the pullers.
DT_DEVICE void pull_rows(const CombineParams& p, Shared& shared) {
    const int warp = threadIdx.x / 32 - kCopiers, lane = threadIdx.x % 32, num_slices = 2 * p.hidden / kSlice;
    const int blocks = gridDim.x, first = blockIdx.x;
    const int count = first < p.num_tokens ? (p.num_tokens - first - 1) / blocks + 1 : 0;
    meet(kRowsFound, kMeetings);
    const Layout layout(p);
    const auto* places = reinterpret_cast<const Place*>(own_space(p) + layout.places + p.set * layout.place_bytes);
    for (int i = warp * 32 + lane; i < count * kMaxTopK; i += kPullers * 32) {
        const int t = first + i / kMaxTopK * blocks;
        shared.pulling.picks[i / kMaxTopK][i % kMaxTopK] = find_pick(p, shared.pulling, places, t, i % kMaxTopK);
    }
    meet(kPicksFound, kPullers + 2);
    for (int slice = 0; slice < num_slices; ++slice) {
        wait_shared(&shared.seen[kCopied], slice + 1);
        // Places that a later slice comes to stay in the cache.
        const uint64_t policy = shared.takes_turns && slice + kTurns < num_slices ? evict_normal() : evict_first();
        const int turn = slice % kTurns;
        const uint64_t turns = *static_cast<const volatile unsigned long long*>(&shared.turns);
        for (int unit = warp; unit < count * (kSlice / kPart); unit += kPullers) {
            const int item = unit / (kSlice / kPart);
            const int at = slice * kSlice + unit % (kSlice / kPart) * kPart + lane * 16;
            const Pick* picks = shared.pulling.picks[item];
            if (shared.pulling.coded != 0)
                pull_part<true>(p, picks, first + item * blocks, at, turns, turn, policy);
            else
                pull_part<false>(p, picks, first + item * blocks, at, turns, turn, policy);
        }
        __syncwarp();
        if (lane == 0) add_release_shared(&shared.done[kPulled][slice], 1);
    }
}

// By a warp: tells the peers of every slice with which all of this block's warps have done. What the blocks of a rank add is
// `kCombineInSlices`, however many they are. Whoever has been given up may be dead, and may come late and find other slices: it
// is told nothing, hence of no copy before it is known who has come.
DT_DEVICE void announce(const CombineParams& p, Work work, Shared& shared) {
    const uint32_t warps = work == kCopied ? kCopiers : kPullers;
    const uint32_t share = blockIdx.x == 0 ? kCombineInSlices - (gridDim.x - 1) : 1;
    if (work == kCopied) meet(kRowsFound, kMeetings);
    for (int slice = 0; slice < 2 * p.hidden / kSlice; ++slice) {
        delay_at_random(slice);
        wait_shared(&shared.done[work][slice], warps);
        for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32) {
            if (is_in(*static_cast<volatile unsigned long long*>(&shared.left_out), peer)) continue;
            Control* there = control_of(p, peer);
            if (work == kCopied && slice == kTurns) there->takes_turns[p.set].at[p.rank] = shared.takes_turns;
            auto& counts = work == kCopied ? there->slices_shown[p.set] : there->slices_pulled[p.set];
            add_release_gpu(&counts.at[p.rank][slice], share);
        }
    }
}

// By a thread. Pulling warps may see it at any time.
DT_DEVICE void leave_out(const CombineParams& p, int peer, Shared& shared) {
    give_up(p, peer);
    atomicOr(&shared.left_out, 1ull << peer);
    for (int i = 0; i < kBatch * kMaxTopK; ++i) {
        Pick& pick = shared.pulling.picks[i / kMaxTopK][i % kMaxTopK];
        if (pick.rank == peer) *static_cast<const char* volatile*>(&pick.row) = nullptr;
    }
}

// By a warp: waits for what peers announce, and passes it on to the other warps, up to slice `last`. A peer that stops is
// masked, and its rows are left out of what has not been pulled yet. Others are late because they wait for it: they say that
// they run.
DT_DEVICE void watch(const CombineParams& p, const Control* mine, Work work, int last, Shared& shared) {
    const auto& counts = work == kCopied ? mine->slices_shown[p.set] : mine->slices_pulled[p.set];
    int peers[2];  // of this lane; -1: none
    uint32_t wanted[2];
    Silence silence[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int peer = threadIdx.x % 32 + 32 * i;
        const bool counts_slices = peer < p.num_ranks && peer != p.rank && shared.pulling.how[peer] == kSliced;
        peers[i] = counts_slices && is_in(shared.present, peer) ? peer : -1;
        wanted[i] = counts_slices ? slices_of(p, mine, peer) : 0;
    }
    uint32_t polls = 0;
    for (int slice = 0; slice < last;) {
        delay_at_random(slice);
        bool late[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            late[i] = peers[i] >= 0 && !reached(load_acquire_gpu(&counts.at[peers[i]][slice]), wanted[i]);
        if (!__any_sync(0xffffffffu, late[0] || late[1])) {
            __syncwarp();
            if (work == kCopied && slice == kTurns) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const auto* says = static_cast<const volatile uint32_t*>(mine->takes_turns[p.set].at);
                    if (peers[i] >= 0 && says[peers[i]] != 0) atomicOr(&shared.turns, 1ull << peers[i]);
                }
                __syncwarp();
            }
            ++slice;
            if (threadIdx.x % 32 == 0) add_release_shared(&shared.seen[work], 1);
            silence[0] = silence[1] = Silence();
        } else if (++polls % (4 * kPolls) == 0) {
            tell_alive(p, threadIdx.x % 32, 32);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (!late[i] || !silence[i].is_over(p, peers[i])) continue;
                leave_out(p, peers[i], shared);  // as another block has, or first
                peers[i] = -1;
            }
            __syncwarp();
        }
    }
}

// By the first watcher: where the peers' rows are, and whether slices take turns.
DT_DEVICE void find_all_rows(const CombineParams& p, Control* mine, uint32_t number, Shared& shared) {
    const uint64_t present = find_rows(p, mine, number, blockIdx.x == 0 ? p.wait_ns : 0, false, shared.pulling);
    bool all = true;  // that are there, in a launch like this
    for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32)
        all &= !is_in(present, peer) || shared.pulling.how[peer] == kSliced;
    all = __all_sync(0xffffffffu, all);
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    shared.present = present;
    atomicOr(&shared.left_out, ~present);
    shared.takes_turns = all;
    // Its own are pulled from where the experts left them.
    if (shared.pulling.rows[p.rank] != nullptr) shared.pulling.rows[p.rank] = reinterpret_cast<const char*>(p.y);
    shared.pulling.how[p.rank] = kSpread;
}

__global__ void __launch_bounds__(kThreads, 1) combine_slices_kernel(const __grid_constant__ CombineParams p) {
    __shared__ Shared shared;
    Control* mine = own_control(p);
    const uint32_t number = mine->combines[p.set] + 1;
    if (mine->closed != 0) return;
    prepare(p, mine, number, shared);
    const int warp = threadIdx.x / 32, num_slices = 2 * p.hidden / kSlice;
    if (warp < kCopiers) {
        copy_rows(p, shared);
    } else if (warp < kAnnouncers) {
        pull_rows(p, shared);
    } else if (warp < kWatchers) {
        announce(p, static_cast<Work>(warp - kAnnouncers), shared);
    } else {
        const Work work = warp == kWatchers ? kCopied : kPulled;
        if (work == kCopied) find_all_rows(p, mine, number, shared);
        meet(kRowsFound, kMeetings);
        meet(kPicksFound, kPullers + 2);  // `leave_out` writes to them
        if (work == kCopied || shared.takes_turns)
            watch(p, mine, work, work == kCopied ? num_slices : num_slices - kTurns, shared);
        else if (threadIdx.x % 32 == 0)
            add_release_shared(&shared.seen[kPulled], num_slices);
    }
    if (!is_last_block(mine, p, kCombineReceive)) return;
    tell_pulled(p, mine, number);
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kThreads) {
        if (is_masked(p, peer)) continue;
        mine->shown_to[p.set].at[peer] = number;
        ++mine->sliced_to[p.set].at[peer];
    }
    if (threadIdx.x == 0) mine->combines[p.set] = number;
}

}  // namespace

int most_tokens_in_slices(int num_sms) { return kBatch * num_sms; }

void launch_combine_slices(const CombineParams& p, cudaStream_t stream) {
    if (p.num_sms > static_cast<int>(kCombineInSlices))
        throw std::invalid_argument("more blocks than a combine in slices counts");
    combine_slices_kernel<<<p.num_sms, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
