// Arguments of the nvlink engine's kernels, the same names as in deepep_train/engines/nvlink.py. Pointers are plain addresses:
// Python owns every tensor.
#pragma once

#include <cstdint>

namespace deepep_train::nvlink {

// T tokens, K top-k, E experts of all ranks, R ranks.
struct LayoutParams {
    uint64_t topk_idx = 0;               // int64 [T, K]
    uint64_t num_tokens_per_rank = 0;    // int32 [R]
    uint64_t num_tokens_per_expert = 0;  // int32 [E]
    uint64_t is_token_in_rank = 0;       // bool [T, R]
    uint64_t send_index = 0;             // int32 [T, R]: which of this rank's rows for that rank the token is, -1: none
    uint64_t out_of_range = 0;           // int32 [1]: 1 if an index lies outside [-1, E)
    int num_tokens = 0;
    int top_k = 0;
    int num_experts = 0;
    int num_ranks = 0;
};

struct CountParams {
    uint64_t num_tokens_per_rank = 0;    // int32 [R], ignored if status is set
    uint64_t num_tokens_per_expert = 0;  // int32 [E]
    uint64_t out_of_range = 0;           // int32 [1], or 0
    uint64_t rank_prefix_matrix = 0;     // int32 [R, R], out: rows from ranks up to i to rank j
    uint64_t send_base = 0;              // int32 [R], out: first row at each destination that is ours
    int64_t signature = 0;
    int64_t bound = 0;
    int status = 0;
    int num_experts = 0;
    uint32_t ticket = 0;
};

struct DispatchParams {
    uint64_t x = 0;                        // [T, row_bytes]
    uint64_t scales = 0;                   // [T, scale_words], 32-bit words, any strides; 0: none
    uint64_t topk_idx = 0;                 // int64 [T, K]; 0: none
    uint64_t topk_weights = 0;             // float32 [T, K]; 0: none
    uint64_t send_index = 0;               // int32 [T, R]
    uint64_t send_base = 0;                // int32 [R]
    int64_t offsets[5] = {0, 0, 0, 0, 0};  // of this rank's tensors in its arena, bytes: x, scales, indices, weights, sources
    uint64_t signature = 0;
    int64_t row_bytes = 0;
    int64_t scale_row_stride = 0;  // in words
    int64_t scale_word_stride = 0;
    int num_tokens = 0;
    int send_sources = 0;  // whether token numbers travel, int32
    int scale_words = 0;
    int top_k = 0;
    int num_local_experts = 0;
    int num_sms = 0;
};

struct CombineParams {
    uint64_t out = 0;          // [T, hidden]
    uint64_t out_weights = 0;  // float32 [T, K]; 0: none
    uint64_t bias_0 = 0;       // [T, hidden]; 0: none
    uint64_t bias_1 = 0;
    uint64_t send_index = 0;               // int32 [T, R]
    uint64_t send_base = 0;                // int32 [R]
    int64_t offsets[5] = {0, 0, 0, 0, 0};  // of the tensors that peers read from this rank: y, -, -, weights, -
    uint64_t signature = 0;
    int64_t row_bytes = 0;
    int num_tokens = 0;
    int top_k = 0;
    int dtype = 0;  // 0 bfloat16, 1 float16, 2 float32
    int num_sms = 0;
};

}  // namespace deepep_train::nvlink
