// Combine in one launch, where the experts' rows must be copied to memory that peers reach: some warps copy, chunk by chunk of
// tokens, while others pull the chunks that all ranks have copied. What is pulled has just been written, so it comes from the
// cache, or crosses the link while the next rows are copied.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 640;
constexpr int kCopyWarps = 12;
constexpr int kPullWarps = kThreads / 32 - kCopyWarps;

struct Shared {
    Sources sources;
    Place places[kMaxExperts];                // [L, R] of this rank's rows
    int32_t before[kChunks * kMaxRanks + 1];  // tokens listed in chunks, and by sources within a chunk, before
    int32_t chunks[kMaxRanks * (kChunks + 1)];
    uint64_t present;  // whom the rows are shown to
};

// By every thread of every block: the lists of the dispatch, which stay until the set serves another.
__device__ void read_lists(const CombineParams& p, const Layout& layout, Shared& shared) {
    char* own = space_of(p, p.rank);
    const auto* places = reinterpret_cast<const Place*>(own + layout.own_places + p.set * layout.place_bytes);
    for (int i = threadIdx.x; i < p.num_experts; i += kThreads) shared.places[i] = places[i];
    const Control* mine = control_of(p, p.rank);
    const uint32_t came = mine->dispatches[p.set] << 1;
    for (int i = threadIdx.x; i < p.num_ranks * (kChunks + 1); i += kThreads) {
        const int source = i / (kChunks + 1), chunk = i % (kChunks + 1);
        const int32_t* chunks = List(own + layout.list(p.set, source), p).chunks;
        shared.chunks[i] = chunks[chunk];
        if (chunk == kChunks) continue;
        const bool counts = mine->decided[p.set][0].at[source] == came;
        shared.before[chunk * p.num_ranks + source + 1] = counts ? chunks[chunk + 1] - chunks[chunk] : 0;
    }
}

// By a copying warp that has come to the end of a chunk: the last such warp tells the peers.
DT_DEVICE void end_chunk(const CombineParams& p, Control* mine, uint64_t present, uint32_t number, int chunk) {
    const int lane = threadIdx.x % 32;
    delay_at_random(chunk);
    __syncwarp();
    bool last = false;
    if (lane == 0) {
        __threadfence_system();
        last = add_acq_rel_gpu(&mine->copied[p.set][chunk], 1) == gridDim.x * kCopyWarps - 1;
        if (last) mine->copied[p.set][chunk] = 0;
    }
    if (!__shfl_sync(0xffffffffu, last, 0)) return;
    const uint32_t step = chunk == kChunks - 1 ? kSteps - 1 : chunk + 1;
    for (int peer = lane; peer < p.num_ranks; peer += 32)
        if (is_in(present, peer)) store_release_sys(&control_of(p, peer)->shown[p.set].at[p.rank], number * kSteps + step);
}

DT_DEVICE void copy_rows(const CombineParams& p, const Layout& layout, Control* mine, const Shared& shared, uint32_t number) {
    using Part = Piece<4>;
    const int lane = threadIdx.x % 32, ranks = p.num_ranks, row_bytes = 2 * p.hidden, pieces = Part::in(row_bytes);
    const int64_t slots = int64_t{ranks} * p.max_tokens;
    char* own = space_of(p, p.rank);
    char* rows = own + layout.rows + p.set * layout.rows_bytes;
    const int64_t units = int64_t{shared.before[kChunks * ranks]} * pieces, stride = int64_t{gridDim.x} * kCopyWarps;
    int64_t unit = blockIdx.x + static_cast<int64_t>(threadIdx.x / 32) * gridDim.x;
    const char* lists = reinterpret_cast<const char*>(List(own + layout.list(p.set, 0), p).places);  // the first's picks
    const int list_bytes = static_cast<int>(layout.list_bytes);
    int part_of = 0;  // chunk * ranks + source
    uint32_t next_place = kNoPlace;
    const auto look = [&]() {
        if (unit >= units) return;
        const int listed = static_cast<int>(unit / pieces);
        while (shared.before[part_of + 1] <= listed) ++part_of;
        const int chunk = part_of / ranks, source = part_of % ranks;
        const int64_t i = shared.chunks[source * (kChunks + 1) + chunk] + listed - shared.before[part_of];
        const auto* picks = reinterpret_cast<const uint32_t*>(lists + int64_t{source} * list_bytes) + i * p.top_k;
        next_place = lane < p.top_k ? picks[lane] : kNoPlace;
    };
    look();
    int chunk = 0;
    while (unit < units) {
        const int source = part_of % ranks, now = part_of / ranks;
        const int start = static_cast<int>(unit % pieces) * Part::kBytes;
        const uint32_t place = next_place;
        while (chunk < now) end_chunk(p, mine, shared.present, number, chunk++);
        unit += stride;
        look();
        int64_t from_here = 0;
        int to_here = 0;
        if (place != kNoPlace) {
            const int e = place >> kIndexBits, index = place & ((1u << kIndexBits) - 1);
            const Place first = shared.places[e * ranks + source];
            from_here = e * slots + first.begin + index;
            to_here = first.compact + index;
        }
        for (unsigned left = __ballot_sync(0xffffffffu, place != kNoPlace); left != 0; left &= left - 1) {
            const int64_t from = __shfl_sync(0xffffffffu, from_here, __ffs(left) - 1);
            const int64_t to = __shfl_sync(0xffffffffu, to_here, __ffs(left) - 1);
            Part part;
            part.load(reinterpret_cast<const char*>(p.y) + from * row_bytes, start, row_bytes);
            part.store(rows + to * row_bytes, start, row_bytes);
        }
    }
    while (chunk < kChunks) end_chunk(p, mine, shared.present, number, chunk++);
}

// Waits, with one warp, until the peers that came for the first chunk have come as far as `step`, too.
DT_DEVICE void wait_for_step(const CombineParams& p, Control* mine, uint64_t came, uint32_t value) {
    const uint64_t start = global_timer();
    for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32)
        while (is_in(came, peer) && !reached(load_acquire_sys(mine->shown[p.set].at + peer), value)) {
            if (global_timer() - start > p.timeout_ns) give_up(p, peer);
            if (is_masked(p, peer)) break;  // it ended halfway: what it showed last time is taken for its rows
        }
    __syncwarp();
}

__global__ void __launch_bounds__(kThreads, 1) combine_whole_kernel(const __grid_constant__ CombineParams p, const int splits) {
    __shared__ Shared shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set] + 1;
    const Layout layout(p);
    char* rows = space_of(p, p.rank) + layout.rows + p.set * layout.rows_bytes;
    read_lists(p, layout, shared);
    if (threadIdx.x < 32) {
        const uint64_t present = wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
        if (threadIdx.x == 0) shared.present = present;
        if (blockIdx.x == 0)  // before any of this block's copies, so before the last one's flag
            for (int peer = threadIdx.x; peer < p.num_ranks; peer += 32)
                if (is_in(present, peer)) {
                    control_of(p, peer)->shown_at[p.set][p.rank] = rows - space_of(p, p.rank);
                    control_of(p, peer)->shown_how[p.set][p.rank] = kCompact;
                }
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.before[0] = 0;
    if (threadIdx.x < 32) sum_up(shared.before + 1, kChunks * p.num_ranks);
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < kCopyWarps) {
        copy_rows(p, layout, mine, shared, number);
    } else {
        // The first pulling warp waits for all; it is the one that may give a peer up.
        if (warp == kCopyWarps) shared.sources.wait(p, mine, number, 1);
        asm volatile("bar.sync 1, %0;" ::"n"(kPullWarps * 32) : "memory");
        const Place* places = places_of(p, layout);
        const int64_t units = int64_t{p.num_tokens} * splits, stride = int64_t{gridDim.x} * kPullWarps;
        int64_t unit = blockIdx.x + static_cast<int64_t>(warp - kCopyWarps) * gridDim.x;
        int chunk = 0;
        for (; unit < units; unit += stride) {
            const int64_t t = unit / splits;
            const Picks picks(p, shared.sources, places, t);
            if (const int now = static_cast<int>(t) / chunk_tokens(p); chunk < now) {
                chunk = now;
                wait_for_step(p, mine, shared.sources.came, number * kSteps + chunk + 1);
            }
            pull(p, picks, t, static_cast<int>(unit % splits), splits);
        }
    }
    if (!is_last_block(mine, p, kCombineReceive)) return;
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kThreads)
        if (is_in(shared.present, peer)) mine->shown_to[p.set].at[peer] = number;
    if (threadIdx.x == 0) mine->combines[p.set] = number;
    tell_pulled(p, shared.sources.came, number);
}

}  // namespace

void launch_combine_whole(const CombineParams& p, cudaStream_t stream) {
    const int pieces = (2 * p.hidden + 511) / 512;
    combine_whole_kernel<<<p.num_sms, kThreads, 0, stream>>>(p, pieces > 2 ? (pieces + 1) / 2 : pieces);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
