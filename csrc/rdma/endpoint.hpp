// One rank's end of its rail: memory in NVSHMEM's symmetric heap, queue pairs, and the launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../low_latency/params.hpp"
#include "fresh.hpp"
#include "params.hpp"

namespace deepep_train::rdma {

// NVSHMEM, started once in a process for one group of ranks.
std::string unique_id();
void start(int device, int rank, int num_ranks, const std::string& id);
// Collective among all ranks that were started, as is `queue_pairs`; never freed.
void* allocate(size_t bytes);
// Where a rank's copy of what `allocate` gave is in this process; throws if it cannot be reached.
void* of_peer(const void* symmetric, int rank);
// int [count], wherever NVSHMEM keeps it.
int* queue_pairs(int count);

struct Failure {
    uint64_t number = 0;
    std::string cause;
    std::vector<int> ranks;
};

// Its memory lives as long as the process: freeing is a collective call, and a destructor makes none.
class Endpoint {
public:
    // Collective. `segment_bytes`: for the rows of each node, a multiple of 128; `node_failed`: where nvlink's kernels leave
    // word.
    Endpoint(int device, int rank, int num_ranks, int num_local_ranks, int64_t segment_bytes, int num_qps,
             double timeout_seconds, uint64_t node_failed);

    // Collective, and nothing may be under way. What was there stays: CUDA graphs may use it.
    void resize(int64_t segment_bytes);
    uint64_t send() const { return reinterpret_cast<uint64_t>(end_.send); }
    uint64_t recv() const { return reinterpret_cast<uint64_t>(end_.recv); }
    int64_t segment_bytes() const { return end_.segment_bytes; }
    // Bytes that the exchanges which have run so far have put.
    uint64_t put_bytes() const { return page_->put_bytes; }
    uint64_t failed_flag() const { return reinterpret_cast<uint64_t>(end_.failed); }
    // Take part in the next exchange only to refuse it; or tell the rail that this rank has failed.
    void refuse(bool for_good, uint64_t stream) const;
    void rail(const RailParams& p, uint64_t stream) const;
    void sum(const SumParams& p, uint64_t stream) const;
    // Of a fresh dispatch, in this order: this rank's counts; what all ranks' come to; the words that travel beside the rows;
    // where what came goes within the node; the received words, apart.
    void tell(const TellParams& p, uint64_t stream) const;
    void digest(const DigestParams& p, uint64_t stream) const;
    void pack_words(const PackParams& p, uint64_t stream) const;
    void find_slots(const SlotParams& p, uint64_t stream) const;
    void unpack_words(const UnpackParams& p, uint64_t stream) const;
    void move_weights(const WeightParams& p, uint64_t stream) const;
    void put_dispatch(const low_latency::DispatchParams& p, uint64_t stream) const;
    void put_combine(const low_latency::CombineParams& p, uint64_t stream) const;
    void answer(const low_latency::Common& c, bool is_combine, uint64_t stream) const;
    std::optional<Failure> failure() const;

private:
    int device_;
    End end_{};
    Page* page_ = nullptr;
};

}  // namespace deepep_train::rdma
