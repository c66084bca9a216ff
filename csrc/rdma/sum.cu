// The end of a combine: every token's sum of its nodes' sums, in float32, from the biases on, by ascending node, rounded once.
#include "../common/check.hpp"
#include "../nvlink/gather.cuh"
#include "kernels.hpp"

namespace deepep_train::rdma {

namespace {

using nvlink::GatherShape;

struct Nodes {
    static constexpr int kRounds = kMaxNodes / 32;
    static constexpr int kThreads = 256;  // with twice as many the words of 256 nodes would not fit into registers
    const End& end;
    const SumParams& p;

    DT_DEVICE int64_t row(int64_t i) const { return i; }
    DT_DEVICE int32_t look(int64_t t, int node) const {
        return node < end.num_nodes ? reinterpret_cast<const int32_t*>(p.place)[t * end.num_nodes + node] : -1;
    }
    DT_DEVICE const char* from(int node, int32_t i) const {
        if (node == end.node) return end.send + (reinterpret_cast<const int32_t*>(p.recv_at)[node] + i) * p.row_bytes;
        return end.recv + node * end.segment_bytes + i * p.row_bytes;
    }
    DT_DEVICE const char* bias(int64_t t, int which) const {
        const uint64_t all = which == 0 ? p.bias_0 : p.bias_1;
        return all == 0 ? nullptr : reinterpret_cast<const char*>(all) + t * p.row_bytes;
    }
    DT_DEVICE char* to(int64_t t) const { return reinterpret_cast<char*>(p.out) + t * p.row_bytes; }
};

// The usual case: a lane a node.
struct FewNodes : Nodes {
    DT_DEVICE FewNodes(const End& e, const SumParams& s) : Nodes{e, s} {}
    static constexpr int kRounds = 1;
};

template <typename T, typename Work>
__global__ void __launch_bounds__(Work::kThreads, 1)
    sum_kernel(const __grid_constant__ End end, const __grid_constant__ SumParams p) {
    extern __shared__ __align__(128) char shared[];
    if (*end.failed != 0 || *end.node_failed != 0) {  // which rows have come nobody knows
        const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * 16, bytes = p.num_tokens * p.row_bytes;
        for (int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 16; at < bytes; at += step)
            *reinterpret_cast<uint4*>(p.out + at) = uint4{~0u, ~0u, ~0u, ~0u};
        return;
    }
    fence_async_proxy();
    nvlink::gather_rows<T>(Work{end, p}, p.num_tokens, p.row_bytes, shared);
}

using Kernel = void (*)(End, SumParams);

}  // namespace

void launch_sum(const End& end, const SumParams& p, cudaStream_t stream) {
    const Kernel few[] = {sum_kernel<__nv_bfloat16, FewNodes>, sum_kernel<__half, FewNodes>, sum_kernel<float, FewNodes>};
    const Kernel many[] = {sum_kernel<__nv_bfloat16, Nodes>, sum_kernel<__half, Nodes>, sum_kernel<float, Nodes>};
    const bool is_few = end.num_nodes <= 32;
    const Kernel kernel = (is_few ? few : many)[p.dtype];
    const int threads = is_few ? FewNodes::kThreads : Nodes::kThreads;
    DT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, GatherShape::kSharedBytes));
    kernel<<<p.num_sms, threads, GatherShape::kSharedBytes, stream>>>(end, p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::rdma
