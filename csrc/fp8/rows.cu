// A thread takes 8 values, which are 16 bytes in bfloat16: neighbours read and write side by side. Those that share a scale
// agree on it by shuffles.
//
// The arithmetic is that of deepep_train/fp8/quantized.py (`quantize_in_torch`) and deepep.py (`scaled`), operation by
// operation, so that the bits are theirs: products and quotients in float32 as IEEE rounds them, one rounding at the end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cfloat>
#include <cmath>

#include "../common/check.hpp"
#include "kernels.hpp"

namespace deepep_train::fp8 {

namespace {

constexpr int kThreads = 256, kValues = 8, kBlock = 128, kLanes = kBlock / kValues;

// What a factor becomes that float32 cannot hold: the largest number of the values' dtype.
__device__ float largest(__nv_bfloat16) { return 3.3895313892515355e38f; }
__device__ float largest(__half) { return 65504.0f; }
__device__ float largest(float) { return FLT_MAX; }

__device__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float widen(__half v) { return __half2float(v); }
__device__ float widen(float v) { return v; }

template <typename T>
__device__ T narrow(float v);
template <>
__device__ __nv_bfloat16 narrow(float v) {
    return __float2bfloat16_rn(v);
}
template <>
__device__ __half narrow(float v) {
    return __float2half_rn(v);
}
template <>
__device__ float narrow(float v) {
    return v;
}

template <typename T>
union Piece {
    T values[kValues];
    uint4 words[kValues * sizeof(T) / sizeof(uint4)];
    __device__ Piece() {}
};

union Fp8Piece {
    __nv_fp8_storage_t values[kValues];
    uint2 pair;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const __grid_constant__ QuantizeParams p) {
    const auto kind = p.e5m2 != 0 ? __NV_E5M2 : __NV_E4M3;
    const float most = p.e5m2 != 0 ? 57344.0f : 448.0f;
    const auto pieces_per_row = static_cast<uint32_t>(p.hidden / kValues);
    const int64_t num_pieces = p.num_rows * pieces_per_row;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    // Blocks of 128 are 16 neighbouring threads, which come to an end together.
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_pieces; i += step) {
        Piece<T> x;
        const auto* from = reinterpret_cast<const uint4*>(p.x) + i * (sizeof(x) / sizeof(uint4));
#pragma unroll
        for (int w = 0; w < static_cast<int>(sizeof(x) / sizeof(uint4)); ++w) x.words[w] = from[w];
        float amax = 0.0f;
#pragma unroll
        for (int v = 0; v < kValues; ++v) amax = fmaxf(amax, fabsf(widen(x.values[v])));  // passes NaN over
        const unsigned mates = 0xffffu << (threadIdx.x % 32 / kLanes * kLanes);
#pragma unroll
        for (int by = 1; by < kLanes; by *= 2) amax = fmaxf(amax, __shfl_xor_sync(mates, amax, by));
        amax = amax < p.min_amax ? p.min_amax : amax;
        float factor = __fdiv_rn(most, amax);
        if (isinf(factor)) factor = largest(T{});
        if (p.power_of_two != 0) factor = __uint_as_float(__float_as_uint(factor) & ~0x7fffffu);
        if (amax == 0.0f || isinf(amax)) factor = 1.0f;
        Fp8Piece y;
#pragma unroll
        for (int v = 0; v < kValues; ++v)
            y.values[v] = __nv_cvt_float_to_fp8(__fmul_rn(widen(x.values[v]), factor), __NV_SATFINITE, kind);
        reinterpret_cast<uint2*>(p.data)[i] = y.pair;
        if (threadIdx.x % kLanes == 0) {
            const uint32_t piece = static_cast<uint32_t>(i), row = piece / pieces_per_row;
            const uint32_t block = piece % pieces_per_row / kLanes;
            reinterpret_cast<float*>(p.scales)[row * p.scale_row_stride + block * p.scale_step] = __fdiv_rn(1.0f, factor);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const __grid_constant__ DequantizeParams p) {
    const auto kind = p.e5m2 != 0 ? __NV_E5M2 : __NV_E4M3;
    const auto pieces_per_row = static_cast<uint32_t>(p.hidden / kValues);
    const int64_t num_pieces = p.num_rows * pieces_per_row;
    const auto pieces_per_scale = static_cast<uint32_t>(p.values_per_scale / kValues);
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < num_pieces; i += step) {
        const uint32_t piece = static_cast<uint32_t>(i), row = piece / pieces_per_row;
        const uint32_t block = piece % pieces_per_row / pieces_per_scale;
        const float scale = reinterpret_cast<const float*>(p.scales)[row * p.scale_row_stride + block * p.scale_step];
        Fp8Piece x;
        x.pair = reinterpret_cast<const uint2*>(p.data)[i];
        Piece<T> y;
#pragma unroll
        for (int v = 0; v < kValues; ++v)
            y.values[v] = narrow<T>(__fmul_rn(__half2float(__half(__nv_cvt_fp8_to_halfraw(x.values[v], kind))), scale));
        auto* into = reinterpret_cast<uint4*>(p.out) + i * (sizeof(y) / sizeof(uint4));
#pragma unroll
        for (int w = 0; w < static_cast<int>(sizeof(y) / sizeof(uint4)); ++w) into[w] = y.words[w];
    }
}

template <typename Params>
void launch(void (*const (&kernels)[3])(Params), const Params& p, cudaStream_t stream) {
    const int64_t num_pieces = p.num_rows * (p.hidden / kValues);
    if (num_pieces == 0) return;
    const int64_t needed = (num_pieces + kThreads - 1) / kThreads;
    const auto blocks = static_cast<unsigned>(needed < (1 << 20) ? needed : 1 << 20);
    kernels[p.dtype]<<<blocks, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace

void launch_quantize(const QuantizeParams& p, cudaStream_t stream) {
    launch({quantize_kernel<__nv_bfloat16>, quantize_kernel<__half>, quantize_kernel<float>}, p, stream);
}

void launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
    launch({dequantize_kernel<__nv_bfloat16>, dequantize_kernel<__half>, dequantize_kernel<float>}, p, stream);
}

}  // namespace deepep_train::fp8
