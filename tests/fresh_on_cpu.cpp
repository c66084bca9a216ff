// Runs the kernels of csrc/rdma/fresh.cuh on a CPU: a thread for each of a block's, block after block.
#include <atomic>
#include <barrier>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#define __device__
#define __shared__ static
#define __syncthreads() block->arrive_and_wait()

struct Dim {
    unsigned x;
};
static thread_local Dim threadIdx;
static Dim blockIdx, blockDim, gridDim;
static std::barrier<>* block;

struct Warp {
    std::barrier<> meet{32};
    std::atomic<unsigned> bits{0};
    int values[32];
};
static std::deque<Warp>* warps;

static unsigned __ballot_sync(unsigned, bool hit) {
    Warp& warp = (*warps)[threadIdx.x / 32];
    if (hit) warp.bits |= 1u << threadIdx.x % 32;
    warp.meet.arrive_and_wait();
    const unsigned all = warp.bits;
    warp.meet.arrive_and_wait();
    warp.bits = 0;
    warp.meet.arrive_and_wait();
    return all;
}
static int __shfl_sync(unsigned, int value, int lane) {
    Warp& warp = (*warps)[threadIdx.x / 32];
    warp.values[threadIdx.x % 32] = value;
    warp.meet.arrive_and_wait();
    const int found = warp.values[lane];
    warp.meet.arrive_and_wait();
    return found;
}
static int __shfl_up_sync(unsigned all, int value, int distance) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(all, value, lane < distance ? lane : lane - distance);
}
static int __popc(unsigned bits) { return __builtin_popcount(bits); }
static void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
static int atomicAdd(int* to, int value) { return std::atomic_ref(*to).fetch_add(value); }
static void atomicMax(int* to, int value) {
    std::atomic_ref all(*to);
    for (int now = all; now < value && !all.compare_exchange_weak(now, value);) {
    }
}
static uint32_t atomicExch(uint32_t* to, uint32_t value) { return std::atomic_ref(*to).exchange(value); }

#include "../csrc/rdma/fresh.cuh"

using namespace deepep_train::rdma;

template <typename Kernel>
static void launch(int blocks, int threads, const Kernel& kernel) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (int b = 0; b < blocks; ++b) {
        blockIdx.x = b;
        std::barrier<> all(threads);
        std::deque<Warp> some(threads / 32);
        block = &all;
        warps = &some;
        std::vector<std::thread> running;
        for (int t = 0; t < threads; ++t)
            running.emplace_back([&kernel, t] {
                threadIdx.x = t;
                kernel();
            });
        for (std::thread& one : running) one.join();
    }
}

// One rank's flags, as its endpoint and its node keep them.
struct Flags {
    uint32_t failed;
    uint32_t node_failed;
    uint64_t number;
    Page page;
};

static End end_of(Flags* flags) {
    End end{};
    end.failed = &flags->failed;
    end.node_failed = &flags->node_failed;
    end.number = &flags->number;
    end.page = &flags->page;
    return end;
}

extern "C" {
Flags* make_flags() { return new Flags{}; }
int failed(const Flags* flags) { return flags->failed; }
int cause(const Flags* flags) { return flags->page.failed != 0 ? static_cast<int>(flags->page.cause) : 0; }
void fail(Flags* flags) { flags->failed = 1; }

constexpr int kThreads = 64;
void run_tell(Flags*, const TellParams* p) {
    launch(p->num_nodes + 1, kThreads, [=] { tell(*p); });
}
void run_digest(Flags* flags, const DigestParams* p) {
    launch(1, kThreads, [=] { digest(end_of(flags), *p); });
}
void run_pack_words(Flags*, const PackParams* p) {
    launch(2, kThreads, [=] { pack_words(*p); });
}
void run_find_slots(Flags*, const SlotParams* p) {
    launch(p->num_nodes * p->num_local_ranks, kThreads, [=] { find_slots(*p); });
}
void run_unpack_words(Flags* flags, const UnpackParams* p) {
    launch(2, kThreads, [=] { unpack_words(end_of(flags), *p); });
}
void run_move_weights(Flags* flags, const WeightParams* p) {
    launch(2, kThreads, [=] { move_weights(end_of(flags), *p); });
}
}
