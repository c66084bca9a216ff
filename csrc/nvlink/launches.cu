// What a communicator launches: each of its calls filled in as the kernels want it.
#include "../common/on_device.hpp"
#include "communicator.hpp"
#include "kernels.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

namespace {

LayoutParams layout_params(const Tables& t, uint64_t topk_idx) {
    LayoutParams p;
    p.topk_idx = topk_idx;
    p.num_tokens = t.num_tokens;
    p.top_k = t.top_k;
    p.num_experts = t.num_experts;
    p.num_ranks = t.num_ranks;
    p.num_tokens_per_rank = t.num_tokens_per_rank;
    p.num_tokens_per_expert = t.num_tokens_per_expert;
    p.out_of_range = t.checked;
    p.send_index = t.checked + sizeof(int32_t);
    p.is_token_in_rank = t.is_token_in_rank;
    return p;
}

}  // namespace

void Communicator::layout(uint64_t topk_idx, int num_tokens, int top_k, int num_experts, int num_ranks, uint64_t results,
                          uint64_t stream) const {
    Tables t(num_tokens, top_k, num_experts, num_ranks, false, true);
    t.num_tokens_per_rank = results;
    t.num_tokens_per_expert = t.num_tokens_per_rank + sizeof(int32_t) * num_ranks;
    t.checked = t.num_tokens_per_expert + sizeof(int32_t) * num_experts;
    t.is_token_in_rank = t.checked + sizeof(int32_t) * (1 + int64_t{num_tokens} * num_ranks);
    const OnDevice on(device_);
    launch_layout(layout_params(t, topk_idx), as_stream(stream));
}

uint32_t Communicator::route(const Tables& t, uint64_t topk_idx, int alignment, int64_t bound, int64_t signature,
                             uint64_t stream) {
    const OnDevice on(device_);
    if (t.counts_tokens) launch_layout(layout_params(t, topk_idx), as_stream(stream));
    CountParams c;
    c.num_tokens_per_rank = t.num_tokens_per_rank;
    c.num_tokens_per_expert = t.num_tokens_per_expert;
    c.out_of_range = t.checked;
    c.tokens_per_expert = t.tokens_per_expert;
    c.rank_prefix_matrix = t.rank_prefix_matrix;
    c.send_base = t.send_base;
    c.num_received = t.num_received;
    c.num_several = t.num_several;
    c.num_summed = t.num_summed;
    c.expert_base = t.expert_base;
    c.result_words = t.result_words();
    c.signature = signature;
    c.bound = bound;
    c.num_experts = t.num_experts;
    c.alignment = alignment;
    c.expert_layout = t.expert_layout;
    c.ticket = ++tickets_;
    launch_count(domain(), c, as_stream(stream));
    PlaceParams p;
    p.topk_idx = topk_idx;
    p.send_index = t.checked + sizeof(int32_t);
    p.send_base = t.send_base;
    p.expert_base = t.expert_layout ? t.expert_base : 0;
    p.send_slot = t.send_slot;
    p.send_row = t.send_row;
    p.pull_row = t.pull_row;
    p.pick_row = t.pick_row;
    p.pick_rank = t.pick_rank;
    p.chunk_counts = t.chunk_counts;
    p.num_tokens = t.num_tokens;
    p.top_k = t.top_k;
    p.num_experts = t.num_experts;
    p.num_ranks = num_ranks_;
    launch_place(p, as_stream(stream));
    return c.ticket;
}

uint32_t Communicator::route_nothing(uint64_t stream) {
    const OnDevice on(device_);
    CountParams c;
    c.status = 1;
    c.ticket = ++tickets_;
    launch_count(domain(), c, as_stream(stream));
    return c.ticket;
}

void Communicator::dispatch(const DispatchParams& p, uint64_t stream) const {
    const OnDevice on(device_);
    launch_dispatch(domain(), p, as_stream(stream));
}

void Communicator::refuse(const std::string& operation, int64_t bytes, uint64_t stream) const {
    const OnDevice on(device_);
    const int64_t reason = bytes == 0 ? kRefusesArguments : bytes < 0 ? kRefusesRail : kRefusesMemory;
    launch_refuse(domain(), operation == "combine" ? kCombine : kDispatch, reason, bytes, as_stream(stream));
}

void Communicator::arrange(const Tables& t, int64_t num_rows, int num_sms, uint64_t stream) const {
    const OnDevice on(device_);
    ArrangeParams p;
    p.rows_of = t.rows_of;
    p.row_slot = t.row_slot;
    p.several = t.several;
    p.num_several = t.num_several;
    p.summed = t.summed;
    p.num_summed = t.num_summed;
    p.num_received = t.num_received;
    p.own_first = t.send_base + sizeof(int32_t) * rank_;
    p.num_own = t.num_tokens_per_rank + sizeof(int32_t) * rank_;
    p.num_rows = num_rows;
    p.top_k = t.top_k;
    p.num_sms = num_sms;
    launch_arrange(domain(), p, as_stream(stream));
}

void Communicator::place_picks(const PlaceParams& p, uint64_t stream) const {
    const OnDevice on(device_);
    launch_place(p, as_stream(stream));
}

void Communicator::arrange_rows(const ArrangeParams& p, uint64_t stream) const {
    const OnDevice on(device_);
    launch_arrange(domain(), p, as_stream(stream));
}

void Communicator::expand(const ExpandParams& p, uint64_t stream) const {
    const OnDevice on(device_);
    launch_expand(domain(), p, as_stream(stream));
}

void Communicator::scales(const ScalesParams& p, uint64_t stream) const {
    const OnDevice on(device_);
    launch_scales(domain(), p, as_stream(stream));
}

void Communicator::reduce(const ReduceParams& p, uint64_t stream) const {
    const OnDevice on(device_);
    launch_reduce(domain(), p, as_stream(stream));
}

void Communicator::combine(const CombineParams& p, uint64_t stream) const {
    const OnDevice on(device_);
    launch_combine(domain(), p, as_stream(stream));
}

}  // namespace deepep_train::nvlink
