// Where the tables of one dispatch lie; params.hpp says what they mean. The first of them come out of one block of memory,
// since every tensor costs Python several microseconds. Python owns that block, and reads here where its tensors begin.
#pragma once

#include <cstdint>

#include "params.hpp"

namespace deepep_train::nvlink {

struct Tables {
    int num_tokens = 0;
    int top_k = 0;
    int num_experts = 0;
    int num_ranks = 0;
    bool expert_layout = false;
    bool counts_tokens = false;  // else the caller has done that: the first four are his tensors

    // Of the layout.
    uint64_t num_tokens_per_rank = 0;
    uint64_t num_tokens_per_expert = 0;
    uint64_t is_token_in_rank = 0;
    uint64_t checked = 0;  // out_of_range, then send_index
    // Results of the count exchange, one after another.
    uint64_t tokens_per_expert = 0;
    uint64_t rank_prefix_matrix = 0;
    uint64_t send_base = 0;
    uint64_t num_received = 0;
    uint64_t num_several = 0;
    uint64_t num_summed = 0;
    uint64_t expert_base = 0;
    // Of every token's rows; in rank layout the three of the first line are one.
    uint64_t send_slot = 0, send_row = 0, pull_row = 0;
    uint64_t pick_row = 0;
    uint64_t pick_rank = 0;
    uint64_t chunk_counts = 0;
    // Of the received tokens, in expert layout, in memory that Python takes when it knows how many there are.
    uint64_t rows_of = 0;
    uint64_t row_slot = 0;
    uint64_t several = 0;
    uint64_t summed = 0;

    Tables(int tokens, int k, int experts, int ranks, bool expert, bool counts)
        : num_tokens(tokens), top_k(k), num_experts(experts), num_ranks(ranks), expert_layout(expert), counts_tokens(counts) {}

    // int32 words of the block, an even number.
    int64_t words() const { return Tables(*this).lay_out(0); }

    // The block begins at `address`, a multiple of 8. Returns its words.
    int64_t lay_out(uint64_t address) {
        const uint64_t start = address;
        const auto take = [&address](int64_t words) {
            const uint64_t at = address;
            address += sizeof(int32_t) * words;
            return at;
        };
        const int64_t places = int64_t{num_tokens} * num_ranks, picks = int64_t{num_tokens} * top_k;
        tokens_per_expert = take(2 * (num_experts / num_ranks));
        rank_prefix_matrix = take(num_ranks * num_ranks);
        send_base = take(num_ranks);
        num_received = take(1);
        num_several = take(1);
        num_summed = take(1);
        expert_base = take(num_experts);
        if (counts_tokens) {
            num_tokens_per_rank = take(num_ranks);
            num_tokens_per_expert = take(num_experts);
            checked = take(1 + places);
            is_token_in_rank = take((places + 3) / 4);  // bools
        }
        send_slot = send_row = pull_row = take(places);
        if (expert_layout) {
            send_row = take(places);
            pull_row = take(places);
            pick_row = take(picks);
            pick_rank = take(picks);
            chunk_counts = take(int64_t{kChunks} * num_experts);
        }
        const auto words = static_cast<int64_t>((address - start) / sizeof(int32_t));
        return words + words % 2;  // Python looks at it as int64, too
    }

    // Of the results.
    int64_t result_words() const {
        return static_cast<int64_t>((expert_base - tokens_per_expert) / sizeof(int32_t)) + num_experts;
    }
};

}  // namespace deepep_train::nvlink
