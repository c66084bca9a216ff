// Which ranks of one host have closed a buffer, so that the memory they could reach may be freed.
#pragma once

#include <atomic>
#include <memory>

namespace deepep_train {

// A byte a rank in anonymous shared memory (memfd), which dies with the processes that use it. Host memory: saying that one has
// closed must neither wait, nor touch the GPU memory of a process that may be gone. One rank makes it, the others open it
// through that process's descriptor, which `seal` closes.
class Closings {
public:
    explicit Closings(int num_ranks);
    Closings(int num_ranks, int pid, int descriptor);
    ~Closings();
    Closings(const Closings&) = delete;
    Closings& operator=(const Closings&) = delete;

    int descriptor() const { return descriptor_; }
    void seal();

    // By a rank whose last access to its peers' memory is over, and which has unmapped it.
    void say(int rank);
    bool all() const;

private:
    void map();

    int num_ranks_;
    int descriptor_ = -1;
    std::atomic<unsigned char>* said_ = nullptr;
};

}  // namespace deepep_train
