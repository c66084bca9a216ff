// The caller's stream, and its device made the current one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace deepep_train {

inline cudaStream_t as_stream(uint64_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Launches on a stream want its device to be current, whatever the caller's is.
class OnDevice {
public:
    // Throws nothing, since destructors use it: if this fails, so does what follows.
    explicit OnDevice(int device) {
        if (cudaGetDevice(&before_) == cudaSuccess && before_ != device) changed_ = cudaSetDevice(device) == cudaSuccess;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace deepep_train
