// Every CUDA call goes through DT_CUDA: its error becomes a C++ exception, which pybind11 hands to Python, that names the
// call, the file and the line.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace deepep_train {

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // a failed launch must not be reported again by the next call
    throw std::runtime_error(std::string(call) + " failed at " + file + ":" + std::to_string(line) + ": " +
                             cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")");
}

}  // namespace deepep_train

#define DT_CUDA(call) ::deepep_train::check_cuda((call), #call, __FILE__, __LINE__)
