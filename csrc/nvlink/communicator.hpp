// One rank's end of an NVLink domain: its arena, the peers' arenas as this process maps them, and the launches.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../common/arena.hpp"
#include "../common/closings.hpp"
#include "params.hpp"
#include "tables.hpp"

namespace deepep_train::nvlink {

// How a peer's arena can be reached.
struct PeerAddress {
    std::string ipc_handle;  // to open, if it is another process's
    uint64_t base = 0;       // else the address itself
    int device = 0;          // where it lies, if it is this process's
};

// What a count exchange found.
struct CountResult {
    bool bad = false;  // some rank's status or signature is not this rank's
    int64_t num_received = 0;
    int64_t num_rows = 0;             // of this rank's received tensor
    std::vector<int64_t> per_expert;  // rows for each local expert, rounded up
    std::vector<int64_t> rows;        // num_rows of every rank
    std::vector<int64_t> bounds;      // num_worst_tokens of every rank
};

struct Failure {
    uint32_t epoch = 0;
    std::string operation;
    std::string meeting;
    std::string cause;
    std::vector<int> ranks;
    std::vector<int64_t> rows;    // with cause "overflow": what would arrive at every rank
    std::vector<int64_t> bounds;  // and what it has room for
    int64_t bytes = 0;            // with cause "refused": that an arena lacked room for; 0: wrong arguments; -1: the rail
};

struct Domain;

class Communicator {
public:
    Communicator(int device, int rank, int num_ranks, int64_t arena_bytes, double timeout_seconds);
    ~Communicator();
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    std::string ipc_handle() const;
    uint64_t base() const { return reinterpret_cast<uint64_t>(arena().base()); }
    int64_t bytes() const { return static_cast<int64_t>(arena().bytes()); }
    int64_t used() const { return static_cast<int64_t>(arena().used()); }
    int64_t peak() const { return static_cast<int64_t>(arena().peak()); }
    static int64_t control_bytes();
    // Why the kernels cannot run on this GPU, as far as it can tell without running them; empty if they can.
    static std::string obstacle(int device);

    // Whether kernels of several processes run on this GPU at the same time, instead of taking turns.
    static bool has_mps(int device);

    // Maps the peers' arenas; index `rank` is ignored. To be followed by a barrier of all ranks before the first operation.
    void open(const std::vector<PeerAddress>& peers);
    // Every rank's arena, as this process maps it; after `open`.
    std::vector<uint64_t> addresses() const;
    // After that barrier: which ranks have closed, so that a late one finds the memory it writes to; null: nobody will know.
    void share(std::shared_ptr<Closings> closings);
    // Unmaps them, and says so. This rank's memory is kept until all ranks have; with `keep`, or after a failure, for ever: a
    // late peer, or a CUDA graph, may still write into it.
    void close(bool keep);

    // Makes torch's allocations from the arena's pool, on this thread, come from this arena; or from none.
    void enter_pool();
    static void leave_pool();
    // After a synchronization of the device: what torch has given back may be given out again, to any stream.
    void begin_settling() { arena().begin_settling(); }
    void settle() { arena().settle(); }

    // Around every operation and every use of memory that operations share: they follow each other, whatever streams they
    // are on. Within a CUDA graph's capture they follow the operations of the same capture.
    // Tells whether the stream captures.
    bool enter(uint64_t stream);
    void leave(uint64_t stream);

    // For any number of ranks. `results`: int32 num_tokens_per_rank [R], num_tokens_per_expert [E], out_of_range [1] and
    // send_index [T, R], then is_token_in_rank, bool [T, R], in one piece.
    void layout(uint64_t topk_idx, int num_tokens, int top_k, int num_experts, int num_ranks, uint64_t results,
                uint64_t stream) const;
    // What a dispatch with fresh routing can launch before anybody knows how much will come: the layout, if the tables say so,
    // the exchange of counts, and this rank's tables. Returns the ticket to pass to `wait_counts`.
    uint32_t route(const Tables& t, uint64_t topk_idx, int alignment, int64_t bound, int64_t signature, uint64_t stream);
    // Take part in the exchange of counts only to say that this rank's arguments are wrong.
    uint32_t route_nothing(uint64_t stream);
    // Whether a count exchange's result is there within this time, which is too short to give up the GIL.
    bool counts_come(uint32_t ticket, double microseconds) const;
    // Waits for it on the CPU; to be called without the GIL. `now_and_then`, some ten times a second or more often, may end it
    // by an exception.
    void wait_counts(uint32_t ticket, uint64_t stream, const std::function<void()>& now_and_then) const;
    // What has come; nothing if the domain has failed.
    std::optional<CountResult> counts(int num_local_experts) const;
    void dispatch(const DispatchParams& p, uint64_t stream) const;
    // Take part in the next operation only to refuse it: for wrong arguments, because `bytes` did not fit, or, if they are -1,
    // because other nodes were waited for in vain. Unless every rank does, the domain has failed.
    void refuse(const std::string& operation, int64_t bytes, uint64_t stream) const;
    void arrange(const Tables& t, int64_t num_rows, int num_sms, uint64_t stream) const;
    // The same for received tokens whose picks nobody has placed before they came: one after the other.
    void place_picks(const PlaceParams& p, uint64_t stream) const;
    void arrange_rows(const ArrangeParams& p, uint64_t stream) const;
    void expand(const ExpandParams& p, uint64_t stream) const;
    void scales(const ScalesParams& p, uint64_t stream) const;
    void reduce(const ReduceParams& p, uint64_t stream) const;
    void combine(const CombineParams& p, uint64_t stream) const;

    // uint32: where the kernels leave word that they have failed.
    uint64_t failed_flag() const;
    // No failure: what every call asks first.
    bool is_well() const;
    // What CUDA says if its context is broken for good; else nothing. Allowed during captures.
    std::string cuda_error(uint64_t stream) const;
    std::optional<Failure> failure() const;

private:
    struct State;
    Communicator(int device, int rank, int num_ranks, double timeout_seconds);
    // Both throw once it is closed: what is launched reads and writes the arena.
    Arena& arena() const;
    const Domain& domain() const;

    int device_, rank_, num_ranks_;
    double timeout_seconds_;
    uint32_t tickets_ = 0;
    std::shared_ptr<Arena> arena_;  // null once it is closed
    std::shared_ptr<Closings> closings_;
    std::unique_ptr<State> state_;
    std::vector<void*> opened_;
};

}  // namespace deepep_train::nvlink
