// Arguments of the low-latency kernels, the same names as in deepep_train/engines/low_latency.py. Pointers are plain addresses:
// Python owns every tensor.
//
// R ranks, E experts of all ranks, L = E / R of this one, M most tokens of a rank, H hidden, K top-k, T tokens of this rank.
#pragma once

#include <cstdint>

namespace deepep_train::low_latency {

constexpr int kMaxRanks = 64;
constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 16;
constexpr int kMaxHidden = 16384;
constexpr int kSlice = 1024;  // bytes of a row that a combine in slices moves at once
constexpr int kTurns = 3;     // its slices that are in memory at the same time

// What the ranks of a group share for calls of one shape, as one of them sees it.
struct Common {
    uint64_t spaces = 0;     // uint64 [R]: every rank's space (space.cuh), as this process maps it; 0: it lies on another node
    uint64_t own = 0;        // that of this rank
    uint64_t arenas = 0;     // uint64 [R]: the same of the memory that rows for a combine without copies lie in
    uint64_t mask = 0;       // int32 [R]: not 0: left out
    uint64_t put_bytes = 0;  // uint64 [1], out: the bytes that this rank puts to other nodes are added; 0: there are none
    uint64_t timeout_ns = 0;
    int rank = 0;
    int num_ranks = 0;
    int first_local = 0;  // ranks of this node, which reach each other's memory
    int num_local = 0;
    int num_experts = 0;
    int max_tokens = 0;
    int hidden = 0;
    int top_k = 0;
    int set = 0;  // which of the two sets of slots
    int num_sms = 0;
};

enum Scales : int { kBf16 = 0, kFloatScales = 1, kRoundScales = 2, kPackedScales = 3 };  // how rows are sent

struct DispatchParams : Common {
    // Sending.
    uint64_t x = 0;           // bf16 [T, H]
    uint64_t topk_idx = 0;    // int64 [T, K]
    uint64_t pick_index = 0;  // int32 [T, K], out: the number of its row among this rank's rows for its expert; -1: no pick
    uint64_t bad_index = 0;   // int32 [1] of page-locked memory, out: 1 if some index lies outside [-1, E)
    int num_tokens = 0;
    int scales = 0;  // enum Scales
    int keep = 0;    // rows stay here, for receivers to read
    // Receiving.
    uint64_t recv_x = 0;       // [L, R * M, H]
    uint64_t recv_scales = 0;  // 32-bit words [L, H / 128 or H / 512, R * M]
    uint64_t src_info = 0;     // int32 [L, R * M]
    uint64_t ranges = 0;       // int64 [L, R]
    uint64_t recv_count = 0;   // int32 [L]
    uint64_t cumulative = 0;   // int32 [L], or 0
    uint64_t wait_ns = 0;      // int64 [R], or 0
};

struct CombineParams : Common {
    // Sending.
    uint64_t y = 0;     // bf16 [L, R * M, H]
    int zero_copy = 0;  // y lies in memory that peers reach
    int logfmt = 0;     // rows travel in 10 bits a value
    // Receiving.
    uint64_t out = 0;           // bf16 [T, H]
    uint64_t topk_idx = 0;      // int64 [T, K]
    uint64_t topk_weights = 0;  // float32 [T, K]
    uint64_t pick_index = 0;    // of the dispatch
    uint64_t wait_ns = 0;       // int64 [R], or 0
    int num_tokens = 0;
};

}  // namespace deepep_train::low_latency
