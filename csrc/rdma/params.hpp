// Arguments of the rdma engine's kernels, the same names as in deepep_train/engines/rails.py. Pointers are plain addresses.
//
// A rank meets, over its rail, the rank of the same local number on every other node, and has with each a stream in either
// direction. Rows go from `send` here to the segment of this node in `recv` there; rows for this node go nowhere.
#pragma once

#include <cstdint>

namespace deepep_train::rdma {

constexpr int kMaxNodes = 256;

// One exchange along the rail, or some turns of one.
struct RailParams {
    uint64_t rows = 0;       // the rows, [any, row_bytes], if they are to be packed; 0: they are in `send` already
    uint64_t token = 0;      // int32 [S]: which of them each row sent is, by node and then ascending; this node's included
    uint64_t send_at = 0;    // int32 [nodes + 1]: where each node's begin among the S rows
    uint64_t recv_at = 0;    // int32 [nodes + 1]: the same of the F rows that come, this node's included
    uint64_t beside = 0;     // further rows, [any, beside_bytes], that travel behind those, such as scales
    uint64_t addresses = 0;  // out, uint64 [F]: where each row that comes lies, this node's in `rows`; 0: not wanted
    uint64_t beside_addresses = 0;  // out, uint64 [F], of what is beside it
    int64_t row_bytes = 0;          // a multiple of 16, as is the next
    int64_t beside_bytes = 0;
    int64_t recv_offset = 0;  // where rows begin in the segment that they come to, a multiple of 16
    uint64_t signature = 0;   // of what the rail's ranks must agree on: 24 bits, not all of them set
    // Where an int32 lies, 0 on all of the rail or on none: if it is, nobody enters this exchange. No address: all do.
    uint64_t goes = 0;
    int rows_per_put = 1;
    // Turns that the exchange has: in turn t rows go to the t-th node behind this one and come from the t-th before it; in
    // turns 0 and num_nodes, of this node's own, nothing crosses. What other turns' are is neither put, nor waited for.
    int first_turn = 0;
    int end_turn = kMaxNodes;
    int num_sms = 1;
};

// Every token's sum: biases, then nodes in ascending order.
struct SumParams {
    uint64_t out = 0;     // [T, row_bytes]
    uint64_t bias_0 = 0;  // [T, row_bytes]; 0: none
    uint64_t bias_1 = 0;
    uint64_t place = 0;    // int32 [T, nodes]: which of a node's sums is the token's; -1: none
    uint64_t recv_at = 0;  // int32 [nodes + 1], of the exchange in which this rank's own sums stand in `send`
    int64_t row_bytes = 0;
    int num_tokens = 0;
    int dtype = 0;  // 0 bfloat16, 1 float16, 2 float32
    int num_sms = 1;
};

// Queue pairs, dealt to blocks in turn.
struct Pairs {
    const int* qps;
    int count;
};

// What a kernel needs to know of this end.
struct End {
    int node;
    int num_nodes;
    int num_local_ranks;
    int rail;
    int num_qps;
    uint64_t timeout_ns;
    int64_t segment_bytes;  // of `recv`, for each node
    char* send;             // symmetric
    char* recv;             // symmetric
    // Symmetric, written by the rank of that node: [2][kMaxNodes], what it says of the exchange it is in, in turns;
    // [kMaxNodes], rows that it has put.
    uint64_t* ready;
    uint64_t* arrived;
    // This rank's alone.
    uint64_t* seen;         // [num_nodes]: rows taken so far
    uint64_t* number;       // of the last exchange
    uint32_t* joined;       // blocks that have finished the current one
    uint64_t* put_bytes;    // so far, signals included
    uint32_t* failed;       // sticky
    uint32_t* node_failed;  // nvlink's, of the node
    int* qps;               // [num_qps]
    struct Page* page;
};

// Why an exchange did not take place.
enum Cause : uint32_t {
    kNone = 0,
    kMissingReady = 1,  // ranks did not say in time that they are ready
    kMissingRows = 2,   // their rows did not come in time
    kMismatched = 3,    // they are in another call
    kRefused = 4,       // they refused to take part
    kGaveUp = 5,        // they have failed themselves
    kNodeFailed = 6,    // this rank's node has
    kCounts = 7         // what the ranks told of a fresh dispatch, see fresh.hpp's Verdict
};

// Page-locked host memory: the first failure, `failed` last, and what has been put.
struct Page {
    volatile uint64_t put_bytes;
    volatile uint32_t failed;
    volatile uint64_t number;
    volatile uint32_t cause;
    volatile uint8_t at_fault[kMaxNodes];
};

}  // namespace deepep_train::rdma
