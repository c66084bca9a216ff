// LogFMT with 10 bits a value: sign and logarithm, after "Insights into DeepSeek-V3" (arXiv:2505.09343, "LogFMT"). Of each 128
// values the smallest and the largest logarithm of a magnitude that is not 0 are cut into equal steps, numbered from 1; 0 is 0.
// A value gets the number whose magnitude is nearest, not whose logarithm is. Steps begin at most 32 octaves below the largest.
//
// In memory: the 8 lower bits of 128 values, then their 2 upper bits, four to a byte, then {logarithm of number 1, step} as
// floats.
#pragma once

#include "../common/ptx.cuh"
#include "params.hpp"

namespace deepep_train::low_latency {

struct Logfmt {
    static constexpr int kNumbers = 511;  // of magnitudes: 9 bits, without 0
    static constexpr float kOctaves = 32.0f;
    static constexpr int kUpper = 128, kHead = 160, kBytes = 168;  // of a block of 128 values

    __host__ __device__ static constexpr int row_bytes(int hidden) { return (hidden / 128 * kBytes + 15) / 16 * 16; }

    // By 16 lanes with 8 bf16 values each, in a converged warp; null: nothing is stored.
    static DT_DEVICE void encode(uint4 bits, char* block) {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
        const int lane = threadIdx.x % 16;
        float logs[8];
        uint32_t signs = 0;
        float least = INFINITY, most = -INFINITY;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float value = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
            signs |= (__float_as_uint(value) >> 31) << i;
            logs[i] = log2f(fabsf(value));
            // Not fmaxf, which loses NaN: the block is to become NaN.
            most = logs[i] > most || isnan(logs[i]) ? logs[i] : most;
            if (logs[i] > -INFINITY) least = fminf(least, logs[i]);
        }
#pragma unroll
        for (int distance = 1; distance < 16; distance *= 2) {
            const float other = __shfl_xor_sync(0xffffffffu, most, distance);
            most = other > most || isnan(other) ? other : most;
            least = fminf(least, __shfl_xor_sync(0xffffffffu, least, distance));
        }
        if (most == -INFINITY) least = most = 0.0f;  // nothing but zeros
        least = fmaxf(least, most - kOctaves);
        const float step = (most - least) / (kNumbers - 1);
        // From number n on to the middle between it and the next, which is (1 + 2^step) / 2 times as large.
        const float middle = step > 0.0f ? log2f(0.5f + 0.5f * exp2f(step)) / step : 0.5f;
        const float per_step = step > 0.0f ? 1.0f / step : 0.0f;
        uint32_t lower[2] = {}, upper = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float above = (logs[i] - least) * per_step;
            int number =
                logs[i] < least ? (logs[i] >= least - 1.0f ? 1 : 0) : 1 + static_cast<int>(floorf(above + 1.0f - middle));
            number = number > kNumbers ? kNumbers : number;
            const uint32_t code = static_cast<uint32_t>(number) | (signs >> i & 1) << 9;
            lower[i / 4] |= (code & 0xff) << (8 * (i % 4));
            upper |= (code >> 8) << (2 * i);
        }
        if (block == nullptr) return;
        reinterpret_cast<uint2*>(block)[lane] = make_uint2(lower[0], lower[1]);
        reinterpret_cast<uint16_t*>(block + kUpper)[lane] = static_cast<uint16_t>(upper);
        if (lane == 0) *reinterpret_cast<float2*>(block + kHead) = make_float2(least, step);
    }

    // What a lane has loaded of a block.
    struct Coded {
        uint2 lower;
        uint32_t upper;
        float2 head;
    };

    static DT_DEVICE Coded load(const char* block) {
        const int lane = threadIdx.x % 16;
        Coded coded;
        asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                     : "=r"(coded.lower.x), "=r"(coded.lower.y)
                     : "l"(block + lane * 8)
                     : "memory");
        uint16_t upper;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(upper) : "l"(block + kUpper + lane * 2) : "memory");
        coded.upper = upper;
        asm volatile("ld.global.v2.f32 {%0, %1}, [%2];"
                     : "=f"(coded.head.x), "=f"(coded.head.y)
                     : "l"(block + kHead)
                     : "memory");
        return coded;
    }

    static DT_DEVICE float decode(const Coded& coded, int i) {
        const uint32_t code = ((i < 4 ? coded.lower.x : coded.lower.y) >> (8 * (i % 4)) & 0xff) | (coded.upper >> (2 * i) & 3)
                                                                                                      << 8;
        const int number = code & 0x1ff;
        const float magnitude =
            number == 0 ? 0.0f * coded.head.x : exp2f(coded.head.x + coded.head.y * static_cast<float>(number - 1));
        return (code & 0x200) != 0 ? -magnitude : magnitude;
    }
};

}  // namespace deepep_train::low_latency
