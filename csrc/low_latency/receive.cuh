// What a rank does with what is dispatched to it: waits for every source's rows and copies each to its places, [L, R * M, H],
// ordered by expert, source and token.
#pragma once

#include "space.cuh"

namespace deepep_train::low_latency {

constexpr int kMostWords = kMaxHidden / kBlock / 32;  // of a row's scales, for each lane

struct Receiving {
    int32_t begin[kMaxExperts];     // [L, R]: a source's first row among those of the expert
    int32_t counts[kMaxExperts];    // [L, R]
    int32_t all[kMaxExperts];       // [L]
    int32_t tokens[kMaxRanks + 1];  // those listed by the sources before
    uint64_t came;
    const char* spaces[kMaxRanks];  // where a source's rows lie
};

// Reads the lists' heads.
inline __device__ void count_rows(const DispatchParams& p, const Layout& layout, Receiving& shared) {
    const char* own = space_of(p, p.rank);
    const int ranks = p.num_ranks, local = p.num_experts / ranks;
    for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) {
        const int source = i / local, e = i % local;
        const List list(const_cast<char*>(own) + layout.list(p.set, source), p);
        shared.counts[e * ranks + source] = is_in(shared.came, source) ? list.counts[e] : 0;
    }
    for (int source = threadIdx.x; source < ranks; source += blockDim.x) {
        const List list(const_cast<char*>(own) + layout.list(p.set, source), p);
        shared.tokens[source + 1] = is_in(shared.came, source) ? list.head[0] : 0;
        shared.spaces[source] = is_in(shared.came, source) && list.head[1] != 0 ? space_of(p, source) : own;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < local; e += blockDim.x) {
        int sum = 0;
        for (int source = 0; source < ranks; ++source) {
            shared.begin[e * ranks + source] = sum;
            sum += shared.counts[e * ranks + source];
        }
        shared.all[e] = sum;
    }
    if (threadIdx.x == blockDim.x - 32) shared.tokens[0] = 0;
    if (threadIdx.x >= blockDim.x - 32) sum_up(shared.tokens + 1, ranks);
    __syncthreads();
}

// By one block: what the caller gets beside the rows, what combine will need here, and where the sources' rows are, for them.
inline __device__ void report(const DispatchParams& p, const Layout& layout, Control* mine, uint32_t number,
                              Receiving& shared) {
    const int ranks = p.num_ranks, local = p.num_experts / ranks;
    for (int e = threadIdx.x; e < local; e += blockDim.x) {
        mine->num_rows[p.set][e] = shared.all[e];
        reinterpret_cast<int32_t*>(p.recv_count)[e] = shared.all[e];
        if (p.cumulative != 0) reinterpret_cast<int32_t*>(p.cumulative)[e] += shared.all[e];
    }
    for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x)
        reinterpret_cast<int64_t*>(p.ranges)[i] = int64_t{shared.begin[i]} << 32 | static_cast<uint32_t>(shared.counts[i]);
    __syncthreads();
    if (threadIdx.x < 32) sum_up(shared.all, local);
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) {
        const int source = i / local, e = i % local;
        const int begin = shared.begin[e * ranks + source];
        const Place place{begin, (e == 0 ? 0 : shared.all[e - 1]) + begin};
        auto* own = reinterpret_cast<Place*>(space_of(p, p.rank) + layout.own_places + p.set * layout.place_bytes);
        own[e * ranks + source] = place;
        if (!is_in(shared.came, source)) continue;
        auto* places = reinterpret_cast<Place*>(space_of(p, source) + layout.places + p.set * layout.place_bytes);
        places[p.rank * local + e] = place;
        if (e == 0) control_of(p, source)->placed[p.set].at[p.rank] = number;
    }
}

// By every block of a launch, the `number`-th dispatch of its set.
DT_DEVICE void receive(const DispatchParams& p, Control* mine, uint32_t number, Receiving& shared) {
    if (threadIdx.x < 32) {
        const uint64_t wait_ns = blockIdx.x == 0 ? p.wait_ns : 0;
        const uint64_t came = wait_for_peers(p, mine->sent[p.set], number, mine->decided[p.set][0], number, wait_ns);
        if (threadIdx.x == 0) shared.came = came;
    }
    __syncthreads();
    const Layout layout(p);
    count_rows(p, layout, shared);

    const int row_bytes = p.scales == kBf16 ? 2 * p.hidden : p.hidden, warps = blockDim.x / 32;
    const int scale_words = p.scales == kBf16 ? 0 : p.hidden / kBlock / (p.scales == kPackedScales ? 4 : 1);
    using Part = Piece<7>;
    const int lane = threadIdx.x % 32, ranks = p.num_ranks, pieces = Part::in(row_bytes);
    const int64_t slots = int64_t{ranks} * p.max_tokens;  // of an expert
    const int64_t units = int64_t{shared.tokens[ranks]} * pieces, stride = int64_t{gridDim.x} * warps;
    char* own = space_of(p, p.rank);
    // Of the next unit, this lane's pick and the token: looked up a turn ahead.
    int64_t unit = blockIdx.x + static_cast<int64_t>(threadIdx.x / 32) * gridDim.x;
    int source = 0, next_token = 0;
    uint32_t next_place = kNoPlace;
    const auto look = [&]() {
        if (unit >= units) return;
        const int listed = static_cast<int>(unit / pieces);
        while (shared.tokens[source + 1] <= listed) ++source;
        const List list(own + layout.list(p.set, source), p);
        const int64_t i = listed - shared.tokens[source];
        next_token = list.tokens[i];
        next_place = lane < p.top_k ? list.places[i * p.top_k + lane] : kNoPlace;
    };
    look();
    while (unit < units) {
        const int from = source, token = next_token, piece = static_cast<int>(unit % pieces);
        const uint32_t place = next_place;
        const char* slot = shared.spaces[from] + layout.slot(p.set, from, token);
        Part part;
        part.load(slot, piece * Part::kBytes, row_bytes);
        uint32_t words[kMostWords];
#pragma unroll
        for (int i = 0; i < kMostWords; ++i)
            if (piece == 0 && i * 32 + lane < scale_words)
                words[i] = reinterpret_cast<const volatile uint32_t*>(slot + row_bytes)[i * 32 + lane];
        unit += stride;
        look();
        int64_t row_here = 0;  // of all slots of all experts
        if (place != kNoPlace) {
            const int e = place >> kIndexBits, index = place & ((1u << kIndexBits) - 1);
            row_here = e * slots + shared.begin[e * ranks + from] + index;
            if (piece == 0) reinterpret_cast<int32_t*>(p.src_info)[row_here] = token;
        }
        for (unsigned left = __ballot_sync(0xffffffffu, place != kNoPlace); left != 0; left &= left - 1) {
            const int64_t row = __shfl_sync(0xffffffffu, row_here, __ffs(left) - 1);
            part.store_last(reinterpret_cast<char*>(p.recv_x) + row * row_bytes, piece * Part::kBytes, row_bytes);
            if (piece != 0) continue;
            // [L, words, slots]
            const int64_t e = row / slots;
            auto* to = reinterpret_cast<uint32_t*>(p.recv_scales) + e * scale_words * slots + (row - e * slots);
#pragma unroll
            for (int i = 0; i < kMostWords; ++i)
                if (i * 32 + lane < scale_words) to[(i * 32 + lane) * slots] = words[i];
        }
    }
    if (blockIdx.x == gridDim.x - 1) report(p, layout, mine, number, shared);
    if (!is_last_block(mine, p, kDispatchReceive, gridDim.x)) return;
    for (int peer = threadIdx.x; peer < ranks; peer += blockDim.x)
        if (is_in(shared.came, peer)) store_release_sys(&control_of(p, peer)->taken[p.set].at[p.rank], number);
}

}  // namespace deepep_train::low_latency
