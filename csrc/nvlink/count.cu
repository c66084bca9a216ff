// The exchange of counts ("notify"): every rank writes its counts into every peer's control block and computes from all of them
// where its rows go at each destination, and what it will receive. One block.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kThreads = 1024;

__device__ void send_counts(const Domain& d, const CountParams& p, uint32_t epoch, bool bad) {
    const auto* per_rank = reinterpret_cast<const int32_t*>(p.num_tokens_per_rank);
    const auto* per_expert = reinterpret_cast<const int32_t*>(p.num_tokens_per_expert);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int peer = warp; peer < d.num_ranks; peer += kThreads / 32) {
        Control* there = d.control(peer);
        Counts* row = &there->counts[epoch % 2][d.rank];
        for (int i = lane; i < d.num_ranks; i += 32) row->per_rank[i] = bad ? 0 : per_rank[i];
        for (int i = lane; i < p.num_experts; i += 32) row->per_expert[i] = bad ? 0 : per_expert[i];
        if (lane == 0) {
            row->status = bad;
            row->signature = p.signature;
            row->bound = p.bound;
        }
        __syncwarp();
        __threadfence_system();
        __syncwarp();
        if (lane == 0) store_release_sys(&there->counted_flag[d.rank], epoch);
    }
}

// After every peer's counts are here.
__device__ void digest_counts(const Domain& d, const CountParams& p, uint32_t epoch) {
    const Counts* table = d.control(d.rank)->counts[epoch % 2];
    auto* prefix = reinterpret_cast<int32_t*>(p.rank_prefix_matrix);
    auto* send_base = reinterpret_cast<int32_t*>(p.send_base);
    for (int j = threadIdx.x; j < d.num_ranks; j += kThreads) {
        int sum = 0;
        for (int i = 0; i < d.num_ranks; ++i) {
            if (i == d.rank) send_base[j] = sum;
            const int rows = table[i].per_rank[j];
            d.host->per_rank[i][j] = rows;
            sum += rows;
            prefix[i * d.num_ranks + j] = sum;
        }
        if (j == d.rank) d.host->num_received = sum;
    }
    const int local = p.num_experts / d.num_ranks;
    for (int e = threadIdx.x; e < local; e += kThreads) {
        int sum = 0;
        for (int i = 0; i < d.num_ranks; ++i) sum += table[i].per_expert[d.rank * local + e];
        d.host->per_expert[e] = sum;
    }
    if (threadIdx.x == 0) {
        uint32_t bad = 0;
        for (int i = 0; i < d.num_ranks; ++i) {
            bad |= table[i].status != 0 || table[i].signature != p.signature;
            d.host->bound[i] = table[i].bound;
        }
        d.host->counts_bad = bad;
    }
}

__global__ void __launch_bounds__(kThreads, 1) count_kernel(const Domain d, const CountParams p) {
    __shared__ bool came;
    Control* mine = d.control(d.rank);
    const uint32_t epoch = mine->epoch + 1;
    const bool bad = p.status != 0 || (p.out_of_range != 0 && *reinterpret_cast<const int32_t*>(p.out_of_range) != 0);
    if (mine->failed == 0) {
        send_counts(d, p, epoch, bad);
        if (threadIdx.x < 32) came = wait_for_flags(d, mine->counted_flag, epoch, kCount, kMeetCounted);
        __syncthreads();
        if (came) digest_counts(d, p, epoch);
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        mine->epoch = epoch;
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
