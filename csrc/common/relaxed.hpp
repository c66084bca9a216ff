// Calls that a stream's capture into a CUDA graph, which this thread may be in the middle of, must not notice.
#pragma once

#include <cuda_runtime_api.h>

namespace deepep_train {

// While it lives, freeing memory and the like neither fail for a capture under way nor invalidate it: destructors may run at
// any time, for instance in Python's garbage collector. Throws nothing.
class RelaxedCapture {
public:
    RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace deepep_train
