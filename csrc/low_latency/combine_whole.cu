// Combine in one launch, where the experts' rows must be copied to memory that peers reach: some warps copy, chunk by chunk of
// tokens, while others pull the chunks that all ranks have copied. What is pulled has just been written, so it comes from the
// cache, or crosses the link while the next rows are copied.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 640;
constexpr int kCopyWarps = 4;
constexpr int kStages = 8;                  // of a copying warp's ring
[[maybe_unused]] constexpr int kAhead = 5;  // loads that run ahead of the stores
constexpr int kStageBytes = 4096;
[[maybe_unused]] constexpr int kLag = 3;  // pieces behind a chunk's last until it is told
constexpr int kSharedBytes = kCopyWarps * kStages * (kStageBytes + 8);
constexpr int kPullWarps = kThreads / 32 - kCopyWarps - 1;

struct Shared {
    Sources sources;
    Place places[kMaxExperts];                // [L, R] of this rank's rows
    int32_t before[kChunks * kMaxRanks + 1];  // tokens listed in chunks, and by sources within a chunk, before
    int32_t chunks[kMaxRanks * (kChunks + 1)];
    uint64_t present;  // whom the rows are shown to
    int ready;         // chunks that all peers have copied
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

#if __CUDA_ARCH__ >= 900

// By a copying warp, all of whose rows of a chunk have been written: the last such warp tells the peers.
DT_DEVICE void end_chunk(const CombineParams& p, Control* mine, uint64_t present, uint32_t number, int chunk) {
    const int lane = threadIdx.x % 32;
    delay_at_random(chunk);
    __syncwarp();  // what other lanes told of the chunk before comes first
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

// The rows that a copying warp copies, piece by piece in the order of chunks.
struct Copies {
    const CombineParams& p;
    const Shared& shared;
    const char* lists;  // the first source's picks
    char* rows;
    int list_bytes, pieces, piece_bytes;
    int part_of = 0;            // chunk * ranks + source
    int listed, units, stride;  // a unit: a piece of all rows that a listed token has here
    uint32_t next_place = kNoPlace;
    unsigned left = 0;  // of the current unit: its picks to be copied
    int start = 0, chunk = 0;
    int64_t from_here = 0, to_here = 0;  // this lane's pick's

    DT_DEVICE Copies(const CombineParams& params, const Layout& layout, const Shared& all) : p(params), shared(all) {
        char* own = space_of(p, p.rank);
        lists = reinterpret_cast<const char*>(List(own + layout.list(p.set, 0), p).places);
        list_bytes = static_cast<int>(layout.list_bytes);
        rows = own + layout.rows + p.set * layout.rows_bytes;
        const int row_bytes = 2 * p.hidden;
        pieces = (row_bytes + kStageBytes - 1) / kStageBytes;
        piece_bytes = (row_bytes / 16 + pieces - 1) / pieces * 16;
        units = shared.before[kChunks * p.num_ranks] * pieces;
        stride = gridDim.x * kCopyWarps;
        listed = blockIdx.x + threadIdx.x / 32 * gridDim.x;
        look();
    }

    DT_DEVICE void look() {
        if (listed >= units) return;
        const int token = listed / pieces;
        while (shared.before[part_of + 1] <= token) ++part_of;
        const int source = part_of % p.num_ranks;
        const int i = shared.chunks[source * (kChunks + 1) + part_of / p.num_ranks] + token - shared.before[part_of];
        const auto* picks = reinterpret_cast<const uint32_t*>(lists + int64_t{source} * list_bytes) + i * p.top_k;
        const int lane = threadIdx.x % 32;
        next_place = lane < p.top_k ? picks[lane] : kNoPlace;
    }

    // Whether there is another piece; it is then the first of `left`.
    DT_DEVICE bool next() {
        while (left == 0) {
            if (listed >= units) return false;
            const int source = part_of % p.num_ranks;
            chunk = part_of / p.num_ranks;
            start = listed % pieces * piece_bytes;
            const uint32_t place = next_place;
            if (place != kNoPlace) {
                const int e = place >> kIndexBits, index = place & ((1u << kIndexBits) - 1);
                const Place first = shared.places[e * p.num_ranks + source];
                from_here = int64_t{e} * p.num_ranks * p.max_tokens + first.begin + index;
                to_here = first.compact + index;
            }
            left = __ballot_sync(0xffffffffu, place != kNoPlace);
            listed += stride;
            look();
        }
        return true;
    }
};

// The copy engine brings pieces into a ring of shared memory and takes them on from there. A chunk is ended when its pieces
// have been written, which is a few pieces later.
DT_DEVICE void copy_rows(const CombineParams& p, const Layout& layout, Control* mine, const Shared& shared, uint32_t number,
                         char* stages, uint64_t* full) {
    const int lane = threadIdx.x % 32, row_bytes = 2 * p.hidden;
    if (lane < kStages) barrier_init(full + lane, 1);
    barrier_init_visible();
    __syncwarp();
    Copies copies(p, layout, shared);
    uint32_t loaded = 0, stored = 0;
    // Lane s: where the piece in stage s goes, and how long it is. Lane c: how many pieces come before the end of chunk c.
    char* to_of_stage = nullptr;
    int bytes_of_stage = 0, chunk_of_stage = 0;
    uint32_t end_of_chunk = 0;
    int ended = 0, told = 0;  // chunks
    for (;;) {
        bulk_wait_read<kStages - kAhead>();
        while (loaded - stored < kAhead && copies.next()) {
            const int pick = __ffs(copies.left) - 1, stage = loaded % kStages;
            copies.left &= copies.left - 1;
            const int64_t from = __shfl_sync(0xffffffffu, copies.from_here, pick);
            const int64_t to = __shfl_sync(0xffffffffu, copies.to_here, pick);
            const int behind = row_bytes - copies.start, bytes = behind < copies.piece_bytes ? behind : copies.piece_bytes;
            if (lane == stage) {
                to_of_stage = copies.rows + to * row_bytes + copies.start;
                bytes_of_stage = bytes;
                chunk_of_stage = copies.chunk;
            }
            if (lane == 0) {
                barrier_expect(full + stage, bytes);
                bulk_load(stages + stage * kStageBytes, reinterpret_cast<const char*>(p.y) + from * row_bytes + copies.start,
                          bytes, full + stage);
            }
            ++loaded;
        }
        if (loaded == stored) break;
        const int stage = stored % kStages;
        const int chunk = __shfl_sync(0xffffffffu, chunk_of_stage, stage);
        for (; ended < chunk; ++ended)
            if (lane == ended) end_of_chunk = stored;
        auto* to = reinterpret_cast<char*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(to_of_stage), stage));
        const int bytes = __shfl_sync(0xffffffffu, bytes_of_stage, stage);
        barrier_wait(full + stage, stored / kStages % 2);
        if (lane == 0) bulk_store(to, stages + stage * kStageBytes, bytes);
        bulk_commit();
        ++stored;
        while (told < ended && stored - __shfl_sync(0xffffffffu, end_of_chunk, told) >= kLag) {
            bulk_wait_written_but<kLag>();
            end_chunk(p, mine, shared.present, number, told++);
        }
    }
    bulk_wait_written();
    while (told < kChunks) end_chunk(p, mine, shared.present, number, told++);
}

#else
DT_DEVICE void copy_rows(const CombineParams&, const Layout&, Control*, const Shared&, uint32_t, char*, uint64_t*) {}
#endif

// By one warp of each block, the only one that asks for flags: tells the pulling warps which chunks all peers have copied.
DT_DEVICE void watch(const CombineParams& p, Control* mine, Shared& shared, uint32_t number) {
    shared.sources.wait(p, mine, number, 1);
    const uint64_t came = shared.sources.came, start = global_timer();
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32)
            while (is_in(came, peer) && !reached(load_acquire_sys(mine->shown[p.set].at + peer), number * kSteps + chunk + 1)) {
                if (global_timer() - start > p.timeout_ns) give_up(p, peer);
                if (is_masked(p, peer)) break;  // it ended halfway: what it showed last time is taken for its rows
                __nanosleep(50);
            }
        __syncwarp();
        __threadfence_block();
        if (threadIdx.x % 32 == 0) *static_cast<volatile int*>(&shared.ready) = chunk + 1;
    }
}

DT_DEVICE void wait_for_chunk(const Shared& shared, int chunk) {
    while (*static_cast<const volatile int*>(&shared.ready) <= chunk) __nanosleep(20);
    __threadfence_block();
    __syncwarp();
}

__global__ void __launch_bounds__(kThreads, 1) combine_whole_kernel(const __grid_constant__ CombineParams p, const int splits) {
    extern __shared__ __align__(128) char ring[];
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
    if (threadIdx.x == 0) shared.before[0] = shared.ready = 0;
    if (threadIdx.x < 32) sum_up(shared.before + 1, kChunks * p.num_ranks);
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (warp < kCopyWarps) {
        auto* full = reinterpret_cast<uint64_t*>(ring + kCopyWarps * kStages * kStageBytes) + warp * kStages;
        copy_rows(p, layout, mine, shared, number, ring + warp * kStages * kStageBytes, full);
    } else if (warp == kCopyWarps) {
        watch(p, mine, shared, number);
    } else {
        wait_for_chunk(shared, 0);  // by then it is known where the rows are
        const Place* places = places_of(p, layout);
        const int64_t units = int64_t{p.num_tokens} * splits, stride = int64_t{gridDim.x} * kPullWarps;
        int64_t unit = blockIdx.x + static_cast<int64_t>(warp - kCopyWarps - 1) * gridDim.x;
        int chunk = 0;
        Picks next(p, shared.sources, places, unit < units ? unit / splits : -1);
        for (; unit < units; unit += stride) {
            const int64_t t = unit / splits, after = unit + stride;
            const Picks picks = next;
            next = Picks(p, shared.sources, places, after < units ? after / splits : -1);
            if (const int now = static_cast<int>(t) / chunk_tokens(p); chunk < now) wait_for_chunk(shared, chunk = now);
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

bool can_combine_whole() {
    cudaFuncAttributes attributes;
    DT_CUDA(cudaFuncGetAttributes(&attributes, combine_whole_kernel));
    return attributes.ptxVersion >= 90;
}

void launch_combine_whole(const CombineParams& p, cudaStream_t stream) {
    const int pieces = (2 * p.hidden + 511) / 512;  // of a row: a unit's
    DT_CUDA(cudaFuncSetAttribute(combine_whole_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    combine_whole_kernel<<<p.num_sms, kThreads, kSharedBytes, stream>>>(p, pieces);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
