// The exchange of counts ("notify"): every rank writes its counts into every peer's control block and computes from all of them
// where its rows go at each destination, and what it will receive. One block.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kThreads = 1024;

__device__ void send_counts(const Domain& d, const CountParams& p, uint32_t epoch, Arguments arguments) {
    const auto* per_rank = reinterpret_cast<const int32_t*>(p.num_tokens_per_rank);
    const auto* per_expert = reinterpret_cast<const int32_t*>(p.num_tokens_per_expert);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool bad = arguments != kArgumentsFine;
    for (int peer = warp; peer < d.num_ranks; peer += kThreads / 32) {
        Control* there = d.control(peer);
        Counts* row = &there->counts[epoch % 2][d.rank];
        for (int i = lane; i < d.num_ranks; i += 32) row->per_rank[i] = bad ? 0 : per_rank[i];
        for (int i = lane; i < p.num_experts; i += 32) row->per_expert[i] = bad ? 0 : per_expert[i];
        if (lane == 0) {
            row->status = arguments;
            row->signature = p.signature;
            row->bound = p.bound;
        }
        delay_at_random(epoch);
        __threadfence_system();
        __syncwarp();
        if (lane == 0) store_release_sys(&there->counted_flag[d.rank], epoch);
    }
}

// Which ranks' arguments are wrong, or differ from ours.
__device__ uint64_t odd_ranks(const Domain& d, const CountParams& p, const Counts* table) {
    uint64_t odd = 0;
    for (int i = 0; i < d.num_ranks; ++i)
        if (table[i].status != kArgumentsFine || table[i].signature != p.signature) odd |= 1ull << i;
    return odd;
}

__device__ uint64_t miscounted_ranks(const Domain& d, const Counts* table) {
    uint64_t ranks = 0;
    for (int i = 0; i < d.num_ranks; ++i)
        if (table[i].status == kMiscounted) ranks |= 1ull << i;
    return ranks;
}

// A warp's inclusive scan.
DT_DEVICE int scan(int value, int lane) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// Tokens: where this rank's begin at every destination, and how many arrive.
__device__ void digest_tokens(const Domain& d, const CountParams& p, const Counts* table) {
    auto* prefix = reinterpret_cast<int32_t*>(p.rank_prefix_matrix);
    auto* send_base = reinterpret_cast<int32_t*>(p.send_base);
    for (int j = threadIdx.x; j < d.num_ranks; j += kThreads) {
        int sum = 0;
        for (int i = 0; i < d.num_ranks; ++i) {
            if (i == d.rank) send_base[j] = sum;
            sum += table[i].per_rank[j];
            prefix[i * d.num_ranks + j] = sum;
        }
        if (p.expert_layout == 0) d.host->rows[j] = sum;
        if (j == d.rank) {
            d.host->num_received = sum;
            *reinterpret_cast<int32_t*>(p.num_received) = sum;
            *reinterpret_cast<int32_t*>(p.num_several) = 0;
            *reinterpret_cast<int32_t*>(p.num_summed) = 0;
        }
        d.host->bound[j] = table[j].bound;
    }
}

// Picks of every expert: all of them rounded up, and where this rank's begin in the expert's group. A warp takes a rank's
// experts.
__device__ void digest_experts(const Domain& d, const CountParams& p, const Counts* table) {
    auto* expert_base = reinterpret_cast<int32_t*>(p.expert_base);
    auto* tokens_per_expert = reinterpret_cast<int64_t*>(p.tokens_per_expert);
    const int local = p.num_experts / d.num_ranks;
    const int lane = threadIdx.x % 32;
    for (int owner = threadIdx.x / 32; owner < d.num_ranks; owner += kThreads / 32) {
        int group = 0;  // first row of the next expert's group
        for (int base = 0; base < local; base += 32) {
            const int e = owner * local + base + lane;
            const bool inside = base + lane < local;
            int before = 0, all = 0;
            for (int i = 0; inside && i < d.num_ranks; ++i) {
                const int picks = table[i].per_expert[e];
                before += i < d.rank ? picks : 0;
                all += picks;
            }
            const int padded = (all + p.alignment - 1) / p.alignment * p.alignment;
            const int upto = scan(padded, lane);
            if (inside && p.expert_layout != 0) expert_base[e] = group + upto - padded + before;
            if (inside && owner == d.rank) {
                tokens_per_expert[base + lane] = padded;
                d.host->per_expert[base + lane] = padded;
            }
            group += __shfl_sync(0xffffffffu, upto, 31);
        }
        if (lane == 0 && p.expert_layout != 0) d.host->rows[owner] = group;
    }
}

// What a dispatch that fails leaves of its counts: the kernels behind it, and with num_worst_tokens the caller's, still read
// them.
__device__ void clear_results(const Domain& d, const CountParams& p) {
    auto* results = reinterpret_cast<int32_t*>(p.tokens_per_expert);
    for (int64_t i = threadIdx.x; i < p.result_words; i += kThreads) results[i] = 0;
}

__global__ void __launch_bounds__(kThreads, 1)
    count_kernel(const __grid_constant__ Domain d, const __grid_constant__ CountParams p) {
    __shared__ bool came, good, is_well;
    Control* mine = d.control(d.rank);
    const uint32_t epoch = mine->epoch + 1;
    if (threadIdx.x == 0) {
        good = false;
        is_well = mine->failed == 0;  // read once: a thread of this block may set it while others have still to look
    }
    __syncthreads();
    const bool miscounted = p.out_of_range != 0 && *reinterpret_cast<const int32_t*>(p.out_of_range) != 0;
    if (is_well) {
        send_counts(d, p, epoch, p.status != 0 ? kArgumentsWrong : miscounted ? kMiscounted : kArgumentsFine);
        if (threadIdx.x < 32) {
            const bool all = wait_for_flags(d, mine->counted_flag, mine->ready_flag, epoch, kCount, kMeetCounted);
            if (threadIdx.x == 0) came = all;
        }
        __syncthreads();
        if (came) {
            const Counts* table = mine->counts[epoch % 2];
            const uint64_t odd = odd_ranks(d, p, table);
            if (odd == 0) {
                digest_tokens(d, p, table);
                digest_experts(d, p, table);
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                d.host->counts_bad = odd != 0;
                uint64_t over = 0;
                bool bounded = false;
                for (int i = 0; i < d.num_ranks; ++i) {
                    bounded |= table[i].bound != 0;
                    if (odd == 0 && table[i].bound != 0 && d.host->rows[i] > table[i].bound) over |= 1ull << i;
                }
                // On a rank with num_worst_tokens no CPU waits for this, so the kernels must stop the dispatch, on every rank.
                if (bounded && odd != 0)
                    record_failure(d, epoch, kCount, kMeetCounted, kBadCounts, odd,
                                   static_cast<int64_t>(miscounted_ranks(d, table)));
                if (over != 0) record_failure(d, epoch, kCount, kMeetCounted, kOverflow, over);
                good = odd == 0 && over == 0;
            }
        }
    }
    __syncthreads();
    if (!good) clear_results(d, p);
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        mine->epoch = epoch;
        // Behind the barrier: the CPU is about to read what other threads wrote, and a fence orders for its own thread alone.
        __threadfence_system();
        d.host->ticket = p.ticket;
        __threadfence_system();
    }
}

}  // namespace

void launch_count(const Domain& d, const CountParams& p, cudaStream_t stream) {
    count_kernel<<<1, kThreads, 0, stream>>>(d, p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
