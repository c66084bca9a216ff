#include "communicator.hpp"

#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "../common/check.hpp"
#include "kernels.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

struct Communicator::State {
    Domain domain{};
    HostPage* host = nullptr;
    char** peers = nullptr;  // device memory
};

namespace {

std::vector<int> ranks_in(uint64_t mask) {
    std::vector<int> ranks;
    for (int r = 0; r < kMaxRanks; ++r)
        if (mask >> r & 1) ranks.push_back(r);
    return ranks;
}

}  // namespace

int64_t Communicator::control_bytes() { return sizeof(Control); }

Communicator::Communicator(int device, int rank, int num_ranks, int64_t arena_bytes, double timeout_seconds)
    : device_(device),
      rank_(rank),
      num_ranks_(num_ranks),
      timeout_seconds_(timeout_seconds),
      state_(std::make_unique<State>()) {
    if (num_ranks < 1 || num_ranks > kMaxRanks || rank < 0 || rank >= num_ranks)
        throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(num_ranks) + ": at most " +
                                    std::to_string(kMaxRanks) + " ranks");
    DT_CUDA(cudaSetDevice(device));
    arena_ = std::make_unique<Arena>(device, static_cast<size_t>(arena_bytes), sizeof(Control));
    void* page = nullptr;
    DT_CUDA(cudaHostAlloc(&page, sizeof(HostPage), cudaHostAllocMapped | cudaHostAllocPortable));
    std::memset(page, 0, sizeof(HostPage));
    state_->host = static_cast<HostPage*>(page);
    DT_CUDA(cudaMalloc(&state_->peers, kMaxRanks * sizeof(char*)));
    void* device_page = nullptr;
    DT_CUDA(cudaHostGetDevicePointer(&device_page, page, 0));
    state_->domain = Domain{rank, num_ranks, static_cast<uint64_t>(timeout_seconds * 1e9), state_->peers,
                            static_cast<HostPage*>(device_page)};
}

Communicator::~Communicator() {
    // No collective, no exception: a process may be on its way out.
    for (void* memory : opened_) cudaIpcCloseMemHandle(memory);
    cudaFree(state_->peers);
    cudaFreeHost(state_->host);
}

std::string Communicator::ipc_handle() const {
    cudaIpcMemHandle_t handle;
    DT_CUDA(cudaSetDevice(device_));
    DT_CUDA(cudaIpcGetMemHandle(&handle, arena_->base()));
    return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

void Communicator::open(const std::vector<PeerAddress>& peers) {
    DT_CUDA(cudaSetDevice(device_));
    char* table[kMaxRanks] = {};
    for (int r = 0; r < num_ranks_; ++r) {
        if (r == rank_) {
            table[r] = arena_->base();
        } else if (peers.at(r).ipc_handle.empty()) {
            table[r] = reinterpret_cast<char*>(peers[r].base);
        } else {
            cudaIpcMemHandle_t handle;
            std::memcpy(&handle, peers[r].ipc_handle.data(), sizeof(handle));
            void* memory = nullptr;
            DT_CUDA(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess));
            opened_.push_back(memory);
            table[r] = static_cast<char*>(memory);
        }
    }
    DT_CUDA(cudaMemcpy(state_->peers, table, sizeof(table), cudaMemcpyHostToDevice));
}

void Communicator::close() {
    DT_CUDA(cudaSetDevice(device_));
    DT_CUDA(cudaDeviceSynchronize());
    if (state_->host->failed != 0) arena_->abandon();
    for (void* memory : opened_) DT_CUDA(cudaIpcCloseMemHandle(memory));
    opened_.clear();
}

void Communicator::enter_pool() { set_current_arena(arena_.get()); }
void Communicator::leave_pool() { set_current_arena(nullptr); }

void Communicator::layout(const LayoutParams& p, uint64_t stream) const {
    launch_layout(p, reinterpret_cast<cudaStream_t>(stream));
}

uint32_t Communicator::count(CountParams p, uint64_t stream) {
    p.ticket = ++tickets_;
    launch_count(state_->domain, p, reinterpret_cast<cudaStream_t>(stream));
    return p.ticket;
}

std::optional<CountResult> Communicator::wait_counts(uint32_t ticket, int num_local_experts) const {
    const HostPage* page = state_->host;
    // The kernel keeps the deadline. The CPU's own is later and catches a kernel that never ran.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds_ + 30);
    for (int64_t spins = 0; static_cast<int32_t>(page->ticket - ticket) < 0; ++spins) {
        if (spins % 4096 != 4095) continue;
        const cudaError_t status = cudaPeekAtLastError();
        if (status != cudaSuccess) check_cuda(status, "a kernel before the count exchange", __FILE__, __LINE__);
        if (std::chrono::steady_clock::now() > deadline)
            throw std::runtime_error("the count exchange has not finished; the GPU may be stuck in an earlier kernel");
        std::this_thread::yield();
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    if (page->failed != 0) return std::nullopt;
    CountResult result;
    result.bad = page->counts_bad != 0;
    result.per_rank.assign(num_ranks_, std::vector<int32_t>(num_ranks_));
    for (int i = 0; i < num_ranks_; ++i) {
        for (int j = 0; j < num_ranks_; ++j) result.per_rank[i][j] = page->per_rank[i][j];
        result.bounds.push_back(static_cast<int64_t>(page->bound[i]));
    }
    for (int e = 0; e < num_local_experts; ++e) result.per_expert.push_back(static_cast<int32_t>(page->per_expert[e]));
    return result;
}

void Communicator::dispatch(const DispatchParams& p, uint64_t stream) const {
    launch_dispatch(state_->domain, p, reinterpret_cast<cudaStream_t>(stream));
}

void Communicator::combine(const CombineParams& p, uint64_t stream) const {
    launch_combine(state_->domain, p, reinterpret_cast<cudaStream_t>(stream));
}

std::optional<Failure> Communicator::failure() const {
    const HostPage* page = state_->host;
    if (page->failed == 0) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    static const char* const operations[] = {"count exchange", "dispatch", "combine"};
    static const char* const meetings[] = {"their counts", "their readiness", "the end of their part"};
    Failure f;
    f.epoch = page->failed_epoch;
    f.operation = operations[page->failed_operation];
    f.meeting = meetings[page->failed_meeting];
    f.missing = ranks_in(page->missing);
    f.mismatched = ranks_in(page->mismatched);
    f.refused = ranks_in(page->refused);
    return f;
}

}  // namespace deepep_train::nvlink
