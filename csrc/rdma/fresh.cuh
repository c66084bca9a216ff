// The kernels that make a fresh dispatch's tables. No launches here, nor anything but plain CUDA: tests/fresh_on_cpu.cpp runs
// this very text on a CPU, where it is compared with torch's twins.
#pragma once

#include "fresh.hpp"
#include "params.hpp"

namespace deepep_train::rdma {

template <typename T>
__device__ T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

// Whether this rank's buffer has failed, here or within its node.
__device__ inline bool is_broken(const End& end) {
    return *static_cast<const volatile uint32_t*>(end.failed) != 0 ||
           *static_cast<const volatile uint32_t*>(end.node_failed) != 0;
}

// By every thread of a block, of whole warps: how many of those before this one have `hit`, and, in `all`, how many there are.
__device__ inline int number_among(bool hit, int& all) {
    __shared__ int hits[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned mine = __ballot_sync(0xffffffffu, hit);
    if (lane == 0) hits[warp] = __popc(mine);
    __syncthreads();
    int before = __popc(mine & ((1u << lane) - 1));
    all = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) {
        before += w < warp ? hits[w] : 0;
        all += hits[w];
    }
    __syncthreads();
    return before;
}

// By a warp: the sum of the lanes' values up to this one's.
__device__ inline int sum_upto(int value) {
    const int lane = threadIdx.x % 32;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, value, distance);
        if (lane >= distance) value += other;
    }
    return value;
}

// This rank's row of counts, and its tokens' places. A block a node, and one for what is known already.
__device__ inline void tell(const TellParams& p) {
    auto* row = at<int32_t>(p.row);
    const int node = blockIdx.x, local = p.num_ranks / p.num_nodes, experts_at = kHead + p.num_ranks + p.num_nodes;
    if (node == p.num_nodes) {
        const bool here = p.status == 0;
        for (int i = threadIdx.x; i < p.num_ranks; i += blockDim.x)
            row[kHead + i] = here ? at<const int32_t>(p.num_tokens_per_rank)[i] : 0;
        for (int i = threadIdx.x; i < p.row_words - experts_at; i += blockDim.x)
            row[experts_at + i] = here && i < p.num_experts ? at<const int32_t>(p.num_tokens_per_expert)[i] : 0;
        if (threadIdx.x == 0) {
            constexpr int64_t kHalf = (int64_t{1} << 31) - 1;
            row[0] = p.status;
            row[1] = static_cast<int32_t>(p.signature & kHalf);
            row[2] = static_cast<int32_t>(p.signature >> 31 & kHalf);
            row[3] = p.bound;
            row[4] = here && *at<const int32_t>(p.wrong) != 0;
        }
        return;
    }
    int total = 0;
    for (int base = 0; p.status == 0 && base < p.num_tokens; base += blockDim.x) {
        const int64_t t = base + static_cast<int>(threadIdx.x);
        bool hit = false;
        if (t < p.num_tokens)
            for (int r = 0; r < local; ++r) hit |= at<const bool>(p.is_token_in_rank)[t * p.num_ranks + node * local + r];
        int all;
        const int before = number_among(hit, all);
        if (t < p.num_tokens) at<int32_t>(p.place)[t * p.num_nodes + node] = hit ? total + before : -1;
        total += all;
    }
    if (threadIdx.x == 0) row[kHead + p.num_ranks + node] = total;
}

// What all ranks' rows of counts come to, for one rank. One block.
struct Digest {
    static constexpr int kMostExperts = 4096;  // of all ranks together
    const End& end;
    const DigestParams& p;

    __device__ const int32_t* row(int rank) const {
        return at<const int32_t>(p.table) + static_cast<int64_t>(rank) * p.row_words;
    }
    __device__ int nodes() const { return p.num_ranks / p.num_local_ranks; }
    __device__ int to_rank(int from, int to) const { return row(from)[kHead + to]; }
    __device__ int to_node(int from, int node) const { return row(from)[kHead + p.num_ranks + node]; }
    __device__ int picks(int from, int expert) const { return row(from)[kHead + p.num_ranks + nodes() + expert]; }
    __device__ int bound(int rank) const { return row(rank)[3]; }
    __device__ bool is_odd(int rank) const {
        const int32_t *theirs = row(rank), *ours = row(p.rank);
        return theirs[0] != 0 || theirs[4] != 0 || theirs[1] != ours[1] || theirs[2] != ours[2];
    }

    // Adds up `columns` numbers of every rank's row: `sums` begins with zeros. Where there are fewer columns than threads,
    // several threads take a share of a column's ranks each; at thousands of ranks the time is that of their loads.
    template <typename Number>
    __device__ void add_up(int columns, const Number& number, int32_t* sums) const {
        const int threads = static_cast<int>(blockDim.x), shares = columns == 0 || columns > threads ? 1 : threads / columns;
        for (int i = threadIdx.x; i < columns * shares; i += threads) {
            const int column = i % columns;
            int sum = 0;
            for (int rank = i / columns; rank < p.num_ranks; rank += shares) sum += number(rank, column);
            atomicAdd(sums + column, sum);
        }
    }

    // The rows of every rank's tensor, and, of this rank, its experts'. `sums`: room for a number of each expert.
    __device__ void count_rows(int* padded, int* sums) const {
        auto* rows = at<int32_t>(p.rows);
        for (int r = threadIdx.x; r < p.num_ranks; r += blockDim.x) rows[r] = 0;
        for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x) sums[e] = 0;
        __syncthreads();
        if (p.expert_layout == 0) add_up(p.num_ranks, [&](int from, int rank) { return to_rank(from, rank); }, rows);
        add_up(p.num_experts, [&](int from, int expert) { return picks(from, expert); }, sums);
        __syncthreads();
        const int local = p.num_experts / p.num_ranks;
        for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x) {
            const int sum = (sums[e] + p.alignment - 1) / p.alignment * p.alignment;
            if (p.expert_layout != 0) atomicAdd(rows + e / local, sum);
            if (e / local == p.rank) {
                padded[e % local] = sum;
                at<int64_t>(p.tokens_per_expert)[e % local] = sum;
            }
        }
        __syncthreads();
        for (int e = threadIdx.x; e < local; e += blockDim.x) {
            int base = 0;
            for (int before = 0; before < e; ++before) base += padded[before];
            at<int32_t>(p.expert_base)[e] = base;
        }
    }

    // This rank's two streams with every node, and what it forwards; a warp takes one rank of this node, or one stream.
    __device__ void lay_out() const {
        const int warps = blockDim.x / 32, local = p.num_local_ranks;
        for (int i = threadIdx.x / 32; i < local + 2; i += warps) {
            if (i < local)
                place_rank(i);
            else
                place_stream(i == local);
        }
    }

    // Rows for the local rank `r`, from every rank.
    __device__ void place_rank(int r) const {
        const int local = p.num_local_ranks, node = p.rank / local, rail = p.rank % local;
        int before = 0;
        for (int base = 0; base < p.num_ranks; base += 32) {
            const int from = base + static_cast<int>(threadIdx.x % 32);
            const bool is_rank = from < p.num_ranks;
            const int rows = is_rank ? to_rank(from, node * local + r) : 0, upto = before + sum_upto(rows);
            if (is_rank && from % local == rail) {
                at<int32_t>(p.theirs)[from / local * local + r] = rows;
                at<int32_t>(p.begin)[from / local * local + r] = upto - rows;
            }
            if (is_rank && r == rail) at<int32_t>(p.received_upto)[from] = upto;
            before = __shfl_sync(0xffffffffu, upto, 31);
        }
        if (r == rail && threadIdx.x % 32 == 0) at<int32_t>(p.found)[kNumReceived] = before;
    }

    // Where each node's rows begin, of those that leave or of those that come.
    __device__ void place_stream(bool sends) const {
        const int local = p.num_local_ranks, node = p.rank / local, rail = p.rank % local;
        auto* out = at<int32_t>(sends ? p.send_at : p.recv_at);
        if (threadIdx.x % 32 == 0) out[0] = 0;
        int before = 0;
        for (int base = 0; base < nodes(); base += 32) {
            const int n = base + static_cast<int>(threadIdx.x % 32);
            const int rows = n >= nodes() ? 0 : sends ? to_node(p.rank, n) : to_node(n * local + rail, node);
            const int upto = before + sum_upto(rows);
            if (n < nodes()) out[n + 1] = upto;
            before = __shfl_sync(0xffffffffu, upto, 31);
        }
    }

    // No CPU need wait for this, so the kernels behind it must find the buffer failed; every rank finds the same.
    __device__ void fail(int verdict, int most) const {
        auto* report = at<volatile int64_t>(p.report);
        for (int r = threadIdx.x; r < p.num_ranks; r += blockDim.x) {
            const bool over = verdict == kOverflow && bound(r) != 0 && at<int32_t>(p.rows)[r] > bound(r);
            report[kReportHead + r] = verdict == kBad ? row(r)[4] != 0 ? kAtFaultMiscounted : is_odd(r) : over;
            report[kReportHead + p.num_ranks + r] = bound(r);
            report[kReportHead + 2 * p.num_ranks + r] = verdict == kBad ? 0 : at<int32_t>(p.rows)[r];
        }
        __threadfence_system();
        __syncthreads();
        if (threadIdx.x != 0) return;
        report[0] = verdict;
        report[1] = most;
        report[2] = p.widest;
        __threadfence_system();
        if (atomicExch(end.failed, 1u) != 0) return;
        end.page->number = *end.number;
        end.page->cause = kCounts;
        __threadfence_system();
        end.page->failed = 1;
        __threadfence_system();
    }
};

__device__ inline void digest(const End& end, const DigestParams& p) {
    __shared__ int padded[Digest::kMostExperts], sums[Digest::kMostExperts];
    __shared__ int odd, over, bounded, most, broken;
    const Digest d{end, p};
    if (threadIdx.x == 0) {
        odd = over = bounded = most = 0;
        broken = is_broken(end);
    }
    __syncthreads();
    if (broken == 0) {
        for (int r = threadIdx.x; r < p.num_ranks; r += blockDim.x) {
            if (d.is_odd(r)) odd = 1;
            if (d.bound(r) != 0) bounded = 1;
        }
        __syncthreads();
    }
    if (broken == 0 && odd == 0) {
        int most_here = 0;
        for (int i = threadIdx.x; i < p.num_ranks * d.nodes(); i += blockDim.x) {
            const int rows = d.to_node(i / d.nodes(), i % d.nodes());
            most_here = rows > most_here ? rows : most_here;
        }
        atomicMax(&most, most_here);
        d.count_rows(padded, sums);
        d.lay_out();
        __syncthreads();
        for (int r = threadIdx.x; r < p.num_ranks; r += blockDim.x)
            if (d.bound(r) != 0 && at<volatile int32_t>(p.rows)[r] > d.bound(r)) over = 1;
        __syncthreads();
    }
    const int verdict = broken != 0                              ? kFailedBefore
                        : odd != 0                               ? kBad
                        : over != 0                              ? kOverflow
                        : bounded != 0 && int64_t{most} > p.room ? kNoRoom
                                                                 : kFine;
    if (verdict != kFine) {
        if (broken == 0 && bounded != 0) d.fail(verdict, most);
        for (int64_t i = threadIdx.x; i < p.result_words; i += blockDim.x) at<int32_t>(p.tokens_per_expert)[i] = 0;
        // Nobody of this node waits for this rank: all of them have learned in the meeting before what it has.
        if (threadIdx.x == 0 && (broken != 0 || bounded != 0)) atomicExch(end.node_failed, 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        auto* found = at<int32_t>(p.found);
        found[kVerdict] = verdict;
        found[kBounded] = bounded;
        found[kNumRows] = verdict == kFine ? at<int32_t>(p.rows)[p.rank] : 0;
        found[kMost] = most;
        found[kGoes] = verdict == kFine && int64_t{most} <= p.room;
    }
}

__device__ inline int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t num_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// One of the words of token t's row for a node.
__device__ inline int32_t word_of(const PackParams& p, int64_t t, int node, int word) {
    if (word == 0) return static_cast<int32_t>(t);
    word -= 1;
    if (word < p.top_k) return static_cast<int32_t>(at<const int64_t>(p.topk_idx)[t * p.top_k + word]);
    word -= p.top_k;
    if (p.topk_weights != 0) {
        if (word < p.top_k) return at<const int32_t>(p.topk_weights)[t * p.top_k + word];
        word -= p.top_k;
    }
    const int local = p.num_ranks / p.num_nodes;
    const bool* goes = at<const bool>(p.is_token_in_rank) + t * p.num_ranks + node * local;
    unsigned bits = 0;
    for (int bit = 0; bit < 32 && word * 32 + bit < local; ++bit) bits |= unsigned{goes[word * 32 + bit]} << bit;
    return static_cast<int32_t>(bits);
}

__device__ inline void pack_words(const PackParams& p) {
    for (int64_t i = thread_number(); i < static_cast<int64_t>(p.num_tokens) * p.num_nodes; i += num_threads()) {
        const int place = at<const int32_t>(p.place)[i];
        if (place < 0) continue;
        const int64_t t = i / p.num_nodes;
        const int node = static_cast<int>(i % p.num_nodes);
        const int64_t row = at<const int32_t>(p.send_at)[node] + place;
        at<int32_t>(p.token)[row] = static_cast<int32_t>(t);
        for (int word = 0; p.words != 0 && word < p.row_words; ++word)
            at<int32_t>(p.words)[row * p.row_words + word] = word_of(p, t, node, word);
    }
}

// A block for each source on the rail and each rank of this node. A source's rows beyond those that it has counted for a rank
// have no place there, whatever their bits say: a stream that failed brings words full of ones.
__device__ inline void find_slots(const SlotParams& p) {
    const int source = blockIdx.x / p.num_local_ranks, rank = blockIdx.x % p.num_local_ranks;
    const auto *recv_at = at<const int32_t>(p.recv_at), *theirs = at<const int32_t>(p.theirs);
    auto *slot = at<int32_t>(p.slot), *number = at<int32_t>(p.number);
    const int begin = at<const int32_t>(p.begin)[source * p.num_local_ranks + rank];
    const int counted = theirs[source * p.num_local_ranks + rank];
    int total = 0, sooner = 0;
    for (int n = 0; n < source; ++n) sooner += theirs[n * p.num_local_ranks + rank];
    for (int base = recv_at[source]; base < recv_at[source + 1]; base += blockDim.x) {
        const int64_t f = base + static_cast<int>(threadIdx.x);
        const bool inside = f < recv_at[source + 1];
        const bool hit =
            inside && (reinterpret_cast<const volatile uint32_t*>(at<const uint64_t>(p.addresses)[f])[p.mask_at + rank / 32] >>
                           rank % 32 &
                       1) != 0;
        int all;
        const int within = total + number_among(hit, all);
        const bool goes = hit && within < counted;
        if (inside) {
            slot[f * p.num_local_ranks + rank] = goes ? begin + within : -1;
            number[f * p.num_local_ranks + rank] = goes ? sooner + within : -1;
        }
        total += all;
    }
    for (int64_t i = static_cast<int64_t>(recv_at[p.num_nodes]) * p.num_local_ranks + thread_number();
         i < p.capacity * p.num_local_ranks; i += num_threads())
        slot[i] = number[i] = -1;
}

__device__ inline void unpack_words(const End& end, const UnpackParams& p) {
    const auto* upto = at<const int32_t>(p.received_upto);
    const int num_received = *at<const int32_t>(p.num_received), parts = p.top_k + 1;
    const int32_t nothing = is_broken(end) ? -1 : 0;  // NaN
    for (int64_t i = thread_number(); i < p.capacity * parts; i += num_threads()) {
        const int64_t n = i / parts;
        const int k = static_cast<int>(i % parts) - 1;
        const bool here = n < num_received;
        const auto* words = at<const int32_t>(p.words) + n * p.row_words;
        if (k < 0) {
            int first = 0, last = p.num_ranks - 1;  // the first rank with more rows up to it than n
            while (first < last) {
                const int middle = (first + last) / 2;
                if (upto[middle] > n)
                    last = middle;
                else
                    first = middle + 1;
            }
            at<int32_t>(p.source)[2 * n] = here ? first : 0;
            at<int32_t>(p.source)[2 * n + 1] = here ? words[0] : 0;
            continue;
        }
        const int expert = here ? words[1 + k] - p.first_expert : -1;
        const bool local = expert >= 0 && expert < p.num_local_experts && words[1 + k] >= 0;
        at<int64_t>(p.topk_idx)[n * p.top_k + k] = local ? expert : -1;
        if (p.topk_weights != 0) at<int32_t>(p.topk_weights)[n * p.top_k + k] = local ? words[1 + p.top_k + k] : nothing;
    }
}

__device__ inline void move_weights(const End& end, const WeightParams& p) {
    const bool broken = is_broken(end);
    auto *by_pick = at<int32_t>(p.by_pick), *by_row = at<int32_t>(p.by_row);
    for (int64_t i = thread_number(); i < p.num_picks; i += num_threads()) {
        const int row = broken ? -1 : at<const int32_t>(p.pick_row)[i];
        if (p.back != 0)
            by_pick[i] = row >= 0 ? by_row[row] : broken ? -1 : 0;
        else if (row >= 0)
            by_row[row] = by_pick[i];
    }
    for (int64_t i = thread_number(); broken && p.back == 0 && i < p.num_rows; i += num_threads()) by_row[i] = -1;
}

}  // namespace deepep_train::rdma
