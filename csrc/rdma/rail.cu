// One exchange along the rail: rows to every other node, packed where a network card can read them, put in batches, each put
// with a signal that counts its rows. Protocol: docs/rdma.md; its model, whose names these are: tests/model/rail.pml.
//
//   ready    this rank's earlier kernels are done with `recv`, and so may be overwritten: told to the rail, with a signature of
//            the call, and waited for from every node, so that nobody is ever more than one exchange ahead of anybody
//   rows     packed, put, signalled
//   arrived  the last block waits until all rows of this exchange have come; the kernel behind may read them
#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "../common/check.hpp"
#include "../common/ptx.cuh"
#include "endpoint.hpp"
#include "kernels.hpp"

namespace deepep_train::rdma {

namespace {

constexpr int kThreads = 768;  // with 1024 there are too few registers
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 4;  // 16-byte words that a thread asks memory for before it stores the first

DT_DEVICE bool has_failed(const End& end) { return *static_cast<const volatile uint32_t*>(end.failed) != 0; }

// What a rank says of the exchange that it is in: its number and the call's signature.
constexpr int kSignatureBits = 24;
constexpr uint64_t kSignatures = (1ull << kSignatureBits) - 1;
constexpr uint64_t kRefuses = kSignatures;  // instead of a signature: it takes part only to say that it cannot
constexpr uint64_t kGone = ~0ull;           // instead of all: it has failed, and nobody need wait for it again

DT_DEVICE uint64_t* ready_word(const End& end, uint64_t number, int node) { return end.ready + number % 2 * kMaxNodes + node; }

// By one thread.
DT_DEVICE void say(const End& end, int node, uint64_t number, uint64_t what) {
    nvshmemx_signal_op(ready_word(end, number, end.node), what, NVSHMEM_SIGNAL_SET, node * end.num_local_ranks + end.rail);
}

// What stands in the way of an exchange with a rank that has said `said`.
DT_DEVICE Cause verdict(uint64_t said, uint64_t number, uint64_t signature) {
    if (said == kGone) return kGaveUp;
    if (said >> kSignatureBits < number) return kMissingReady;
    if ((said & kSignatures) == kRefuses) return kRefused;
    return said == (number << kSignatureBits | signature) ? kNone : kMismatched;
}

// Inlined, give_up makes the rest of its kernel spill on sm_100.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define DT_COLD __noinline__
#else
#define DT_COLD
#endif

// By one thread. Whose fault it is is found out once, by the first that gives up. `wanted`: rows, if they are waited for.
__device__ DT_COLD void give_up(const End& end, uint64_t number, uint64_t signature, Cause cause,
                                const uint64_t* wanted = nullptr) {
    if (atomicExch(end.failed, 1u) != 0) return;
    for (int n = 0; n < end.num_nodes; ++n) {
        bool at_fault = n != end.node;
        if (at_fault && cause == kMissingRows)
            at_fault = load_acquire_sys(end.arrived + n) < wanted[n];
        else if (at_fault)
            at_fault = verdict(load_acquire_sys(ready_word(end, number, n)), number, signature) == cause;
        end.page->at_fault[n] = at_fault;
        if (n == end.node || (at_fault && (cause == kMissingReady || cause == kMissingRows))) continue;
        for (int slot = 0; slot < 2; ++slot) say(end, n, slot, kGone);
    }
    if (cause == kNodeFailed) return;  // which tells the CPU itself
    end.page->number = number;
    end.page->cause = cause;
    __threadfence_system();
    end.page->failed = 1;
    __threadfence_system();
}

// By one thread: until `word` has reached `wanted`; false if the deadline passes, another block has given up, or `said` that
// the rank waited for has.
DT_DEVICE bool wait_for(const End& end, const uint64_t* word, uint64_t wanted, const uint64_t* said, uint64_t start) {
    for (uint32_t polls = 0; load_acquire_sys(word) < wanted; ++polls)
        if (polls % 64 == 63 && (has_failed(end) || global_timer() - start > end.timeout_ns || load_acquire_sys(said) == kGone))
            return load_acquire_sys(word) >= wanted;
    return true;
}

// Of one row with what is beside it, as they travel.
DT_DEVICE int64_t wire_bytes(const RailParams& p) { return p.row_bytes + p.beside_bytes; }

// Where the rows of node n begin, on whatever rank.
DT_DEVICE char* landing(const End& end, const RailParams& p, int n) { return end.recv + n * end.segment_bytes + p.recv_offset; }

// With one warp: rows [first, first + count) of those sent, from where they are to `send`.
__device__ void pack(const End& end, const RailParams& p, int64_t first, int count) {
    const auto* token = reinterpret_cast<const int32_t*>(p.token) + first;
    const int words = static_cast<int>(wire_bytes(p) / 16), all = words * count;
    auto* to = reinterpret_cast<uint4*>(end.send + first * wire_bytes(p));
    int row = 0, word = threadIdx.x % 32;  // of the next one asked for; no divisions
    for (int base = threadIdx.x % 32; base < all; base += 32 * kAtOnce) {
        uint4 bits[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            for (; word >= words; word -= words) ++row;
            const int64_t at = word * 16;
            if (row < count)
                bits[i] = load_row(reinterpret_cast<const char*>(at < p.row_bytes ? p.rows + token[row] * p.row_bytes + at
                                                                                  : p.beside + token[row] * p.beside_bytes +
                                                                                        (at - p.row_bytes)));
            word += 32;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
            if (base + i * 32 < all) to[base + i * 32] = bits[i];
    }
}

// Whether what comes from node n does so in this exchange's turns.
DT_DEVICE bool comes_now(const End& end, const RailParams& p, int n) {
    const int turn = (end.node - n + end.num_nodes) % end.num_nodes;
    return turn >= p.first_turn && turn < p.end_turn;
}

__device__ void write_addresses(const End& end, const RailParams& p) {
    auto* out = reinterpret_cast<uint64_t*>(p.addresses);
    auto* out_beside = reinterpret_cast<uint64_t*>(p.beside_addresses);
    const auto* recv_at = reinterpret_cast<const int32_t*>(p.recv_at);
    const int32_t own = reinterpret_cast<const int32_t*>(p.send_at)[end.node];
    for (int n = 0; n < end.num_nodes; ++n) {
        if (!comes_now(end, p, n)) continue;
        for (int f = recv_at[n] + blockIdx.x * kThreads + threadIdx.x; f < recv_at[n + 1]; f += gridDim.x * kThreads) {
            const int64_t i = f - recv_at[n];
            const int64_t t = n == end.node ? reinterpret_cast<const int32_t*>(p.token)[own + i] : 0;
            const auto came = reinterpret_cast<uint64_t>(landing(end, p, n) + i * wire_bytes(p));
            out[f] = n == end.node ? p.rows + t * p.row_bytes : came;
            if (out_beside != nullptr) out_beside[f] = n == end.node ? p.beside + t * p.beside_bytes : came + p.row_bytes;
        }
    }
}

// By one thread: until node n's rank is in this exchange as well, or cannot be.
DT_DEVICE Cause wait_for_ready(const End& end, int n, uint64_t number, uint64_t signature, uint64_t start) {
    const uint64_t* word = ready_word(end, number, n);
    wait_for(end, word, number << kSignatureBits, word, start);
    return verdict(load_acquire_sys(word), number, signature);
}

DT_DEVICE bool node_has_failed(const End& end) { return *static_cast<const volatile uint32_t*>(end.node_failed) != 0; }

// By one thread of the last block: what this exchange has put, rows and signals.
DT_DEVICE void count_bytes(const End& end, const RailParams& p, const int32_t* send_at) {
    uint64_t bytes = *end.put_bytes;
    for (int turn = 1; turn < end.num_nodes; ++turn) {
        const int n = (end.node + turn) % end.num_nodes;
        const bool now = turn >= p.first_turn && turn < p.end_turn;
        const int rows = now ? send_at[n + 1] - send_at[n] : 0, puts = (rows + p.rows_per_put - 1) / p.rows_per_put;
        bytes += rows * wire_bytes(p) + static_cast<int64_t>(sizeof(uint64_t)) * (puts + 1);
    }
    *end.put_bytes = bytes;
    end.page->put_bytes = bytes;
}

__global__ void __launch_bounds__(kThreads, 1)
    rail_kernel(const __grid_constant__ End end, const __grid_constant__ RailParams p) {
    if (p.goes != 0 && *reinterpret_cast<const int32_t*>(p.goes) == 0) return;
    __shared__ bool go, last, whole;
    __shared__ int32_t send_at[kMaxNodes + 1];
    const uint64_t number = *end.number + 1, start = global_timer();
    nvshmemx_qp_handle_t qp = end.qps[blockIdx.x % end.num_qps];
    for (int n = threadIdx.x; n <= end.num_nodes; n += kThreads) send_at[n] = reinterpret_cast<const int32_t*>(p.send_at)[n];
    if (threadIdx.x == 0) {
        const bool node_gone = node_has_failed(end);  // once, as is `whole`: in stages the node's kernels run beside this one
        whole = !has_failed(end) && !node_gone;
        if (node_gone) give_up(end, number, p.signature, kNodeFailed);
    }
    __syncthreads();
    if (whole && blockIdx.x == 0 && threadIdx.x < end.num_nodes && threadIdx.x != end.node) {
        say(end, threadIdx.x, number, number << kSignatureBits | p.signature);
        // Another block may have given up since, and its *gone* lies under this: nobody else would say it again.
        __threadfence();
        if (has_failed(end)) say(end, threadIdx.x, number, kGone);
    }
    if (p.addresses != 0) write_addresses(end, p);

    // Every node's rows in puts of so many, the puts dealt to the warps; each rank begins with the node behind its own. Warps
    // need nothing of each other, so that one packs while others put.
    const int64_t row_bytes = wire_bytes(p);
    const int senders = gridDim.x * kWarps, me = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    bool fine = whole;
    const int end_turn = min(p.end_turn, end.num_nodes);
    for (int turn = max(p.first_turn, 1), before = 0; turn < end_turn && fine; ++turn) {
        const int n = (end.node + turn) % end.num_nodes;
        const int puts = (send_at[n + 1] - send_at[n] + p.rows_per_put - 1) / p.rows_per_put;
        int put = (me - before % senders + senders) % senders;
        before += puts;
        if (put >= puts) continue;
        int is_ready = 1;
        for (bool is_first = true; put < puts; put += senders, is_first = false) {
            const int first = send_at[n] + put * p.rows_per_put, count = min(p.rows_per_put, send_at[n + 1] - first);
            if (p.rows != 0) pack(end, p, first, count);
            if (is_first && threadIdx.x % 32 == 0) {
                const Cause cause = wait_for_ready(end, n, number, p.signature, start);
                is_ready = cause == kNone;
                if (!is_ready) give_up(end, number, p.signature, cause);
            }
            __threadfence_system();  // the card, and the put's other lanes, read what this lane has packed
            fine = __shfl_sync(0xffffffffu, is_ready, 0);
            if (!fine) break;
            char* to = landing(end, p, end.node) + (first - send_at[n]) * row_bytes;
            nvshmemx_qp_char_put_signal_nbi_warp(to, end.send + first * row_bytes, count * row_bytes, end.arrived + end.node,
                                                 static_cast<uint64_t>(count), NVSHMEM_SIGNAL_ADD,
                                                 n * end.num_local_ranks + end.rail, qp);
        }
    }
    __syncthreads();  // all of this block's puts are on their way
    // `send` may be overwritten by the kernel behind.
    if (fine && threadIdx.x < end.num_nodes && threadIdx.x != end.node)
        nvshmemx_qp_quiet(threadIdx.x * end.num_local_ranks + end.rail, &qp, 1);
    __syncthreads();
    if (threadIdx.x == 0) last = add_acq_rel_gpu(end.joined, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;

    const auto* recv_at = reinterpret_cast<const int32_t*>(p.recv_at);
    __shared__ uint64_t wanted[kMaxNodes];
    for (int n = threadIdx.x; n < end.num_nodes; n += kThreads)
        wanted[n] = n == end.node ? 0 : end.seen[n] + (comes_now(end, p, n) ? recv_at[n + 1] - recv_at[n] : 0);
    if (threadIdx.x == 0) go = !has_failed(end);
    __syncthreads();
    if (go && threadIdx.x < 32) {
        Cause cause = kNone;
        for (int n = threadIdx.x; n < end.num_nodes && cause == kNone; n += 32) {
            if (n == end.node) continue;
            cause = wait_for_ready(end, n, number, p.signature, start);
            const uint64_t* said = ready_word(end, number, n);
            if (cause == kNone && !wait_for(end, end.arrived + n, wanted[n], said, start))
                cause = load_acquire_sys(said) == kGone ? kGaveUp : kMissingRows;
            // Returns at once; but where a card's writes may reach this GPU's memory out of their order, behind those that the
            // signal announces, which reading the word does not see to.
            if (cause == kNone) nvshmem_signal_wait_until(end.arrived + n, NVSHMEM_CMP_GE, wanted[n]);
        }
        const unsigned bad = __ballot_sync(0xffffffffu, cause != kNone);
        if (bad != 0 && threadIdx.x == __ffs(bad) - 1) {
            go = false;
            give_up(end, number, p.signature, cause, wanted);
        }
    }
    __syncthreads();
    if (go) {
        for (int n = threadIdx.x; n < end.num_nodes; n += kThreads) end.seen[n] = wanted[n];
        if (threadIdx.x == 0) count_bytes(end, p, send_at);
    } else {
        // Rows that have not come are NaN, so that nobody takes what lay there before for them.
        for (int n = 0; n < end.num_nodes; ++n) {
            const int64_t bytes = (recv_at[n + 1] - recv_at[n]) * row_bytes;
            for (int64_t at = threadIdx.x * 16; n != end.node && comes_now(end, p, n) && at < bytes; at += kThreads * 16)
                *reinterpret_cast<uint4*>(landing(end, p, n) + at) = uint4{~0u, ~0u, ~0u, ~0u};
        }
    }
    if (threadIdx.x == 0) {
        *end.joined = 0;
        *end.number = number;
    }
}

// Takes part in an exchange only to say that this rank cannot; all of the rail that do so are in step. Or, `for_good`, says
// that nobody need wait for it again. With one warp.
__global__ void __launch_bounds__(32, 1) refuse_kernel(const __grid_constant__ End end, bool for_good) {
    const uint64_t number = *end.number + 1, start = global_timer();
    if (for_good || has_failed(end) || node_has_failed(end)) {
        if (threadIdx.x == 0) give_up(end, number, kRefuses, kNodeFailed);
        return;
    }
    for (int n = threadIdx.x; n < end.num_nodes; n += 32)
        if (n != end.node) say(end, n, number, number << kSignatureBits | kRefuses);
    Cause cause = kNone;
    for (int n = threadIdx.x; n < end.num_nodes; n += 32) {
        if (n == end.node) continue;
        const Cause found = wait_for_ready(end, n, number, kRefuses, start);
        if (found != kRefused) cause = found;
    }
    const unsigned bad = __ballot_sync(0xffffffffu, cause != kNone);
    if (bad != 0 && threadIdx.x == __ffs(bad) - 1) give_up(end, number, kRefuses, cause);
    if (threadIdx.x == 0) *end.number = number;
}

void check_nvshmem(int status, const char* call) {
    if (status != 0) throw std::runtime_error(std::string(call) + " failed with status " + std::to_string(status));
}

}  // namespace

void launch_rail(const End& end, const RailParams& p, cudaStream_t stream) {
    rail_kernel<<<p.num_sms, kThreads, 0, stream>>>(end, p);
    DT_CUDA(cudaGetLastError());
}

void launch_refuse(const End& end, bool for_good, cudaStream_t stream) {
    refuse_kernel<<<1, 32, 0, stream>>>(end, for_good);
    DT_CUDA(cudaGetLastError());
}

// The host's side of NVSHMEM, here because everything that includes its headers takes long to compile -------------------------

std::string unique_id() {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    check_nvshmem(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid");
    return {reinterpret_cast<const char*>(&id), sizeof(id)};
}

void start(int device, int rank, int num_ranks, const std::string& id) {
    DT_CUDA(cudaSetDevice(device));
    nvshmemx_uniqueid_t unique = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (id.size() != sizeof(unique)) throw std::invalid_argument("an NVSHMEM unique id has another size");
    std::memcpy(&unique, id.data(), sizeof(unique));
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    check_nvshmem(nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &unique, &attributes), "nvshmemx_set_attr_uniqueid_args");
    check_nvshmem(nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes), "nvshmemx_init_attr");
    if (nvshmem_my_pe() != rank || nvshmem_n_pes() != num_ranks)
        throw std::runtime_error("NVSHMEM numbers the ranks otherwise than their group");
}

void* allocate(size_t bytes) {
    void* memory = nvshmem_malloc(bytes);
    if (memory == nullptr)
        throw std::runtime_error("NVSHMEM has no " + std::to_string(bytes) +
                                 " bytes more: the GPU's memory is full, or what NVSHMEM_MAX_MEMORY_PER_GPU says, or, with "
                                 "NVSHMEM_DISABLE_CUDA_VMM=1, NVSHMEM_SYMMETRIC_SIZE");
    return memory;
}

void* of_peer(const void* symmetric, int rank) {
    void* there = nvshmem_ptr(symmetric, rank);
    if (there == nullptr)
        throw std::runtime_error("NVSHMEM cannot map the memory of rank " + std::to_string(rank) + ", which is of this node");
    return there;
}

int* queue_pairs(int count) {
    nvshmemx_qp_handle_t* made = nullptr;
    check_nvshmem(nvshmemx_qp_create(count, &made), "nvshmemx_qp_create");
    return made;
}

}  // namespace deepep_train::rdma
