#include "arena.hpp"

#include <iterator>
#include <utility>
#include <vector>

#include "check.hpp"
#include "relaxed.hpp"

namespace deepep_train {

namespace {

constexpr size_t kAlignment = 512;

// Other processes map a block whose size is no multiple of 64 KiB with small pages: every access through such a mapping then
// costs address translation, and kernels that move rows took 1.7 times as long (H100, driver 580; docs/performance.md).
constexpr size_t kPage = 2 << 20;

thread_local Arena* current_arena = nullptr;

// Every arena of the process: torch frees a segment from whichever thread drops the last tensor, without saying whose it is.
// Never destroyed, because tensors may die after static objects do.
struct Registry {
    std::mutex mutex;
    std::vector<std::shared_ptr<Arena>> arenas;
};
Registry& registry() {
    static auto* all = new Registry;
    return *all;
}

}  // namespace

std::shared_ptr<Arena> Arena::make(int device, size_t bytes, size_t reserve) {
    collect();
    std::shared_ptr<Arena> arena(new Arena(device, bytes, reserve));
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().arenas.push_back(arena);
    return arena;
}

Arena::Arena(int device, size_t bytes, size_t reserve) : device_(device), bytes_((bytes + kPage - 1) / kPage * kPage) {
    DT_CUDA(cudaSetDevice(device));
    void* memory = nullptr;
    DT_CUDA(cudaMalloc(&memory, bytes_));
    base_ = static_cast<char*>(memory);
#ifdef DEEPEP_TRAIN_DEBUG
    DT_CUDA(cudaMemset(base_, 0xff, bytes_));  // NaN: nobody may read what nobody has written
#endif
    DT_CUDA(cudaMemset(base_, 0, reserve));
    DT_CUDA(cudaDeviceSynchronize());
    reserve = (reserve + kAlignment - 1) / kAlignment * kAlignment;
    free_[reserve] = bytes_ - reserve;
}

Arena::~Arena() {
    const RelaxedCapture relaxed;
    if (!abandoned_) cudaFree(base_);  // at process exit the driver may be gone already, which is no error
}

bool Arena::is_garbage() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return retired_ && !abandoned_ && used_ == 0 && (!shared_ || (closings_ && closings_->all()));
}

// Drops the registry's hold on arenas that nobody needs.
void Arena::collect() {
    std::vector<std::shared_ptr<Arena>> garbage;  // freed after the lock
    const std::lock_guard<std::mutex> lock(registry().mutex);
    auto& arenas = registry().arenas;
    for (size_t i = 0; i < arenas.size();) {
        if (arenas[i]->is_garbage()) {
            garbage.push_back(arenas[i]);
            arenas.erase(arenas.begin() + static_cast<std::ptrdiff_t>(i));
        } else {
            ++i;
        }
    }
}

void Arena::share(std::shared_ptr<const Closings> closings) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shared_ = true;
    closings_ = std::move(closings);
}

void Arena::retire(bool abandoned) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        retired_ = true;
        abandoned_ |= abandoned;
    }
    collect();
}

size_t Arena::used() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_;
}

size_t Arena::peak() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return peak_;
}

void* Arena::allocate(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    for (auto it = free_.begin(); it != free_.end(); ++it) {
        const auto [offset, size] = *it;
        if (size < bytes) continue;
        free_.erase(it);
        if (size > bytes) free_[offset + bytes] = size - bytes;
        taken_[offset] = bytes;
        used_ += bytes;
        if (used_ > peak_) peak_ = used_;
        return base_ + offset;
    }
    return nullptr;
}

bool Arena::release(void* pointer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto taken = taken_.find(static_cast<size_t>(static_cast<char*>(pointer) - base_));
    if (taken == taken_.end()) return false;
    used_ -= taken->second;
    unsettled_[taken->first] = taken->second;
    taken_.erase(taken);
    return true;
}

void Arena::begin_settling() {
    const std::lock_guard<std::mutex> lock(mutex_);
    settling_.merge(unsettled_);
}

void Arena::settle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& range : settling_) {
        size_t offset = range.first, size = range.second;
        auto next = free_.lower_bound(offset);
        if (next != free_.end() && offset + size == next->first) {
            size += next->second;
            next = free_.erase(next);
        }
        if (next != free_.begin()) {
            const auto before = std::prev(next);
            if (before->first + before->second == offset) {
                offset = before->first;
                size += before->second;
                free_.erase(before);
            }
        }
        free_[offset] = size;
    }
    settling_.clear();
}

void set_current_arena(Arena* arena) { current_arena = arena; }

void Arena::release_anywhere(void* pointer) {
    {
        const std::lock_guard<std::mutex> lock(registry().mutex);
        for (const auto& arena : registry().arenas)
            if (arena->release(pointer)) break;
    }
    collect();
}

}  // namespace deepep_train

// What torch.cuda.memory.CUDAPluggableAllocator looks up by name.
extern "C" {

__attribute__((visibility("default"))) void* deepep_train_allocate(size_t bytes, int, void*) {
    return deepep_train::current_arena == nullptr ? nullptr : deepep_train::current_arena->allocate(bytes);
}

__attribute__((visibility("default"))) void deepep_train_release(void* pointer, size_t, int, void*) {
    deepep_train::Arena::release_anywhere(pointer);
}
}
