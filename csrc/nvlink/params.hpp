// Arguments of the nvlink engine's kernels, the same names as in deepep_train/engines/nvlink.py. Pointers are plain addresses:
// Python owns every tensor. tables.hpp says where the tables of a dispatch lie.
//
// T tokens of this rank, K top-k, E experts of all ranks, L = E / R of this one, R ranks. This rank receives N tokens, and its
// received tensor has M rows: N in rank layout; in expert layout one for every (token, local expert), and padding.
//
// Which row is whose, int32:
//   send_index [T, R]  the token's number among this rank's tokens for that rank; -1: not sent there
//   send_slot  [T, R]  its number among all tokens that rank receives
//   send_row   [T, R]  the first of its rows there (in rank layout the same as send_slot)
//   pull_row   [T, R]  where combine finds its sum there: that row, or -2 - send_slot for a partial sum
//   pick_row   [T, K]  the row of each pick, at the rank pick_rank [T, K] of its expert; -1: none
//   rows_of    [N, K]  the rows of a received token, ascending; -1 after the last
//   row_slot   [M]     the received token that a row holds; -1: padding
//   several    [N]     the tokens that have more than one row, num_several of them, in no order
//   summed     [N]     those, and all that came from other ranks: num_summed of them, in no order
#pragma once

#include <cstdint>

namespace deepep_train::nvlink {

struct LayoutParams {
    uint64_t topk_idx = 0;               // int64 [T, K]
    uint64_t num_tokens_per_rank = 0;    // int32 [R]
    uint64_t num_tokens_per_expert = 0;  // int32 [E]
    uint64_t is_token_in_rank = 0;       // bool [T, R]
    uint64_t send_index = 0;
    uint64_t out_of_range = 0;  // int32 [1]: 1 if an index lies outside [-1, E)
    int num_tokens = 0;
    int top_k = 0;
    int num_experts = 0;
    int num_ranks = 0;
};

struct CountParams {
    uint64_t num_tokens_per_rank = 0;    // int32 [R], ignored if status is set
    uint64_t num_tokens_per_expert = 0;  // int32 [E]
    uint64_t out_of_range = 0;           // int32 [1], or 0
    uint64_t tokens_per_expert = 0;      // out, int64 [L]: rows of each local expert, rounded up
    uint64_t rank_prefix_matrix = 0;     // int32 [R, R]: tokens from ranks up to i to rank j
    uint64_t send_base = 0;              // int32 [R]: first token at each destination that is ours
    uint64_t num_received = 0;           // int32 [1]
    uint64_t num_several = 0;            // int32 [1]: 0, for arrange to count from
    uint64_t num_summed = 0;             // int32 [1]: the same
    uint64_t expert_base = 0;            // int32 [E]: first row of each expert's group that is ours; unused in rank layout
    int64_t result_words = 0;            // of all these, which stand one after another; 0: none are wanted
    int64_t signature = 0;
    int64_t bound = 0;  // num_worst_tokens
    int status = 0;
    int num_experts = 0;
    int alignment = 1;
    int expert_layout = 0;
    uint32_t ticket = 0;
};

struct PlaceParams {
    uint64_t topk_idx = 0;     // int64 [T, K]
    uint64_t send_index = 0;   // in; 0: picks alone are placed, pick_row alone is made
    uint64_t send_base = 0;    // in, as CountParams
    uint64_t expert_base = 0;  // in; 0: rank layout, where only send_slot is made
    uint64_t send_slot = 0;
    uint64_t send_row = 0;
    uint64_t pull_row = 0;
    uint64_t pick_row = 0;
    uint64_t pick_rank = 0;     // 0: not wanted
    uint64_t chunk_counts = 0;  // int32 [kChunks, E], scratch
    int num_tokens = 0;
    int top_k = 0;
    int num_experts = 0;
    int num_ranks = 0;
};
constexpr int kChunks = 128;

// Which of the rows an operation takes: of `num_parts` that stand one after another, `count` from `first` on, the first behind
// the last.
struct Parts {
    uint64_t at = 0;  // int32 [num_parts + 1]: where each begins; 0: all rows
    int num_parts = 0;
    int first = 0;
    int count = 0;
};

// What a failed operation leaves as NaN.
struct Outputs {
    char* address[5] = {};
    int64_t bytes[5] = {};
};

struct DispatchParams {
    uint64_t x = 0;         // [T, row_bytes]
    uint64_t row_from = 0;  // uint64 [T]: where each row lies, if not in x; 0: in x
    uint64_t scales = 0;    // [T, scale_words], 32-bit words, any strides; 0: none
    // uint64 [T]: where each row's scales lie, if not there; then they are whole 16-byte pieces, send_slot is send_row, and
    // only rows and scales travel.
    uint64_t scales_from = 0;
    uint64_t topk_idx = 0;      // int64 [T, K]; 0: no indices travel
    uint64_t topk_weights = 0;  // float32 [T, K]; 0: none
    uint64_t send_slot = 0;
    uint64_t send_row = 0;
    uint64_t pick_row = 0;  // expert layout: travels instead of the indices
    // Of this rank's tensors in its arena, bytes: x [M], scales [N], indices int64 or rows int32 [N, K], weights float32 [N, K]
    // or, in expert layout, [M], source tokens int32 [N].
    int64_t offsets[5] = {0, 0, 0, 0, 0};
    int64_t sizes[5] = {0, 0, 0, 0, 0};
    uint64_t signature = 0;
    uint64_t rail_failed = 0;    // uint32: if not 0, this rank refuses; 0: no such flag
    uint64_t num_tokens_at = 0;  // int32 [1]: how many of the num_tokens there are; 0: all
    Parts parts;                 // of those
    int64_t row_bytes = 0;
    int64_t scale_row_stride = 0;  // in words
    int64_t scale_word_stride = 0;
    int num_tokens = 0;
    int send_sources = 0;  // whether token numbers travel
    int scale_words = 0;
    int top_k = 0;
    int num_local_experts = 0;
    int num_sms = 0;
};

// After a dispatch with fresh routing into expert layout.
struct ArrangeParams {
    uint64_t rows_of = 0;       // int32 [N, K], in: by pick; out: ascending
    uint64_t row_slot = 0;      // int32 [M], out
    uint64_t several = 0;       // int32 [N], out; 0: no lists are wanted
    uint64_t num_several = 0;   // int32 [1], out, 0 before
    uint64_t summed = 0;        // int32 [N], out
    uint64_t num_summed = 0;    // int32 [1], out, 0 before
    uint64_t num_received = 0;  // int32 [1]
    uint64_t own_first = 0;     // int32 [1], of the received tokens the first that is this rank's own
    uint64_t num_own = 0;       // int32 [1]
    int64_t num_rows = 0;
    int top_k = 0;
    int num_sms = 0;
};

// After every dispatch into expert layout, and after one into rank layout with num_worst_tokens: rows that are not sent.
struct ExpandParams {
    uint64_t x = 0;        // [M, row_bytes]
    uint64_t source = 0;   // [N, row_bytes], whose rows are copied to x; 0: a token's first row is there already
    uint64_t scales = 0;   // [M, scale_words], rank layout by rows; 0: none
    uint64_t weights = 0;  // float32 [M] (rank layout: [M, K]); 0: none
    uint64_t indices = 0;  // int64 [M, K], rank layout; 0: none
    uint64_t rows_of = 0;  // 0: rank layout
    uint64_t row_slot = 0;
    uint64_t several = 0;  // 0: all N
    uint64_t num_several = 0;
    uint64_t num_received = 0;  // int32 [1]
    int64_t row_bytes = 0;
    int64_t num_rows = 0;
    int scale_words = 0;
    int top_k = 0;
    int num_sms = 0;
};

// After every dispatch with scales but one into rank layout by rows: the scales of group g stand in one block of W words by
// scale_words, W its rows rounded up to `multiple`; blocks follow each other without gaps.
struct ScalesParams {
    uint64_t scales = 0;        // out, num_words
    uint64_t slot_scales = 0;   // [N, scale_words]
    uint64_t row_slot = 0;      // 0: row m holds token m
    uint64_t group_rows = 0;    // int64 [num_groups], their sum M; 0: one group of num_rows
    uint64_t num_received = 0;  // int32 [1]
    int64_t num_words = 0;
    int64_t num_rows = 0;
    int num_groups = 1;
    int scale_words = 0;
    int multiple = 1;
    int tokens_innermost = 0;   // a block is [scale_words, W], else [W, scale_words]
    uint32_t padding_word = 0;  // of rows that hold no token; the rest of a block is 0
    int num_sms = 0;
};

// Before a combine from expert layout: sums of the rows that a received token has here.
struct ReduceParams {
    uint64_t y = 0;         // [M, row_bytes]
    uint64_t partials = 0;  // [N, row_bytes], out
    uint64_t rows_of = 0;
    uint64_t tokens = 0;      // several, or summed where peers cannot reach y; 0: all N
    uint64_t num_tokens = 0;  // int32 [1]
    int64_t row_bytes = 0;
    int top_k = 0;
    int dtype = 0;
    int num_sms = 0;
};

struct CombineParams {
    uint64_t y = 0;            // [M, row_bytes], this rank's, wherever it lies
    uint64_t out = 0;          // [T, row_bytes]
    uint64_t out_weights = 0;  // float32 [T, K]; 0: none
    uint64_t bias_0 = 0;       // [T, row_bytes]; 0: none
    uint64_t bias_1 = 0;
    uint64_t pull_row = 0;  // in rank layout send_slot
    uint64_t send_slot = 0;
    uint64_t pick_row = 0;  // for weights [M]; 0: they are [N, K]
    uint64_t pick_rank = 0;
    // Of the tensors that peers read from this rank: y [M], partial sums [N], 1 if all that they pull is among those (else the
    // sums of tokens with several rows), weights, nothing.
    int64_t offsets[5] = {0, 0, 0, 0, 0};
    uint64_t signature = 0;
    uint64_t rail_failed = 0;    // as above
    uint64_t num_tokens_at = 0;  // as above
    Parts parts;                 // as above
    int64_t row_bytes = 0;
    int num_tokens = 0;
    int top_k = 0;
    int dtype = 0;  // 0 bfloat16, 1 float16, 2 float32
    int num_sms = 0;
};

}  // namespace deepep_train::nvlink
