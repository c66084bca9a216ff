// The PTX that the kernels' protocol rests on, a name for each instruction.
//
// Flags between GPUs are words written with st.release.sys and read with ld.acquire.sys. Rows written by a peer while a
// kernel runs are read with plain loads, never with .nc ones: the non-coherent path may hold what was there before.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepep_train {

#define DT_DEVICE __device__ __forceinline__

// Flags ---------------------------------------------------------------------------------------------------------------

DT_DEVICE uint32_t load_acquire_sys(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

DT_DEVICE uint64_t load_acquire_sys(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

DT_DEVICE void store_release_sys(uint32_t* address, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

DT_DEVICE void store_release_sys(uint64_t* address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Of a word that stands for nothing but itself.
DT_DEVICE void store_relaxed_sys(uint32_t* address, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

// Between ranks that share a GPU. PTX's gpu scope is of one program, which processes are not, but its SMs meet in the L2 cache
// whatever process they run, and that is all that these wait for: in docs/low_latency.md is what it saves.
DT_DEVICE uint32_t load_acquire_gpu(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

DT_DEVICE void add_release_gpu(uint32_t* address, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

DT_DEVICE uint32_t add_acq_rel_gpu(uint32_t* address, uint32_t value) {
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
    return old;
}

// Between the warps of a block, in shared memory.
DT_DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

DT_DEVICE uint32_t load_acquire_shared(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(shared_address(address)) : "memory");
    return value;
}

DT_DEVICE void add_release_shared(uint32_t* address, uint32_t value) {
    asm volatile("red.release.cta.shared.add.u32 [%0], %1;" ::"r"(shared_address(address)), "r"(value) : "memory");
}

// Nanoseconds of a clock that runs at one rate whatever the SM's frequency does.
DT_DEVICE uint64_t global_timer() {
    uint64_t value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
    return value;
}

#ifdef DEEPEP_TRAIN_DEBUG
// The debug build waits a while, different for every warp and call, wherever ranks or blocks meet, to shake out orders that
// are rare: up to 16 us, sometimes 250.
DT_DEVICE void delay_at_random(uint32_t salt) {
    const uint64_t start = global_timer();
    uint64_t hash =
        (start ^ (static_cast<uint64_t>(blockIdx.x) << 32) ^ (static_cast<uint64_t>(threadIdx.x / 32) << 16) ^ salt);
    hash = (hash ^ (hash >> 31)) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 29;
    const uint64_t wait = (hash & 0xff00) == 0 ? 250000 : (hash & 0x3fff);
    while (global_timer() - start < wait) __nanosleep(100);
    __syncwarp();
}
#else
DT_DEVICE void delay_at_random(uint32_t) {}
#endif

// Rows ----------------------------------------------------------------------------------------------------------------

// 16 bytes that a peer may have written during this kernel, read once.
DT_DEVICE uint4 load_row(const void* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

DT_DEVICE void store_row(void* address, uint4 v) {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

// The same for rows that nobody reads again soon: what the L2 cache gives up first.
DT_DEVICE uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// The cache's own rule.
DT_DEVICE uint64_t evict_normal() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DT_DEVICE uint4 load_row_by(const void* address, uint64_t policy) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address), "l"(policy)
                 : "memory");
    return v;
}

DT_DEVICE uint4 load_row_last(const void* address) { return load_row_by(address, evict_first()); }

DT_DEVICE void store_row_last(void* address, uint4 v) {
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w), "l"(evict_first())
                 : "memory");
}

// For rows that are read soon, and written over when they have been: what the L2 cache keeps longest, until it is read by
// `load_row_last`.
DT_DEVICE void store_row_kept(void* address, uint4 v) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w), "l"(policy)
                 : "memory");
}

// The bulk copy engine (sm_90 and later) --------------------------------------------------------------------------------

DT_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

DT_DEVICE void barrier_init_visible() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DT_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

DT_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

DT_DEVICE void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

DT_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
                 "r"(bytes)
                 : "memory");
}

DT_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// At most `kPending` of this thread's newest groups still read shared memory.
template <int kPending>
DT_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// All of this thread's bulk stores have been written, not only read from shared memory: what a flag may announce.
DT_DEVICE void bulk_wait_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// The same, but for at most `kPending` of the newest groups.
template <int kPending>
DT_DEVICE void bulk_wait_written_but() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders the copy engine's accesses (the async proxy) with ordinary ones.
DT_DEVICE void fence_async_proxy() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

}  // namespace deepep_train
