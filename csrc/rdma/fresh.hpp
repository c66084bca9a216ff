// Arguments of the kernels that make a fresh dispatch's tables, the same names as in deepep_train/engines/rail_fresh.py. The
// CPU is told nothing by them: what depends on counts has room for the most there may be, and the counts stay on the GPU.
//
// T tokens of this rank, K top-k, E experts, R ranks, L of them a node. S rows leave this rank over the rail, F come
// over it to be forwarded, and both count this node's own; N rows are received. Ranks' counts are rows of words: `kHead` of
// them, then tokens by rank, node and expert.
#pragma once

#include <cstdint>

namespace deepep_train::rdma {

// A row of counts begins with: whether the rank's arguments are wrong; a signature, in halves; num_worst_tokens; whether its
// layout does not count what it should.
constexpr int kHead = 5;

struct TellParams {
    uint64_t is_token_in_rank = 0;       // bool [T, R]
    uint64_t num_tokens_per_rank = 0;    // int32 [R]
    uint64_t num_tokens_per_expert = 0;  // int32 [E]
    uint64_t wrong = 0;                  // int32 [1]
    uint64_t place = 0;                  // out, int32 [T, nodes]: a token's number among this rank's for the node; -1: none
    uint64_t row = 0;                    // out, int32 [row_words]
    int64_t signature = 0;               // 62 bits
    int bound = 0;                       // num_worst_tokens
    int status = 0;                      // 1: this rank has nothing but word that its arguments are wrong
    int num_tokens = 0;
    int num_ranks = 0;
    int num_nodes = 0;
    int num_experts = 0;
    int row_words = 0;
};

// What `DigestParams.found` says, by place.
enum Found { kVerdict = 0, kBounded = 1, kNumReceived = 2, kNumRows = 3, kMost = 4, kGoes = 5, kFoundWords = 8 };
// Why a dispatch cannot take place; the same on every rank. kBad: some rank's arguments are wrong, or differ from this rank's.
enum Verdict { kFine = 0, kBad = 1, kOverflow = 2, kNoRoom = 3, kFailedBefore = 4 };

struct DigestParams {
    uint64_t table = 0;  // int32 [R, row_words]: every rank's row
    uint64_t rows = 0;   // scratch, int32 [R]
    // Out, one after another, all 0 if the dispatch does not take place: `result_words` of int32.
    uint64_t tokens_per_expert = 0;  // int64 [E / R]: rows of this rank's experts, rounded up
    uint64_t found = 0;              // int32 [kFoundWords]: a verdict, whether any rank has num_worst_tokens, N, the rows of
                                     // this rank's tensor, the most rows of one stream over all ranks, and
                                     // whether rows may cross: the dispatch takes place, and they fit
    uint64_t send_at = 0;            // int32 [nodes + 1]: where each node's begin among the rows that leave
    uint64_t recv_at = 0;            // int32 [nodes + 1]: the same of the F
    uint64_t received_upto = 0;      // int32 [R]: rows that this rank gets from ranks up to each
    uint64_t theirs = 0;             // int32 [nodes, L]: rows that each rank of this node gets from each source on the rail
    uint64_t begin = 0;              // int32 [nodes, L]: where these begin in that rank's tensor
    uint64_t expert_base = 0;        // int32 [E / R]: the first row of each of this rank's experts
    int64_t result_words = 0;
    // Of the host, int64 [kReportHead + 3 R]: the verdict, the most rows of one stream, `widest`; then by rank whether it is at
    // fault (kAtFaultMiscounted: for its layout), its num_worst_tokens and its rows. Written if the dispatch fails for good.
    uint64_t report = 0;
    int64_t room = 0;    // rows that fit into a segment
    int64_t widest = 0;  // bytes of the widest of them
    int rank = 0;
    int num_ranks = 0;
    int num_local_ranks = 0;
    int num_experts = 0;
    int alignment = 1;
    int expert_layout = 0;
    int row_words = 0;
};
constexpr int kReportHead = 3;
constexpr int kAtFaultMiscounted = 2;

// What travels beside the rows that leave, words for each: its token's number, indices and weights, and a bit for each rank of
// the node where it goes.
struct PackParams {
    uint64_t is_token_in_rank = 0;
    uint64_t topk_idx = 0;      // int64 [T, K]; 0: none, and K is 0
    uint64_t topk_weights = 0;  // float32 [T, K]; 0: none
    uint64_t place = 0;
    uint64_t send_at = 0;
    uint64_t words = 0;  // out, int32 [S, row_words]: by node, and then by the token's place; 0: not wanted
    uint64_t token = 0;  // out, int32 [S]: the token of each
    int num_tokens = 0;
    int top_k = 0;
    int num_ranks = 0;
    int num_nodes = 0;
    int row_words = 0;
};

// Where rows that came over the rail go within the node.
struct SlotParams {
    uint64_t addresses = 0;  // uint64 [F]: where each row's words lie
    uint64_t recv_at = 0;
    uint64_t theirs = 0;
    uint64_t begin = 0;
    uint64_t slot = 0;    // out, int32 [capacity, L]: its row in the tensor of each rank of this node; -1: none
    uint64_t number = 0;  // out, int32 [capacity, L]: its number among the F for that rank; -1: none
    int64_t capacity = 0;
    int mask_at = 0;  // the first word with bits of ranks
    int num_nodes = 0;
    int num_local_ranks = 0;
};

// The words of received rows, apart. Behind the last of the N: 0, -1, 0.0.
struct UnpackParams {
    uint64_t words = 0;  // int32 [capacity, row_words]
    uint64_t received_upto = 0;
    uint64_t num_received = 0;  // int32 [1]
    uint64_t source = 0;        // out, int32 [capacity, 2]: rank and token
    uint64_t topk_idx = 0;      // out, int64 [capacity, K]: local expert numbers, -1 where the expert lives elsewhere; 0: none
    uint64_t topk_weights = 0;  // out, float32 [capacity, K], 0.0 there; 0: none
    int64_t capacity = 0;
    int top_k = 0;
    int row_words = 0;
    int num_ranks = 0;
    int first_expert = 0;
    int num_local_experts = 0;
};

// Weights by pick to weights by row, which are 0 before, or back.
struct WeightParams {
    uint64_t by_pick = 0;   // float32 [N, K]
    uint64_t by_row = 0;    // float32 [num_rows]
    uint64_t pick_row = 0;  // int32 [N, K]; -1: none
    int64_t num_picks = 0;
    int64_t num_rows = 0;
    int back = 0;
};

}  // namespace deepep_train::rdma
