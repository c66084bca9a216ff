// What the low-latency calls put to ranks of other nodes, behind each of csrc/low_latency's kernels: see docs/low_latency.md.
//
//   dispatch, send      the lists, and each token's row once a rank, from this rank's slots to those that are its own there
//   dispatch, receive   that the rows have been taken
//   combine, send       each row to the place of its pick at the rank that it belongs to
//   combine, receive    that the rows have been summed
//
// A flag leaves when all puts that it announces have been completed, over whatever queue pairs they went.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "../common/check.hpp"
#include "../low_latency/logfmt.cuh"
#include "../low_latency/space.cuh"
#include "kernels.hpp"

namespace deepep_train::rdma {

namespace {

using namespace low_latency;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

DT_DEVICE int pair_of(const Pairs& pairs) { return pairs.qps[blockIdx.x % pairs.count]; }

// Units of work, numbered over all peers, as they are dealt to the warps of a launch.
struct Deal {
    int warps, me, before = 0;

    DT_DEVICE Deal() : warps(gridDim.x * kWarps), me(threadIdx.x / 32 * gridDim.x + blockIdx.x) {}
    // This warp's first of the next `count`; the others follow by `warps`.
    DT_DEVICE int first(int count) {
        const int found = (me + warps - before % warps) % warps;
        before += count;
        return found;
    }
};

// The ranks of other nodes in turn, each rank beginning behind its own node. Rank -1: this one is left out.
struct Far {
    const Common& c;
    int count;

    DT_DEVICE explicit Far(const Common& common) : c(common), count(common.num_ranks - common.num_local) {}
    DT_DEVICE int operator[](int i) const {
        const int rank = (c.first_local + c.num_local + i) % c.num_ranks;
        return is_masked(c, rank) ? -1 : rank;
    }
};

// By one thread.
DT_DEVICE void count(const Common& c, int64_t bytes) {
    atomicAdd(reinterpret_cast<unsigned long long*>(c.put_bytes), static_cast<unsigned long long>(bytes));
}

// A warp's puts, all over the queue pair of its block.
struct Puts {
    const Common& c;
    nvshmemx_qp_handle_t qp;
    int64_t total = 0;

    // By a warp, all of whose lanes have written their parts of what is put.
    DT_DEVICE void put(char* symmetric, const char* from, int64_t bytes, int peer) {
        nvshmemx_qp_char_put_nbi_warp(symmetric, from, bytes, peer, qp);
        total += bytes;
    }
    // By every thread of the block: until the puts of all its warps have been completed there.
    DT_DEVICE void finish() {
        if (threadIdx.x % 32 == 0 && total != 0) count(c, total);
        __syncthreads();
        const Far far(c);
        for (int i = threadIdx.x; i < far.count; i += kThreads)
            if (far[i] >= 0) nvshmemx_qp_quiet(far[i], &qp, 1);
    }
};

// By one thread, behind all that the flag announces. It has arrived when this returns: a flag must not overtake a later one,
// nor come when the peer has begun anew.
DT_DEVICE void set_flag(Control::Flags& flags, const Common& c, uint64_t value, int peer, nvshmemx_qp_handle_t qp) {
    __threadfence_system();
    nvshmemx_qp_signal_op(flags.at + c.rank, value, NVSHMEM_SIGNAL_SET, peer, qp);
    count(c, sizeof(value));
    nvshmemx_qp_quiet(peer, &qp, 1);
}

__global__ void __launch_bounds__(kThreads, 1)
    put_dispatch_kernel(const __grid_constant__ Pairs pairs, const __grid_constant__ DispatchParams p) {
    Control* mine = own_control(p);
    if (mine->closed != 0) return;
    const uint32_t number = mine->dispatches[p.set];
    Puts puts{p, pair_of(pairs)};
    const Layout layout(p);
    const Far far(p);
    char* own = own_space(p);
    Deal deal;
    for (int i = 0; i < far.count; ++i) {
        const int peer = far[i];
        if (peer < 0) continue;
        char* address = own + layout.outgoing_list(peer);
        const List list(address, p);
        const int listed = list.head[0];
        for (int unit = deal.first(listed + 1); unit <= listed; unit += deal.warps) {
            if (unit == listed) {
                char* to = own + layout.list(p.set, p.rank);
                const auto* places = reinterpret_cast<const char*>(list.places);
                puts.put(to, address, reinterpret_cast<const char*>(list.tokens + listed) - address, peer);
                if (listed != 0) puts.put(to + (places - address), places, int64_t{4} * listed * p.top_k, peer);
            } else {
                char* slot = own + layout.slot(p.set, p.rank, list.tokens[unit]);
                puts.put(slot, slot, slot_bytes(p), peer);
            }
        }
    }
    puts.finish();
    if (!is_last_block(mine, p, kDispatchPut)) return;
    for (int i = threadIdx.x; i < far.count; i += kThreads)
        if (far[i] >= 0) set_flag(mine->sent[p.set], p, number, far[i], puts.qp);
}

// By a warp: a row that the experts have left where no network card reads it.
DT_DEVICE void pack(char* to, const char* from, int row_bytes) {
    using Part = Piece<8>;
    for (int start = 0; start < row_bytes; start += Part::kBytes) {
        Part part;
        part.load_last(from, start, row_bytes);
        part.store(to, start, row_bytes);
    }
    __threadfence_system();
    __syncwarp();
}

__global__ void __launch_bounds__(kThreads, 1)
    put_combine_kernel(const __grid_constant__ Pairs pairs, const __grid_constant__ CombineParams p) {
    Control* mine = own_control(p);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set], came = mine->dispatches[p.set] << 1;
    Puts puts{p, pair_of(pairs)};
    const Layout layout(p);
    const Far far(p);
    char* own = own_space(p);
    char* rows = own + layout.rows + p.set * layout.rows_bytes;
    const int row_bytes = 2 * p.hidden, shown_bytes = p.logfmt != 0 ? Logfmt::row_bytes(p.hidden) : row_bytes;
    const int64_t slots = int64_t{p.num_ranks} * p.max_tokens;
    const auto& decided = mine->decided[p.set][0];
    Deal deal;
    for (int i = 0; i < far.count; ++i) {
        const int source = far[i];
        if (source < 0 || decided.at[source] != came) continue;
        const List list(own + layout.list(p.set, source), p);
        const Place* begins = begins_of(p, layout, source);
        const int listed = list.head[0], lane = threadIdx.x % 32;
        for (int unit = deal.first(listed); unit < listed; unit += deal.warps) {
            const uint32_t place = lane < p.top_k ? list.places[int64_t{unit} * p.top_k + lane] : kNoPlace;
            const int64_t first_pick = int64_t{list.tokens[unit]} * p.top_k;
            for (unsigned left = __ballot_sync(0xffffffffu, place != kNoPlace); left != 0; left &= left - 1) {
                const int k = __ffs(left) - 1;
                const uint32_t here = __shfl_sync(0xffffffffu, place, k);
                const int e = here >> kIndexBits, index = here & ((1u << kIndexBits) - 1);
                char* row = rows + int64_t{begins[e].compact + index} * shown_bytes;
                if (p.zero_copy != 0)
                    pack(row, reinterpret_cast<const char*>(p.y) + (e * slots + begins[e].begin + index) * row_bytes,
                         row_bytes);
                char* came_here = own + layout.came + p.set * layout.came_bytes + (first_pick + k) * row_bytes;
                puts.put(came_here, row, shown_bytes, source);
            }
        }
    }
    puts.finish();
    if (!is_last_block(mine, p, kCombinePut)) return;
    for (int i = threadIdx.x; i < far.count; i += kThreads) {
        const int peer = far[i];
        if (peer < 0) continue;
        const Shown how = decided.at[peer] != came ? kNowhere : p.logfmt != 0 ? kCompactLogfmt : kCompact;
        set_flag(mine->shown[p.set], p, uint64_t{how} << 32 | number, peer, puts.qp);
    }
}

// By one block: the number of the launch before goes to `flags` at the peers that have come to it, of phase `phase`.
__global__ void __launch_bounds__(kMaxRanks, 1)
    answer_kernel(const __grid_constant__ Pairs pairs, const __grid_constant__ Common c, const bool is_combine) {
    Control* mine = own_control(c);
    if (mine->closed != 0) return;
    const uint32_t number = is_combine ? mine->combines[c.set] : mine->dispatches[c.set];
    Control::Flags& flags = is_combine ? mine->pulled[c.set] : mine->taken[c.set];
    const Far far(c);
    const int peer = static_cast<int>(threadIdx.x) < far.count ? far[threadIdx.x] : -1;
    if (peer >= 0 && mine->decided[c.set][is_combine].at[peer] == number << 1) set_flag(flags, c, number, peer, pair_of(pairs));
}

}  // namespace

void launch_put_dispatch(const Pairs& pairs, const DispatchParams& p, cudaStream_t stream) {
    put_dispatch_kernel<<<p.num_sms, kThreads, 0, stream>>>(pairs, p);
    DT_CUDA(cudaGetLastError());
}

void launch_put_combine(const Pairs& pairs, const CombineParams& p, cudaStream_t stream) {
    put_combine_kernel<<<p.num_sms, kThreads, 0, stream>>>(pairs, p);
    DT_CUDA(cudaGetLastError());
}

void launch_answer(const Pairs& pairs, const Common& c, bool is_combine, cudaStream_t stream) {
    answer_kernel<<<1, kMaxRanks, 0, stream>>>(pairs, c, is_combine);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::rdma
