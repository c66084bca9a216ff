// Dispatch, receiving: waits for every source's rows and copies each to its places, [L, R * M, H], ordered by expert, source
// and token.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "space.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 768;

struct Shared {
    int32_t begin[kMaxExperts];     // [L, R]: a source's first row among those of the expert
    int32_t counts[kMaxExperts];    // [L, R]
    int32_t all[kMaxExperts];       // [L]
    int32_t tokens[kMaxRanks + 1];  // those listed by the sources before
    uint64_t came;
    const char* spaces[kMaxRanks];  // where a source's rows lie
    int32_t next;                   // of the block's units
};

// Reads the lists' heads.
__device__ void count_rows(const DispatchParams& p, const Layout& layout, Shared& shared) {
    const char* own = own_space(p);
    const int ranks = p.num_ranks, local = p.num_experts / ranks;
    for (int i = threadIdx.x; i < p.num_experts; i += kThreads) {
        const int source = i / local, e = i % local;
        const List list(const_cast<char*>(own) + layout.list(p.set, source), p);
        shared.counts[e * ranks + source] = is_in(shared.came, source) ? list.counts[e] : 0;
    }
    for (int source = threadIdx.x; source < ranks; source += kThreads) {
        const List list(const_cast<char*>(own) + layout.list(p.set, source), p);
        shared.tokens[source + 1] = is_in(shared.came, source) ? list.head[0] : 0;
        shared.spaces[source] = is_in(shared.came, source) && list.head[1] != 0 ? space_of(p, source) : own;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < local; e += kThreads) {
        int sum = 0;
        for (int source = 0; source < ranks; ++source) {
            shared.begin[e * ranks + source] = sum;
            sum += shared.counts[e * ranks + source];
        }
        shared.all[e] = sum;
    }
    if (threadIdx.x == kThreads - 32) shared.tokens[0] = shared.next = 0;
    if (threadIdx.x >= kThreads - 32) sum_up(shared.tokens + 1, ranks);
    __syncthreads();
}

// By one block: what the caller gets beside the rows, what combine will need here, and where the sources' rows are, for them.
__device__ void report(const DispatchParams& p, const Layout& layout, Control* mine, uint32_t number, Shared& shared) {
    const int ranks = p.num_ranks, local = p.num_experts / ranks;
    for (int e = threadIdx.x; e < local; e += kThreads) {
        mine->num_rows[p.set][e] = shared.all[e];
        reinterpret_cast<int32_t*>(p.recv_count)[e] = shared.all[e];
        if (p.cumulative != 0) reinterpret_cast<int32_t*>(p.cumulative)[e] += shared.all[e];
    }
    for (int i = threadIdx.x; i < p.num_experts; i += kThreads)
        reinterpret_cast<int64_t*>(p.ranges)[i] = int64_t{shared.begin[i]} << 32 | static_cast<uint32_t>(shared.counts[i]);
    __syncthreads();
    if (threadIdx.x < 32) sum_up(shared.all, local);
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_experts; i += kThreads) {
        const int source = i / local, e = i % local;
        const int begin = shared.begin[e * ranks + source];
        const Place place{begin, (e == 0 ? 0 : shared.all[e - 1]) + begin};
        if (!is_in(shared.came, source)) continue;
        if (!is_local(p, source)) {
            begins_of(p, layout, source)[e] = place;
            continue;
        }
        auto* places = reinterpret_cast<Place*>(space_of(p, source) + layout.places + p.set * layout.place_bytes);
        places[p.rank * local + e] = place;
        if (e == 0) control_of(p, source)->placed[p.set].at[p.rank] = number;
    }
}

__global__ void __launch_bounds__(kThreads, 1) dispatch_receive_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ Shared shared;
    Control* mine = own_control(p);
    const uint32_t number = mine->dispatches[p.set];
    if (mine->closed != 0) return;
    if (threadIdx.x < 32) {
        const uint64_t wait_ns = blockIdx.x == 0 ? p.wait_ns : 0;
        const uint64_t came = wait_for_peers(p, mine->sent[p.set], number, mine->decided[p.set][0], number, wait_ns);
        if (threadIdx.x == 0) shared.came = came;
    }
    __syncthreads();
    const Layout layout(p);
    count_rows(p, layout, shared);

    const int row_bytes = p.scales == kBf16 ? 2 * p.hidden : p.hidden;
    using Part = Piece<7>;
    const int per_word = p.scales == kPackedScales ? 4 * kBlock : kBlock;            // values
    const int scale_words = p.scales == kBf16 ? 0 : p.hidden / per_word;             // of a row
    static_assert(Part::kBytes / kBlock <= 32 && Part::kBytes % (4 * kBlock) == 0);  // a piece's: one for each lane, at most
    const int lane = threadIdx.x % 32, ranks = p.num_ranks, pieces = Part::in(row_bytes);
    const int slots = ranks * p.max_tokens;  // of an expert
    const int units = shared.tokens[ranks] * pieces;
    char* own = own_space(p);
    // Units differ in how often they are written: a block's warps take them as they come. Of the next unit, this lane's pick
    // and the token are looked up a turn ahead.
    int unit = 0, source = 0, next_token = 0;
    uint32_t next_place = kNoPlace;
    const auto look = [&]() {
        int taken = lane == 0 ? atomicAdd(&shared.next, 1) : 0;
        taken = __shfl_sync(0xffffffffu, taken, 0);
        unit = blockIdx.x + taken * gridDim.x;
        if (unit >= units) return;
        const int listed = unit / pieces;
        while (shared.tokens[source + 1] <= listed) ++source;
        const List list(own + layout.list(p.set, source), p);
        const int64_t i = listed - shared.tokens[source];
        next_token = list.tokens[i];
        next_place = lane < p.top_k ? list.places[i * p.top_k + lane] : kNoPlace;
    };
    look();
    while (unit < units) {
        const int from = source, token = next_token, piece = unit % pieces;
        const uint32_t place = next_place;
        const char* slot = shared.spaces[from] + layout.slot(p.set, from, token);
        Part part;
        part.load(slot, piece * Part::kBytes, row_bytes);
        const int word = piece * (Part::kBytes / per_word) + lane;
        const bool has_word = lane < Part::kBytes / per_word && word < scale_words;
        uint32_t scale = 0;
        if (has_word) scale = reinterpret_cast<const volatile uint32_t*>(slot + row_bytes)[word];
        look();
        int row_here = 0;  // of all slots of all experts
        if (place != kNoPlace) {
            const int e = place >> kIndexBits, index = place & ((1u << kIndexBits) - 1);
            row_here = e * slots + shared.begin[e * ranks + from] + index;
            if (piece == 0) reinterpret_cast<int32_t*>(p.src_info)[row_here] = token;
        }
        for (unsigned left = __ballot_sync(0xffffffffu, place != kNoPlace); left != 0; left &= left - 1) {
            const int row = __shfl_sync(0xffffffffu, row_here, __ffs(left) - 1);
            part.store_last(reinterpret_cast<char*>(p.recv_x) + int64_t{row} * row_bytes, piece * Part::kBytes, row_bytes);
            if (scale_words == 0) continue;
            const int e = __shfl_sync(0xffffffffu, place, __ffs(left) - 1) >> kIndexBits;  // [L, words, slots]
            const int64_t at = int64_t{e * (scale_words - 1) + word} * slots + row;
            if (has_word) reinterpret_cast<uint32_t*>(p.recv_scales)[at] = scale;
        }
    }
    if (blockIdx.x == gridDim.x - 1) report(p, layout, mine, number, shared);
    if (!is_last_block(mine, p, kDispatchReceive)) return;
    for (int peer = threadIdx.x; peer < ranks; peer += kThreads)
        if (is_in(shared.came, peer) && is_local(p, peer))
            store_release_sys(&control_of(p, peer)->taken[p.set].at[p.rank], uint64_t{number});
}

}  // namespace

void launch_dispatch_receive(const DispatchParams& p, cudaStream_t stream) {
    dispatch_receive_kernel<<<p.num_sms, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
