// Dispatch, sending: every token goes once to each rank that has an expert of it, into the slot that is its own there. Beside
// the rows goes a list of what comes: which tokens, for which local experts, and each pick's number among this rank's picks of
// its expert. The receiver then knows every row's place without counting.
#include <cuda_fp8.h>

#include "../common/check.hpp"
#include "kernels.hpp"
#include "space.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kRound = 128;  // tokens whose picks are numbered together

// A bit for each token of a round.
struct Tokens {
    uint32_t words[kRound / 32];

    DT_DEVICE void clear() {
#pragma unroll
        for (uint32_t& word : words) word = 0;
    }
    DT_DEVICE void add(int t) { atomicOr(words + t / 32, 1u << (t % 32)); }
    DT_DEVICE int before(int t) const {
        int count = 0;
#pragma unroll
        for (int w = 0; w < kRound / 32; ++w) {
            const int inside = t - w * 32;
            count += __popc(words[w] & (inside >= 32 ? 0xffffffffu : inside <= 0 ? 0u : (1u << inside) - 1));
        }
        return count;
    }
};

struct Shared {
    Tokens picked[kMaxExperts];     // of this round, those that have picked the expert
    Tokens sent[kMaxRanks];         // and those that go to the rank
    unsigned long long to[kRound];  // the ranks that a token goes to
    int32_t counts[kMaxExperts];    // picks of the expert, in rounds before
    int32_t listed[kMaxRanks];      // tokens on the rank's list, likewise
    uint64_t present;
    char* spaces[kMaxRanks];
    char* lists[kMaxRanks];  // the rank's list of what comes from here; of other nodes' ranks the one to be put there
};

// -1 for what is no expert.
DT_DEVICE int expert_of(const DispatchParams& p, int64_t pick) {
    const int64_t e = reinterpret_cast<const int64_t*>(p.topk_idx)[pick];
    return e >= 0 && e < p.num_experts ? static_cast<int>(e) : -1;
}

// By one block: everything that goes beside the rows. A token that names an expert twice has one row there, or a source could
// have more rows than the expert has room for: both picks get one number.
__device__ void plan(const DispatchParams& p, Shared& shared, uint64_t present) {
    const int local = p.num_experts / p.num_ranks, top_k = p.top_k;
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) shared.counts[e] = 0;
    if (threadIdx.x < kMaxRanks) shared.listed[threadIdx.x] = 0;
    for (int first = 0; first < p.num_tokens; first += kRound) {
        const int tokens = p.num_tokens - first < kRound ? p.num_tokens - first : kRound;
        const int64_t first_pick = int64_t{first} * top_k;
        for (int e = threadIdx.x; e < p.num_experts; e += kThreads) shared.picked[e].clear();
        if (threadIdx.x < kMaxRanks) shared.sent[threadIdx.x].clear();
        if (threadIdx.x < kRound) shared.to[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * top_k; i += kThreads) {
            const int e = expert_of(p, first_pick + i), t = i / top_k;
            if (e < 0) {
                if (reinterpret_cast<const int64_t*>(p.topk_idx)[first_pick + i] != -1)
                    *reinterpret_cast<volatile int32_t*>(p.bad_index) = 1;
                continue;
            }
            shared.picked[e].add(t);
            if (!is_in(present, e / local)) continue;
            shared.sent[e / local].add(t);
            atomicOr(shared.to + t, 1ull << (e / local));
        }
        __syncthreads();
        for (int i = threadIdx.x; i < tokens * top_k; i += kThreads) {
            const int e = expert_of(p, first_pick + i), t = i / top_k, k = i % top_k;
            const int index = e < 0 ? -1 : shared.counts[e] + shared.picked[e].before(t);
            reinterpret_cast<int32_t*>(p.pick_index)[first_pick + i] = index;
            for (uint64_t left = shared.to[t]; left != 0; left &= left - 1) {
                const int rank = __ffsll(static_cast<long long>(left)) - 1, here = e - rank * local;
                const List list(shared.lists[rank], p);
                const int64_t at = shared.listed[rank] + shared.sent[rank].before(t);
                if (k == 0) list.tokens[at] = first + t;
                list.places[at * top_k + k] =
                    here >= 0 && here < local ? static_cast<uint32_t>(here) << kIndexBits | index : kNoPlace;
            }
        }
        __syncthreads();
        for (int e = threadIdx.x; e < p.num_experts; e += kThreads) shared.counts[e] += shared.picked[e].before(kRound);
        if (threadIdx.x < p.num_ranks) shared.listed[threadIdx.x] += shared.sent[threadIdx.x].before(kRound);
        __syncthreads();
    }
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads)
        if (is_in(present, e / local)) List(shared.lists[e / local], p).counts[e % local] = shared.counts[e];
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kThreads) {
        if (!is_in(present, peer)) continue;
        const List list(shared.lists[peer], p);
        list.head[0] = shared.listed[peer];
        list.head[1] = is_local(p, peer) ? p.keep : 0;
    }
}

// By a warp: the ranks in whose space token t is stored. What other nodes get is put to them from this rank's own.
DT_DEVICE uint64_t destinations(const DispatchParams& p, int64_t t, uint64_t present) {
    const int lane = threadIdx.x % 32, local = p.num_experts / p.num_ranks;
    const int e = lane < p.top_k ? expert_of(p, t * p.top_k + lane) : -1;
    const uint64_t mine = e < 0 ? 0 : 1ull << (e / local);
    const uint64_t low = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(mine));
    const uint64_t high = __reduce_or_sync(0xffffffffu, static_cast<uint32_t>(mine >> 32));
    const uint64_t to = (high << 32 | low) & present;
    if (p.num_local == p.num_ranks) return to;
    const uint64_t near = (p.num_local == 64 ? ~0ull : (1ull << p.num_local) - 1) << p.first_local;
    return (to & near) | ((to & ~near) != 0 ? 1ull << p.rank : 0);
}

// Rows as they are.
struct Plain : Piece<4> {
    DT_DEVICE void read(const DispatchParams& p, int64_t t, int piece) {
        load_last(reinterpret_cast<const char*>(p.x) + t * p.hidden * 2, piece * kBytes, p.hidden * 2);
    }
    DT_DEVICE void prepare(const DispatchParams&) {}
    DT_DEVICE void write(const DispatchParams& p, char* slot, int piece) const { store(slot, piece * kBytes, p.hidden * 2); }
    static DT_BOTH int pieces(const DispatchParams& p) { return in(p.hidden * 2); }
};

// Blocks of 128 values, scaled so that the largest magnitude becomes e4m3's: as deepep_train.fp8.quantize_blocks does, bit for
// bit. A lane has 16 neighbouring values, 8 lanes a block.
struct Quantized {
    static constexpr int kRounds = 2, kValues = 512 * kRounds;
    uint4 bits[kRounds][2];  // first bf16; then bits[i][0] is 16 FP8 values and bits[i][1].x their scale

    static DT_BOTH int pieces(const DispatchParams& p) { return (p.hidden + kValues - 1) / kValues; }
    static DT_DEVICE int start(int piece, int round) { return piece * kValues + round * 512 + threadIdx.x % 32 * 16; }

    DT_DEVICE void read(const DispatchParams& p, int64_t t, int piece) {
        const auto* row = reinterpret_cast<const char*>(p.x) + t * p.hidden * 2;
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            bits[i][0] = bits[i][1] = make_uint4(0, 0, 0, 0);
            if (start(piece, i) < p.hidden) {
                bits[i][0] = load_row_last(row + start(piece, i) * 2);
                bits[i][1] = load_row_last(row + start(piece, i) * 2 + 16);
            }
        }
    }

    static DT_DEVICE uint32_t largest(uint4 v) {
        constexpr uint32_t kMagnitudes = 0x7fff7fffu;
        return __vmaxu2(__vmaxu2(v.x & kMagnitudes, v.y & kMagnitudes), __vmaxu2(v.z & kMagnitudes, v.w & kMagnitudes));
    }
    static DT_DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
    static DT_DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
    // The e4m3 value of value / scale, which is what rounding the float32 quotient gives, for all bfloat16 values and scales
    // of blocks: compared for each pair of a magnitude and a largest one.
    struct Divider {
        float scale, inverse;
        DT_DEVICE explicit Divider(float by) {
            scale = isinf(by) ? 1.0f : by;
            inverse = __fdiv_rn(1.0f, by);
        }
        DT_DEVICE float operator()(float value) const {
            const float near = __fmul_rn(value, inverse);
            return copysignf(__fmaf_rn(__fmaf_rn(-near, scale, value), inverse, near), value);  // -0 stays so
        }
        DT_DEVICE uint32_t two(uint32_t pair) const {
            const float2 scaled = {(*this)(low(pair)), (*this)(high(pair))};
            return __nv_cvt_float2_to_fp8x2(scaled, __NV_SATFINITE, __NV_E4M3);
        }
        DT_DEVICE uint32_t four(uint32_t a, uint32_t b) const { return two(a) | two(b) << 16; }
    };

    DT_DEVICE void prepare(const DispatchParams& p) {
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            const uint4 a = bits[i][0], b = bits[i][1];
            // As integers bf16 magnitudes have the order of their values, NaN last.
            uint32_t most = __vmaxu2(largest(a), largest(b));
#pragma unroll
            for (int distance = 1; distance < 8; distance *= 2)
                most = __vmaxu2(most, __shfl_xor_sync(0xffffffffu, most, distance));
            const float amax = low(max(most & 0xffffu, most >> 16));
            float scale = __fdiv_rn(amax < 1e-4f ? 1e-4f : amax, 448.0f);
            if (p.scales != kFloatScales) {
                const uint32_t word = __float_as_uint(scale);  // up to the next power of two
                scale = __uint_as_float((word & 0x7f800000u) + ((word & 0x007fffffu) != 0 ? 0x00800000u : 0u));
            }
            const Divider by(scale);
            bits[i][0] = make_uint4(by.four(a.x, a.y), by.four(a.z, a.w), by.four(b.x, b.y), by.four(b.z, b.w));
            bits[i][1].x = __float_as_uint(scale);
        }
        if (p.scales != kPackedScales) return;
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            uint32_t packed = 0;
#pragma unroll
            for (int block = 0; block < 4; ++block)
                packed |= (__shfl_sync(0xffffffffu, bits[i][1].x, block * 8) >> 23 & 0xffu) << (8 * block);
            bits[i][1].x = packed;
        }
    }

    DT_DEVICE void write(const DispatchParams& p, char* slot, int piece) const {
        auto* words = reinterpret_cast<uint32_t*>(slot + p.hidden);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            const int at = start(piece, i);
            if (at >= p.hidden) continue;
            store_row(slot + at, bits[i][0]);
            if (p.scales != kPackedScales) {
                if (lane % 8 == 0) words[at / kBlock] = bits[i][1].x;
            } else if (lane == 0) {
                words[at / (4 * kBlock)] = bits[i][1].x;
            }
        }
    }
};

template <typename Row>
__global__ void __launch_bounds__(kThreads, 1) dispatch_send_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ Shared shared;
    Control* mine = own_control(p);
    const uint32_t number = mine->dispatches[p.set] + 1;
    if (mine->closed != 0) return;
    // The first block makes the lists, and, unless it is the only one, nothing else.
    const int first = gridDim.x > 1 ? 1 : 0, warps = (gridDim.x - first) * kWarps;
    const int pieces = Row::pieces(p);
    const int units = p.num_tokens * pieces;
    int unit = static_cast<int>(blockIdx.x) < first ? units : blockIdx.x - first + threadIdx.x / 32 * (gridDim.x - first);
    Row row;
    if (unit < units) row.read(p, unit / pieces, unit % pieces);
    const Layout layout(p);
    if (const int peer = static_cast<int>(threadIdx.x) - 64; peer >= 0 && peer < p.num_ranks) {
        shared.spaces[peer] = space_of(p, peer);
        shared.lists[peer] =
            is_local(p, peer) ? space_of(p, peer) + layout.list(p.set, p.rank) : own_space(p) + layout.outgoing_list(peer);
    }
    if (threadIdx.x < 32) {
        const uint64_t present = wait_for_answers(p, mine->sent_to[p.set], mine->taken[p.set]);
        if (threadIdx.x == 0) shared.present = present;
    }
    __syncthreads();
    const uint64_t present = shared.present;
    if (blockIdx.x == 0) plan(p, shared, present);
    while (unit < units) {
        const int t = unit / pieces, piece = unit % pieces;
        const int64_t slot = layout.slot(p.set, p.rank, t);
        // Rows that stay are stored even if they go nowhere: to ask takes longer.
        const uint64_t to = p.keep != 0 ? 1ull << p.rank : destinations(p, t, present);
        row.prepare(p);
        for (uint64_t left = to; left != 0; left &= left - 1) row.write(p, shared.spaces[__ffsll(left) - 1] + slot, piece);
        unit += warps;
        if (unit < units) row.read(p, unit / pieces, unit % pieces);
    }
    if (!is_last_block(mine, p, kDispatchSend)) return;
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kThreads) {
        if (is_masked(p, peer)) continue;
        if (is_local(p, peer))
            store_release_sys(&reinterpret_cast<Control*>(shared.spaces[peer])->sent[p.set].at[p.rank], uint64_t{number});
        mine->sent_to[p.set].at[peer] = number;
    }
    if (threadIdx.x == 0) mine->dispatches[p.set] = number;
}

}  // namespace

int64_t space_bytes(const Common& c) { return Layout(c).end; }

void launch_dispatch_send(const DispatchParams& p, cudaStream_t stream) {
    if (p.scales == kBf16)
        dispatch_send_kernel<Plain><<<p.num_sms, kThreads, 0, stream>>>(p);
    else
        dispatch_send_kernel<Quantized><<<p.num_sms, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
