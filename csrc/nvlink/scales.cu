// At the destination, after a dispatch: the scales, from their tokens' slots to where GEMMs read them.
//
// A group's scales are one block; `place` numbers the rows of all blocks, those between a group's last row and the end of its
// block included. A warp takes 32 places and 32 words of each at a time: it reads a slot's words side by side and, where tokens
// lie innermost, turns the tile around in shared memory, so that it writes neighbouring places side by side.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kWarps = 3;  // with 4096 groups the tables and these warps' tiles still fit into 48 KiB
constexpr int kBlocksPerSm = 8;
constexpr int kNoToken = -1, kNoRow = -2;

// Where every group's rows and places start, both [num_groups + 1].
__device__ void find_starts(const ScalesParams& p, int32_t* first_row, int32_t* first_place) {
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        int32_t rows_before = 0, places_before = 0;
        for (int base = 0; base < p.num_groups; base += 32) {
            const int g = base + lane;
            int32_t rows = 0;
            if (g < p.num_groups)
                rows = static_cast<int32_t>(p.group_rows == 0 ? p.num_rows : reinterpret_cast<const int64_t*>(p.group_rows)[g]);
            int32_t row_end = rows, place_end = (rows + p.multiple - 1) / p.multiple * p.multiple;
            for (int by = 1; by < 32; by *= 2) {
                const int32_t r = __shfl_up_sync(0xffffffffu, row_end, by), q = __shfl_up_sync(0xffffffffu, place_end, by);
                if (lane >= by) row_end += r, place_end += q;
            }
            if (g < p.num_groups) first_row[g + 1] = rows_before + row_end, first_place[g + 1] = places_before + place_end;
            rows_before += __shfl_sync(0xffffffffu, row_end, 31);
            places_before += __shfl_sync(0xffffffffu, place_end, 31);
        }
        if (lane == 0) first_row[0] = first_place[0] = 0;
    }
    __syncthreads();
}

__global__ void __launch_bounds__(kWarps * 32)
    scales_kernel(const __grid_constant__ Domain d, const __grid_constant__ ScalesParams p) {
    extern __shared__ int32_t starts[];
    __shared__ uint32_t tiles[kWarps][32 * 32];
    auto* out = reinterpret_cast<uint32_t*>(p.scales);
    if (d.control(d.rank)->failed != 0) {  // NaN, as float32 and as UE8M0
        const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
        for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.num_words; i += step)
            out[i] = 0xffffffffu;
        return;
    }
    int32_t *first_row = starts, *first_place = starts + p.num_groups + 1;
    find_starts(p, first_row, first_place);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto* slots = reinterpret_cast<const uint32_t*>(p.slot_scales);
    const auto* row_slot = reinterpret_cast<const int32_t*>(p.row_slot);
    const int32_t num_received = *reinterpret_cast<const int32_t*>(p.num_received);
    const int32_t num_places = first_place[p.num_groups];
    uint32_t* tile = tiles[warp];
    const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * 32;
    for (int64_t first = (static_cast<int64_t>(warp) * gridDim.x + blockIdx.x) * 32; first < num_places; first += step) {
        const int32_t place = static_cast<int32_t>(first) + lane;
        const bool exists = place < num_places;
        int32_t slot = kNoRow;
        int64_t start = 0, width = 0;
        if (exists) {
            int g = 0, end = p.num_groups;  // the last group that starts here or before: empty ones start where the next does
            while (end - g > 1) {
                const int middle = (g + end) / 2;
                (first_place[middle] <= place ? g : end) = middle;
            }
            const int32_t row = first_row[g] + place - first_place[g];
            if (row < first_row[g + 1]) slot = row_slot != nullptr ? row_slot[row] : row < num_received ? row : kNoToken;
            width = first_place[g + 1] - first_place[g];
            start = static_cast<int64_t>(first_place[g]) * p.scale_words + place - first_place[g];
        }
        for (int word = 0; word < p.scale_words; word += 32) {
            const int words = p.scale_words - word < 32 ? p.scale_words - word : 32;
#pragma unroll 8
            for (int i = 0; i < 32; ++i) {
                const int32_t from = __shfl_sync(0xffffffffu, slot, i);
                uint32_t value = from == kNoToken ? p.padding_word : 0;
                if (from >= 0 && lane < words) value = slots[static_cast<int64_t>(from) * p.scale_words + word + lane];
                if (p.tokens_innermost != 0)
                    tile[i * 32 + (lane ^ i)] = value;
                else if (first + i < num_places && lane < words)
                    out[(first + i) * p.scale_words + word + lane] = value;
            }
            if (p.tokens_innermost == 0) continue;
            __syncwarp();
#pragma unroll 8
            for (int i = 0; i < words; ++i)
                if (exists) out[start + (word + i) * width] = tile[lane * 32 + (i ^ lane)];
            __syncwarp();
        }
    }
}

}  // namespace

void launch_scales(const Domain& d, const ScalesParams& p, cudaStream_t stream) {
    const size_t shared_bytes = 2 * (static_cast<size_t>(p.num_groups) + 1) * sizeof(int32_t);
    scales_kernel<<<p.num_sms * kBlocksPerSm, kWarps * 32, shared_bytes, stream>>>(d, p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
