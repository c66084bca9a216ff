// What a rank does with its tokens in combine: pulls their rows from the experts' ranks and adds weight * row in float32, over
// k in ascending order, rounding once.
#pragma once

#include <cuda_bf16.h>

#include "logfmt.cuh"
#include "space.cuh"

namespace deepep_train::low_latency {

constexpr int kPart = 512;  // bytes of a row that a warp sums at once
constexpr int kBatch = 32;

// A pick of a token: where its row is; null: nowhere.
struct Pick {
    const char* row;
    int64_t step;  // bytes from one `kSlice` of it to the next
    float weight;
    int16_t logfmt;
    int16_t rank;
};

struct Pulling {
    uint32_t coded;  // whether some rows are in LogFMT
    const char* rows[kMaxRanks];
    Shown how[kMaxRanks];
    // A batch of items: tokens, or parts of such.
    int32_t token[kBatch], share[kBatch];
    Pick picks[kBatch][kMaxTopK];
};

// What the counts of a peer's slices will be, which it has said when it showed its rows.
DT_DEVICE uint32_t slices_of(const CombineParams& p, const Control* mine, int peer) {
    return static_cast<uint32_t>(*static_cast<const volatile int64_t*>(&mine->shown_at[p.set][peer]));
}

// By a thread: waits for the last of a peer's slices, which its blocks show in order; if the peer stops, it is masked.
DT_DEVICE bool wait_for_slices(const CombineParams& p, const Control* mine, int peer) {
    const uint32_t wanted = slices_of(p, mine, peer);
    const uint32_t* count = &mine->slices_shown[p.set].at[peer][2 * p.hidden / kSlice - 1];
    Silence silence;
    for (uint32_t polls = 1; !reached(load_acquire_sys(count), wanted); ++polls) {
        if (polls % kPolls == 0) {
            tell_alive(p);
            if (silence.is_over(p, peer)) {
                give_up(p, peer);
                return false;
            }
        }
        __nanosleep(50);
    }
    return true;
}

// By one warp: waits until every peer's rows may be pulled, or, unless `waits_for_slices`, those in slices announced; looks
// where they are. Returns the peers that came.
DT_DEVICE uint64_t find_rows(const CombineParams& p, Control* mine, uint32_t number, uint64_t wait_ns, bool waits_for_slices,
                             Pulling& shared) {
    const uint64_t present = wait_for_peers(p, mine->shown[p.set], number, mine->decided[p.set][1], number, wait_ns);
    const uint32_t dispatch = mine->dispatches[p.set];
    const Layout layout(p);
    bool coded = false;
    for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32) {
        const auto how = static_cast<Shown>(mine->shown[p.set].at[peer] >> 32);
        const char* rows;
        if (!is_local(p, peer))
            rows = how == kNowhere ? nullptr : own_space(p) + layout.came + p.set * layout.came_bytes;
        else if (mine->placed[p.set].at[peer] != dispatch)
            rows = nullptr;
        else if (how == kSpread)
            rows = arena_of(p, peer) + mine->shown_at[p.set][peer];
        else
            rows = space_of(p, peer) + layout.rows + p.set * layout.rows_bytes;
        if (how == kSliced && waits_for_slices && is_in(present, peer) && rows != nullptr && peer != p.rank &&
            !wait_for_slices(p, mine, peer))
            rows = nullptr;
        shared.rows[peer] = is_in(present, peer) ? rows : nullptr;
        shared.how[peer] = how;
        coded |= shared.rows[peer] != nullptr && how == kCompactLogfmt;
    }
    coded = __any_sync(0xffffffffu, coded);
    if (threadIdx.x % 32 == 0) shared.coded = coded;
    return present;
}

// A pick of token t.
DT_DEVICE Pick find_pick(const CombineParams& p, const Pulling& shared, const Place* places, int64_t t, int k) {
    Pick found{nullptr, kSlice, 0.0f, 0, 0};
    if (k >= p.top_k) return found;
    const int64_t pick = t * p.top_k + k, e = reinterpret_cast<const int64_t*>(p.topk_idx)[pick];
    const int index = reinterpret_cast<const int32_t*>(p.pick_index)[pick];
    found.weight = reinterpret_cast<const float*>(p.topk_weights)[pick];
    if (e < 0 || e >= p.num_experts || index < 0) return found;
    const int local = p.num_experts / p.num_ranks, rank = static_cast<int>(e) / local;
    if (shared.rows[rank] == nullptr) return found;
    found.rank = static_cast<int16_t>(rank);
    found.logfmt = shared.how[rank] == kCompactLogfmt;
    if (!is_local(p, rank)) {
        found.row = shared.rows[rank] + pick * p.hidden * 2;
        return found;
    }
    const Place place = places[e];
    const int64_t slots = int64_t{p.num_ranks} * p.max_tokens;
    const int64_t first = shared.how[rank] == kSpread ? e % local * slots + place.begin : place.compact;
    if (shared.how[rank] == kSliced) {
        found.step = Layout(p).slice_bytes;
        found.row = shared.rows[rank] + (first + index) * kSlice;
        return found;
    }
    found.row = shared.rows[rank] + (first + index) * (found.logfmt != 0 ? Logfmt::row_bytes(p.hidden) : p.hidden * 2);
    return found;
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

// By a warp: 16 bytes a lane of a token's sum; `at`: this lane's place in the row. Without `kLogfmt` no row is in LogFMT.
// `turns`: the ranks whose slices take turns, so that this one is at the place of number `turn`. `policy`: of the L2 cache, for
// what is read.
template <bool kLogfmt>
DT_DEVICE void pull_part(const CombineParams& p, const Pick* picks, int64_t t, int at, uint64_t turns, int turn,
                         uint64_t policy) {
    constexpr int kTogether = kLogfmt ? 1 : 8;  // rows that are loaded at once
    const int row_bytes = 2 * p.hidden;
    const bool inside = at < row_bytes;
    float sum[8] = {};
    for (int base = 0; base < p.top_k; base += kTogether) {
        uint4 bits[kTogether];
        unsigned there = 0;
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
            const Pick pick = picks[base + k];
            const char* row = *static_cast<const char* const volatile*>(&picks[base + k].row);  // it may become null
            if (row == nullptr) continue;
            if (kLogfmt && pick.logfmt != 0) {
                if (!inside) continue;
                const Logfmt::Coded coded = Logfmt::load(row + at / 256 * Logfmt::kBytes);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(pick.weight, Logfmt::decode(coded, i)));
                continue;
            }
            there |= 1u << k;
            const char* from = row + (is_in(turns, pick.rank) ? turn : at / kSlice) * pick.step + at % kSlice;
            if (inside) bits[k] = load_row_by(from, policy);
        }
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
            if ((there >> k & 1) != 0) add(sum, bits[k], picks[base + k].weight);
    }
    if (inside)
        store_row(
            reinterpret_cast<char*>(p.out) + t * row_bytes + at,
            make_uint4(rounded(sum[0], sum[1]), rounded(sum[2], sum[3]), rounded(sum[4], sum[5]), rounded(sum[6], sum[7])));
}

// Tokens, or shares of such, of the launch that are dealt to its blocks. Where there are fewer tokens than blocks, several
// share a token: each has every `shares`-th part of the row.
struct Items {
    int parts, shares, all;

    DT_DEVICE explicit Items(const CombineParams& p) {
        const int blocks = gridDim.x;
        parts = (2 * p.hidden + kPart - 1) / kPart;
        shares = p.num_tokens == 0 ? 1 : blocks / p.num_tokens;
        shares = shares < 1 ? 1 : shares > parts ? parts : shares;
        all = p.num_tokens * shares;
    }
    // Of this block, from item `first` on, at most a batch.
    DT_DEVICE int from(int first) const {
        return min((all - first + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x), kBatch);
    }
};

// By every thread: looks up the picks of `count` of this block's items, from item `first` on.
DT_DEVICE void find_picks(const CombineParams& p, const Items& items, int first, int count, Pulling& shared) {
    const Layout layout(p);
    const auto* places = reinterpret_cast<const Place*>(own_space(p) + layout.places + p.set * layout.place_bytes);
    for (int i = threadIdx.x; i < count * kMaxTopK; i += blockDim.x) {
        const int item = first + i / kMaxTopK * static_cast<int>(gridDim.x), t = item / items.shares;
        shared.picks[i / kMaxTopK][i % kMaxTopK] = find_pick(p, shared, places, t, i % kMaxTopK);
        if (i % kMaxTopK != 0) continue;
        shared.token[i / kMaxTopK] = t;
        shared.share[i / kMaxTopK] = item % items.shares;
    }
    __syncthreads();
}

// By every thread of the last block: the peers that came may overwrite what was pulled.
DT_DEVICE void tell_pulled(const CombineParams& p, const Control* mine, uint32_t number) {
    const auto* decided = static_cast<const volatile uint32_t*>(mine->decided[p.set][1].at);
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += blockDim.x)
        if (decided[peer] == number << 1 && !is_masked(p, peer) && is_local(p, peer))
            store_release_sys(&control_of(p, peer)->pulled[p.set].at[p.rank], uint64_t{number});
}

}  // namespace deepep_train::low_latency
