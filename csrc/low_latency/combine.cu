// Combine of rows that peers do not reach, in one launch: every warp copies a slice, which is some columns of all rows, and
// pulls an earlier one, so that what is pulled has just been copied and is in the L2 cache. Ranks that take part keep step of
// themselves, since none pulls a slice that others have not copied. Copying waits for nobody.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"
#include "show.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kWorkers = 14;  // warps that copy and pull
constexpr int kAnnouncer = kWorkers, kWatcher = kWorkers + 1;
constexpr int kThreads = 32 * (kWorkers + 2);
constexpr int kAhead = 2;  // slices that are copied before the first is pulled

struct Shared {
    Showing showing;
    Pulling pulling;
    uint32_t copied[kMostSlices];  // warps that have copied their part
    uint32_t ready;                // slices that all ranks have copied
    uint64_t lost;                 // ranks that have stopped since their first
};

// By one warp: tells the peers of slices `from` to `to`, each as soon as all blocks have copied it.
DT_DEVICE void announce(const CombineParams& p, Control* mine, uint32_t number, int from, int to, Shown how, Shared& shared) {
    const Layout layout(p);
    const int slices = slices_of(p);
    for (int slice = from; slice < to; ++slice) {
        uint32_t last = 0;
        if (threadIdx.x % 32 == 0) {
            while (*static_cast<volatile uint32_t*>(shared.copied + slice) != kWorkers) __nanosleep(20);
            delay_at_random(slice);
            __threadfence_system();
            // A block comes to the next slice when it has told of this one: peers are told in order.
            last = add_acq_rel_gpu(&mine->copied[p.set][slice], 1) == gridDim.x - 1;
            if (last != 0) mine->copied[p.set][slice] = 0;
        }
        __syncwarp();
        if (__shfl_sync(0xffffffffu, last, 0) != 0)
            tell_shown(p, number, step_of(slice, slices), layout.rows + p.set * layout.rows_bytes, how);
    }
}

// By one warp: lets the others know how many slices all peers have shown, until these are all. Peers that stop are masked.
DT_DEVICE void watch(const CombineParams& p, Control* mine, uint32_t number, Shared& shared) {
    const int slices = slices_of(p), lane = threadIdx.x % 32;
    const uint64_t start = global_timer();
    bool waited_for[2];  // peers `lane` and `lane` + 32
#pragma unroll
    for (int i = 0; i < 2; ++i) waited_for[i] = lane + i * 32 < p.num_ranks && is_in(shared.pulling.came, lane + i * 32);
    for (int ready = 0; ready < slices;) {
        const bool late = global_timer() - start > p.timeout_ns;
        int least = slices;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!waited_for[i]) continue;
            const int peer = lane + i * 32;
            const uint32_t flag = load_acquire_sys(mine->shown[p.set].at + peer);
            const int here = reached(flag, number * kSteps + kSteps - 1) ? slices : static_cast<int>(flag - number * kSteps);
            if (here > ready || !late) {
                least = here < least ? here : least;
                continue;
            }
            give_up(p, peer);
            atomicOr(reinterpret_cast<unsigned long long*>(&shared.lost), 1ull << peer);
            waited_for[i] = false;
        }
        least = __reduce_min_sync(0xffffffffu, least);
        if (least == ready) {
            __nanosleep(20);
            continue;
        }
        ready = least;
        __threadfence_block();
        __syncwarp();
        if (lane == 0) *static_cast<volatile uint32_t*>(&shared.ready) = ready;
    }
}

template <bool kLogfmt>
__global__ void __launch_bounds__(kThreads, 1) combine_both_kernel(const __grid_constant__ CombineParams p) {
    __shared__ Shared shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set] + 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slices = slices_of(p);
    const int ahead = slices < kAhead ? slices : kAhead;
    const Layout layout(p);
    char* rows = space_of(p, p.rank) + layout.rows + p.set * layout.rows_bytes;
    for (int slice = threadIdx.x; slice < slices; slice += kThreads) shared.copied[slice] = 0;
    if (threadIdx.x == 0) shared.ready = 0, shared.lost = 0;
    prepare_copies(p, mine, shared.showing);

    int row = blockIdx.x + warp * gridDim.x;
    const auto copy = [&](int slice) {
        // This rank pulls its own rows where they are, unless all are to be rounded alike.
        copy_columns<kLogfmt, !kLogfmt, kSliceBytes / 512>(p, shared.showing, rows, slice * kSliceBytes, gridDim.x * kWorkers,
                                                           row);
        __syncwarp();
        if (lane == 0) {
            __threadfence_block();
            atomicAdd_block(shared.copied + slice, 1);
        }
    };
    const Shown form = kLogfmt ? kCompactLogfmt : kCompact;
    if (warp == kAnnouncer) {
        announce(p, mine, number, 0, ahead, form, shared);
    } else if (warp == kWatcher) {
        find_rows(p, mine, number, step_of(0, slices), kLogfmt ? 0 : p.y, blockIdx.x == 0 ? p.wait_ns : 0, shared.pulling);
    } else {
        for (int slice = 0; slice < ahead; ++slice) copy(slice);
    }
    __syncthreads();
    const Items items(p);
    const int count = items.from(blockIdx.x);
    find_picks(p, items, blockIdx.x, count, shared.pulling);

    if (warp == kAnnouncer) {
        announce(p, mine, number, ahead, slices, form, shared);
    } else if (warp == kWatcher) {
        watch(p, mine, number, shared);
    } else {
        constexpr int kParts = kSliceBytes / kPart;
        const int units = count * kParts;
        int unit = warp;
        for (int slice = 0; slice < slices; ++slice) {
            while (*static_cast<volatile uint32_t*>(&shared.ready) <= static_cast<uint32_t>(slice)) __nanosleep(20);
            __threadfence_block();
            __syncwarp();
            const uint64_t lost = *static_cast<volatile uint64_t*>(&shared.lost);
            for (; unit < units; unit += kWorkers) {
                const int item = unit / kParts, part = slice * kParts + unit % kParts;
                if (part >= items.parts || part % items.shares != shared.pulling.share[item]) continue;
                const Pick* picks = shared.pulling.picks[item];
                if (shared.pulling.coded != 0)
                    pull_part<true>(p, picks, lost, shared.pulling.token[item], part * kPart + lane * 16);
                else
                    pull_part<false>(p, picks, lost, shared.pulling.token[item], part * kPart + lane * 16);
            }
            unit -= units;
            if (slice + ahead < slices) copy(slice + ahead);
        }
    }
    if (!is_last_block(mine, p, kCombineSend)) return;
    note_shown(p, mine, number);
    tell_pulled(p, mine, number);
}

}  // namespace

void launch_combine(const CombineParams& p, cudaStream_t stream) {
    // A block pulls one batch at most; and rows that are read where they are need no pipeline.
    if (p.zero_copy != 0 || p.num_tokens > kBatch * p.num_sms) {
        launch_combine_send(p, stream);
        launch_combine_receive(p, stream);
        return;
    }
    if (p.logfmt != 0)
        combine_both_kernel<true><<<p.num_sms, kThreads, 0, stream>>>(p);
    else
        combine_both_kernel<false><<<p.num_sms, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
