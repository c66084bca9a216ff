// One rank's end of an NVLink domain: its arena, the peers' arenas as this process maps them, and the launches.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../common/arena.hpp"
#include "params.hpp"

namespace deepep_train::nvlink {

// How a peer's arena can be reached.
struct PeerAddress {
    std::string ipc_handle;  // to open, if it is another process's
    uint64_t base = 0;       // else the address itself
};

// What a count exchange found.
struct CountResult {
    bool bad = false;                            // some rank's status or signature is not this rank's
    std::vector<std::vector<int32_t>> per_rank;  // [source][destination] rows
    std::vector<int32_t> per_expert;             // rows for each local expert
    std::vector<int64_t> bounds;                 // num_worst_tokens of each rank
};

struct Failure {
    uint32_t epoch = 0;
    std::string operation;
    std::string meeting;
    std::vector<int> missing;     // ranks that did not come in time
    std::vector<int> mismatched;  // ranks that are in another call
    std::vector<int> refused;     // ranks that could not take part
};

class Communicator {
public:
    Communicator(int device, int rank, int num_ranks, int64_t arena_bytes, double timeout_seconds);
    ~Communicator();
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    std::string ipc_handle() const;
    uint64_t base() const { return reinterpret_cast<uint64_t>(arena_->base()); }
    int64_t bytes() const { return static_cast<int64_t>(arena_->bytes()); }
    int64_t used() const { return static_cast<int64_t>(arena_->used()); }
    int64_t peak() const { return static_cast<int64_t>(arena_->peak()); }
    static int64_t control_bytes();

    // Maps the peers' arenas; index `rank` is ignored. To be followed by a barrier of all ranks before the first operation.
    void open(const std::vector<PeerAddress>& peers);
    // Unmaps them. After a failure the own memory is kept for ever: a late peer may still write into it.
    void close();

    // Makes torch's allocations from the arena's pool, on this thread, come from this arena; or from none.
    void enter_pool();
    static void leave_pool();

    void layout(const LayoutParams& p, uint64_t stream) const;
    // The ticket to pass to `wait_counts`.
    uint32_t count(CountParams p, uint64_t stream);
    // Waits on the CPU; to be called without the GIL. Gives nothing if the domain has failed.
    std::optional<CountResult> wait_counts(uint32_t ticket, int num_local_experts) const;
    void dispatch(const DispatchParams& p, uint64_t stream) const;
    void combine(const CombineParams& p, uint64_t stream) const;

    std::optional<Failure> failure() const;

private:
    struct State;
    int device_, rank_, num_ranks_;
    double timeout_seconds_;
    uint32_t tickets_ = 0;
    std::unique_ptr<Arena> arena_;
    std::unique_ptr<State> state_;
    std::vector<void*> opened_;
};

}  // namespace deepep_train::nvlink
