// FP8 rows with float32 scales: quantizing and dequantizing in one pass. Pointers are plain addresses: Python owns every
// tensor. Launches are asynchronous on `stream` and throw if they cannot be launched. M rows, K values of each,
// M * K below 2^35, so that pieces of 8 have 32-bit numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deepep_train::fp8 {

// `dtype`: 0 bfloat16, 1 float16, 2 float32. `scale_row_stride`, `scale_step`: between the scales of a row and the next, and
// within a row, in elements.

struct QuantizeParams {
    uint64_t x = 0;       // [M, K] contiguous, K a multiple of 128
    uint64_t data = 0;    // out: FP8 [M, K] contiguous
    uint64_t scales = 0;  // out: float32, one for 128 values; elements between and behind them are left alone
    int64_t num_rows = 0;
    int64_t hidden = 0;
    int64_t scale_row_stride = 0;
    int64_t scale_step = 0;
    float min_amax = 0.0f;
    int power_of_two = 0;
    int dtype = 0;
    int e5m2 = 0;
};

struct DequantizeParams {
    uint64_t data = 0;    // FP8 [M, K] contiguous, K a multiple of 8
    uint64_t scales = 0;  // float32, one for `values_per_scale` values, a multiple of 8 that divides K
    uint64_t out = 0;     // out: [M, K] contiguous
    int64_t num_rows = 0;
    int64_t hidden = 0;
    int64_t scale_row_stride = 0;
    int64_t scale_step = 0;
    int64_t values_per_scale = 0;
    int dtype = 0;
    int e5m2 = 0;
};

void launch_quantize(const QuantizeParams& p, cudaStream_t stream);
void launch_dequantize(const DequantizeParams& p, cudaStream_t stream);

}  // namespace deepep_train::fp8
