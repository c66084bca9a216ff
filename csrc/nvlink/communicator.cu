#include "communicator.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

#include "../common/check.hpp"
#include "../common/on_device.hpp"
#include "../common/relaxed.hpp"
#include "kernels.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

struct Communicator::State {
    Domain domain{};
    HostPage* host = nullptr;
    char** peers = nullptr;  // device memory
    // The last operation, outside of captures and within the newest one.
    cudaEvent_t eager = nullptr, captured = nullptr;
    unsigned long long eager_stream = 0;  // its id, which no other stream will ever have
    cudaStream_t captured_stream = nullptr;
    bool any_eager = false;
    unsigned long long capture = 0;
    unsigned long long current_stream = 0, current_capture = 0;  // of the operation between `enter` and `leave`
    bool kept = false;                                           // a captured graph may still launch kernels
};

namespace {

std::vector<int> ranks_in(uint64_t mask) {
    std::vector<int> ranks;
    for (int r = 0; r < kMaxRanks; ++r)
        if (mask >> r & 1) ranks.push_back(r);
    return ranks;
}

// The capture that the stream takes part in; 0: none.
unsigned long long capture_of(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    DT_CUDA(cudaStreamGetCaptureInfo(stream, &status, &id));
    return status == cudaStreamCaptureStatusActive ? id : 0;
}

unsigned long long id_of(cudaStream_t stream) {
    unsigned long long id = 0;
    DT_CUDA(cudaStreamGetId(stream, &id));
    return id;
}

}  // namespace

int64_t Communicator::control_bytes() { return sizeof(Control); }

// Delegating, so that the destructor runs if anything behind fails.
Communicator::Communicator(int device, int rank, int num_ranks, int64_t arena_bytes, double timeout_seconds)
    : Communicator(device, rank, num_ranks, timeout_seconds) {
    if (num_ranks < 1 || num_ranks > kMaxRanks || rank < 0 || rank >= num_ranks)
        throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(num_ranks) + ": at most " +
                                    std::to_string(kMaxRanks) + " ranks");
    DT_CUDA(cudaSetDevice(device));
    const bool has_bulk_copies = code_here().has_bulk_copies;  // before memory is taken: a GPU without code is told here
    arena_ = Arena::make(device, static_cast<size_t>(arena_bytes), sizeof(Control));
    void* page = nullptr;
    DT_CUDA(cudaHostAlloc(&page, sizeof(HostPage), cudaHostAllocMapped | cudaHostAllocPortable));
    std::memset(page, 0, sizeof(HostPage));
    state_->host = static_cast<HostPage*>(page);
    DT_CUDA(cudaMalloc(&state_->peers, kMaxRanks * sizeof(char*)));
    void* device_page = nullptr;
    DT_CUDA(cudaHostGetDevicePointer(&device_page, page, 0));
    Domain& domain = state_->domain;
    domain.rank = rank;
    domain.num_ranks = num_ranks;
    domain.timeout_ns = static_cast<uint64_t>(std::clamp(timeout_seconds, 1e-6, 1e9) * 1e9);
    domain.tells_missing = !has_mps(device);
    domain.has_bulk_copies = has_bulk_copies;
    domain.peers = state_->peers;
    domain.host = static_cast<HostPage*>(device_page);
    if (has_bulk_copies) {
        allow_memory_for_dispatch();
        allow_memory_for_expand();
        allow_memory_for_combine();
    }
    DT_CUDA(cudaEventCreateWithFlags(&state_->eager, cudaEventDisableTiming));
    DT_CUDA(cudaEventCreateWithFlags(&state_->captured, cudaEventDisableTiming));
}

Communicator::Communicator(int device, int rank, int num_ranks, double timeout_seconds)
    : device_(device),
      rank_(rank),
      num_ranks_(num_ranks),
      timeout_seconds_(timeout_seconds),
      state_(std::make_unique<State>()) {}

Communicator::~Communicator() {
    // No collective, no exception, no waiting: a process may be on its way out. What a kernel may still use is kept.
    const OnDevice on(device_);
    const RelaxedCapture relaxed;
    if (arena_ && state_->kept) {
        // A graph of this buffer may live on: as after `close`, its replays touch no peer, and no table that is gone.
        cudaStream_t stream = nullptr;
        auto* control = reinterpret_cast<Control*>(arena_->base());
        if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess) {
            cudaMemsetAsync(&control->failed, 1, sizeof(control->failed), stream);
            cudaStreamDestroy(stream);
        }
        cudaGetLastError();
    }
    if (arena_ && state_->any_eager && cudaEventQuery(state_->eager) != cudaSuccess) {
        cudaGetLastError();
        state_->kept = true;
    }
    if (!state_->kept) {
        for (void* memory : opened_) cudaIpcCloseMemHandle(memory);
        if (closings_ && arena_) closings_->say(rank_);
    }
    if (arena_) arena_->retire(state_->kept || (state_->host != nullptr && state_->host->failed != 0));
    if (state_->eager != nullptr) cudaEventDestroy(state_->eager);
    if (state_->captured != nullptr) cudaEventDestroy(state_->captured);
    if (state_->kept) return;
    cudaFree(state_->peers);
    cudaFreeHost(state_->host);
}

std::string Communicator::ipc_handle() const {
    cudaIpcMemHandle_t handle;
    DT_CUDA(cudaSetDevice(device_));
    DT_CUDA(cudaIpcGetMemHandle(&handle, arena().base()));
    return {reinterpret_cast<const char*>(&handle), sizeof(handle)};
}

void Communicator::open(const std::vector<PeerAddress>& peers) {
    DT_CUDA(cudaSetDevice(device_));
    char* table[kMaxRanks] = {};
    for (int r = 0; r < num_ranks_; ++r) {
        if (r == rank_) {
            table[r] = arena().base();
        } else if (peers.at(r).ipc_handle.empty()) {
            table[r] = reinterpret_cast<char*>(peers[r].base);
            if (peers[r].device != device_) {
                const cudaError_t status = cudaDeviceEnablePeerAccess(peers[r].device, 0);
                if (status == cudaErrorPeerAccessAlreadyEnabled)
                    cudaGetLastError();
                else
                    check_cuda(status, "cudaDeviceEnablePeerAccess", __FILE__, __LINE__);
            }
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

std::vector<uint64_t> Communicator::addresses() const {
    std::vector<uint64_t> table(num_ranks_);
    const OnDevice on(device_);
    DT_CUDA(cudaMemcpy(table.data(), state_->peers, num_ranks_ * sizeof(char*), cudaMemcpyDeviceToHost));
    return table;
}

void Communicator::share(std::shared_ptr<Closings> closings) {
    closings_ = std::move(closings);
    arena().share(closings_);
}

void Communicator::close(bool keep) {
    if (!arena_) return;
    state_->kept |= keep;
    const OnDevice on(device_);
    const bool failed = state_->host->failed != 0;
    DT_CUDA(cudaDeviceSynchronize());
    // A graph that is replayed from now on finds a domain that has failed, and touches no peer.
    const uint32_t one = 1;
    auto* control = reinterpret_cast<Control*>(arena_->base());
    DT_CUDA(cudaMemcpy(&control->failed, &one, sizeof(one), cudaMemcpyHostToDevice));
    while (!opened_.empty()) {
        void* memory = opened_.back();
        opened_.pop_back();
        DT_CUDA(cudaIpcCloseMemHandle(memory));
    }
    if (closings_) closings_->say(rank_);
    arena_->retire(state_->kept || failed || state_->host->failed != 0);
    // From here on it is closed: if anything before this throws, the destructor does what it can. Whoever keeps a buffer that
    // is destroyed keeps no memory; what must stay is in the registry.
    arena_.reset();
}

const Domain& Communicator::domain() const {
    arena();
    return state_->domain;
}

Arena& Communicator::arena() const {
    if (!arena_) throw std::logic_error("this communicator has been closed");
    return *arena_;
}

void Communicator::enter_pool() { set_current_arena(&arena()); }
void Communicator::leave_pool() { set_current_arena(nullptr); }

bool Communicator::enter(uint64_t stream) {
    arena();  // nothing is launched once it is closed
    const OnDevice on(device_);
    State& s = *state_;
    s.current_capture = capture_of(as_stream(stream));
    if (s.current_capture != 0) {
        s.kept = true;
        if (s.capture == s.current_capture && s.captured_stream != as_stream(stream))
            DT_CUDA(cudaStreamWaitEvent(as_stream(stream), s.captured, 0));
        return true;
    }
    s.current_stream = id_of(as_stream(stream));
    if (s.any_eager && s.eager_stream != s.current_stream) DT_CUDA(cudaStreamWaitEvent(as_stream(stream), s.eager, 0));
    return false;
}

void Communicator::leave(uint64_t stream) {
    const OnDevice on(device_);
    State& s = *state_;
    DT_CUDA(cudaEventRecord(s.current_capture != 0 ? s.captured : s.eager, as_stream(stream)));
    if (s.current_capture != 0) {
        s.capture = s.current_capture;
        s.captured_stream = as_stream(stream);
    } else {
        s.any_eager = true;
        s.eager_stream = s.current_stream;
    }
}

bool Communicator::counts_come(uint32_t ticket, double microseconds) const {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double, std::micro>(microseconds);
    while (static_cast<int32_t>(state_->host->ticket - ticket) < 0)
        if (std::chrono::steady_clock::now() > until) return false;
    return true;
}

void Communicator::wait_counts(uint32_t ticket, uint64_t stream, const std::function<void()>& now_and_then) const {
    // The kernel keeps the deadline; here only a kernel that cannot run, or has crashed, is looked for.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds_ + 30);
    for (int64_t spins = 0; static_cast<int32_t>(state_->host->ticket - ticket) < 0; ++spins) {
        if (spins % 4096 != 4095) continue;
        const cudaError_t status = [&] {
            const RelaxedCapture relaxed;  // another thread may be capturing a graph
            return cudaStreamQuery(as_stream(stream));
        }();
        if (status != cudaSuccess && status != cudaErrorNotReady)
            check_cuda(status, "a kernel before the exchange of counts, or the exchange itself", __FILE__, __LINE__);
        if (std::chrono::steady_clock::now() > deadline)
            throw std::runtime_error("the exchange of counts has not run; the GPU may be busy with an earlier kernel");
        if (spins % (1 << 22) == (1 << 22) - 1) now_and_then();
        std::this_thread::yield();
    }
}

std::optional<CountResult> Communicator::counts(int num_local_experts) const {
    std::atomic_thread_fence(std::memory_order_acquire);
    const HostPage* page = state_->host;
    if (page->failed != 0) return std::nullopt;
    CountResult result;
    result.bad = page->counts_bad != 0;
    result.num_received = page->num_received;
    result.num_rows = page->rows[rank_];
    for (int r = 0; r < num_ranks_; ++r) {
        result.rows.push_back(int64_t{page->rows[r]});
        result.bounds.push_back(int64_t{page->bound[r]});
    }
    for (int e = 0; e < num_local_experts; ++e) result.per_expert.push_back(page->per_expert[e]);
    return result;
}

std::string Communicator::obstacle(int device) {
    try {
        const OnDevice on(device);
        int shared = 0;
        DT_CUDA(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
        const int needed = code_here().most_shared_bytes;
        if (shared < needed)
            return "a block may use " + std::to_string(shared) + " bytes of shared memory, the kernels use " +
                   std::to_string(needed);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return {};
}

bool Communicator::has_mps(int device) {
    int mps = 0;
    DT_CUDA(cudaDeviceGetAttribute(&mps, cudaDevAttrMpsEnabled, device));
    return mps != 0;
}

uint64_t Communicator::failed_flag() const { return base() + offsetof(Control, failed); }

bool Communicator::is_well() const { return state_->host->failed == 0; }

std::string Communicator::cuda_error(uint64_t stream) const {
    cudaStreamCaptureStatus capture;
    const cudaError_t status = cudaStreamIsCapturing(as_stream(stream), &capture);
    // The legacy stream may not be asked while another stream captures.
    if (status == cudaErrorStreamCaptureImplicit) {
        cudaGetLastError();
        return {};
    }
    try {
        check_cuda(status, "an earlier kernel or copy, told by cudaStreamIsCapturing,", __FILE__, __LINE__);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return {};
}

std::optional<Failure> Communicator::failure() const {
    const HostPage* page = state_->host;
    if (page->failed == 0) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    static const char* const operations[] = {"count exchange", "dispatch", "combine"};
    static const char* const meetings[] = {"their counts", "their readiness", "the end of their part"};
    static const char* const causes[] = {"missing", "mismatched", "blamed", "overflow", "bad counts", "refused", "astray"};
    Failure f;
    f.epoch = page->failed_epoch;
    f.operation = operations[page->failed_operation];
    f.meeting = meetings[page->failed_meeting];
    f.cause = causes[page->failed_cause];
    f.ranks = ranks_in(page->failed_ranks);
    f.bytes = page->refused_bytes;
    for (int r = 0; r < num_ranks_; ++r) {
        f.rows.push_back(int64_t{page->rows[r]});
        f.bounds.push_back(int64_t{page->bound[r]});
    }
    return f;
}

}  // namespace deepep_train::nvlink
