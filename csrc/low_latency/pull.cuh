// What a rank does with its tokens in combine: pulls their rows from the experts' ranks and adds weight * row in float32, over
// k in ascending order, rounding once.
#pragma once

#include <cuda_bf16.h>

#include "logfmt.cuh"
#include "space.cuh"

namespace deepep_train::low_latency {

// Where this rank's rows are, in shared memory.
struct Sources {
    uint64_t came;
    const char* rows[kMaxRanks];  // null: a rank that has none of ours
    int how[kMaxRanks];           // enum Shown

    // By one warp: waits until every peer's rows have come as far as `step`.
    DT_DEVICE void wait(const CombineParams& p, Control* mine, uint32_t number, uint32_t step) {
        const uint64_t present =
            wait_for_peers(p, mine->shown[p.set], number * kSteps + step, mine->decided[p.set][1], number, p.wait_ns);
        const uint32_t dispatch = mine->dispatches[p.set];
        if (threadIdx.x % 32 == 0) came = present;
        for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32) {
            const bool has = is_in(present, peer) && mine->placed[p.set].at[peer] == dispatch;
            rows[peer] = has ? space_of(p, peer) + mine->shown_at[p.set][peer] : nullptr;
            how[peer] = mine->shown_how[p.set][peer];
        }
    }
};

// A token's rows (none of token -1): lane k knows where the row of pick k is (null: nowhere), its weight, and whether it is in
// LogFMT.
struct Picks {
    const char* row;
    float weight;
    bool logfmt = false;

    DT_DEVICE Picks(const CombineParams& p, const Sources& sources, const Place* places, int64_t t)
        : row(nullptr), weight(0.0f) {
        const int lane = threadIdx.x % 32, local = p.num_experts / p.num_ranks;
        if (lane >= p.top_k || t < 0) return;
        const int64_t pick = t * p.top_k + lane, e = reinterpret_cast<const int64_t*>(p.topk_idx)[pick];
        const int index = reinterpret_cast<const int32_t*>(p.pick_index)[pick];
        weight = reinterpret_cast<const float*>(p.topk_weights)[pick];
        if (e < 0 || e >= p.num_experts || index < 0) return;
        const int rank = static_cast<int>(e) / local;
        if (sources.rows[rank] == nullptr) return;
        const Place place = places[e];
        const int64_t slots = int64_t{p.num_ranks} * p.max_tokens;
        const int64_t first = sources.how[rank] == kSpread ? e % local * slots + place.begin : place.compact;
        logfmt = sources.how[rank] == kCompactLogfmt;
        row = sources.rows[rank] + (first + index) * (logfmt ? Logfmt::row_bytes(p.hidden) : p.hidden * 2);
    }
};

DT_DEVICE const Place* places_of(const CombineParams& p, const Layout& layout) {
    return reinterpret_cast<const Place*>(space_of(p, p.rank) + layout.places + p.set * layout.place_bytes);
}

// Eight bf16 values; product and sum are rounded each, as torch does it.
DT_DEVICE void add(float (&sum)[8], uint4 bits, float weight) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] = __fadd_rn(sum[2 * i], __fmul_rn(weight, __uint_as_float(words[i] << 16)));
        sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], __fmul_rn(weight, __uint_as_float(words[i] & 0xffff0000u)));
    }
}

DT_DEVICE uint32_t rounded(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// By a warp: of token t's sum, every `splits`-th 512 bytes from number `split` on.
DT_DEVICE void pull(const CombineParams& p, const Picks& picks, int64_t t, int split, int splits) {
    constexpr int kTogether = 8;  // rows that are loaded at once
    const int lane = threadIdx.x % 32, row_bytes = 2 * p.hidden;
    for (int start = split * 512; start < row_bytes; start += splits * 512) {
        const int at = start + lane * 16;
        const bool inside = at < row_bytes;
        float sum[8] = {};
        for (int base = 0; base < p.top_k; base += kTogether) {
            uint4 bits[kTogether];
            unsigned there = 0;
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
                const auto from = reinterpret_cast<const char*>(
                    __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(picks.row), (base + k) % 32));
                if (from == nullptr) continue;
                there |= 1u << k;
                if (inside) bits[k] = load_row_last(from + at);
            }
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
                const float weight = __shfl_sync(0xffffffffu, picks.weight, (base + k) % 32);
                if ((there >> k & 1) != 0) add(sum, bits[k], weight);
            }
        }
        if (inside)
            store_row(
                reinterpret_cast<char*>(p.out) + t * row_bytes + at,
                make_uint4(rounded(sum[0], sum[1]), rounded(sum[2], sum[3]), rounded(sum[4], sum[5]), rounded(sum[6], sum[7])));
    }
}

// The same where rows may be in LogFMT.
DT_DEVICE void pull_decoded(const CombineParams& p, const Picks& picks, int64_t t, int split, int splits) {
    const int lane = threadIdx.x % 32, row_bytes = 2 * p.hidden;
    for (int start = split * 512; start < row_bytes; start += splits * 512) {
        const int at = start + lane * 16;
        const bool inside = at < row_bytes;
        float sum[8] = {};
        for (int k = 0; k < p.top_k; ++k) {
            const auto from =
                reinterpret_cast<const char*>(__shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(picks.row), k));
            const float weight = __shfl_sync(0xffffffffu, picks.weight, k);
            const bool logfmt = __shfl_sync(0xffffffffu, picks.logfmt, k);
            if (from == nullptr || !inside) continue;
            if (logfmt) {
                const Logfmt::Coded coded = Logfmt::load(from + at / 256 * Logfmt::kBytes);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, Logfmt::decode(coded, i)));
            } else {
                add(sum, load_row_last(from + at), weight);
            }
        }
        if (inside)
            store_row(
                reinterpret_cast<char*>(p.out) + t * row_bytes + at,
                make_uint4(rounded(sum[0], sum[1]), rounded(sum[2], sum[3]), rounded(sum[4], sum[5]), rounded(sum[6], sum[7])));
    }
}

// By every thread of the last block: the peers may overwrite what was pulled.
DT_DEVICE void tell_pulled(const CombineParams& p, uint64_t came, uint32_t number) {
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += blockDim.x)
        if (is_in(came, peer)) store_release_sys(&control_of(p, peer)->pulled[p.set].at[p.rank], number);
}

}  // namespace deepep_train::low_latency
