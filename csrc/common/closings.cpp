#include "closings.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace deepep_train {

namespace {

std::runtime_error failed(const std::string& what) { return std::runtime_error(what + ": " + std::strerror(errno)); }

}  // namespace

Closings::Closings(int num_ranks) : num_ranks_(num_ranks), descriptor_(memfd_create("deepep_train", MFD_CLOEXEC)) {
    if (descriptor_ < 0) throw failed("memfd_create");
    map();
}

Closings::Closings(int num_ranks, int pid, int descriptor) : num_ranks_(num_ranks) {
    const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
    descriptor_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (descriptor_ < 0) throw failed(path);
    map();
    seal();
}

Closings::~Closings() {
    seal();
    munmap(said_, num_ranks_);
}

void Closings::map() {
    void* memory = MAP_FAILED;
    if (ftruncate(descriptor_, num_ranks_) == 0)
        memory = mmap(nullptr, num_ranks_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor_, 0);
    if (memory == MAP_FAILED) {
        const auto error = failed("mmap");
        seal();
        throw error;
    }
    said_ = static_cast<std::atomic<unsigned char>*>(memory);
}

void Closings::seal() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
}

void Closings::say(int rank) { said_[rank].store(1, std::memory_order_release); }

bool Closings::all() const {
    for (int r = 0; r < num_ranks_; ++r)
        if (said_[r].load(std::memory_order_acquire) == 0) return false;
    return true;
}

}  // namespace deepep_train
