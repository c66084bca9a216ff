// A block of GPU memory that peers may open, and the allocator that gives parts of it to torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

namespace deepep_train {

// One block of device memory. `reserve` bytes at its start are the owner's; the rest is a heap, given out first-fit.
//
// torch's caching allocator asks the heap for whole segments (2 MiB and more) and splits them itself, so there are few, and a
// map of free ranges is enough. All methods may be called from any thread.
class Arena {
public:
    Arena(int device, size_t bytes, size_t reserve);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    char* base() const { return base_; }
    size_t bytes() const { return bytes_; }
    size_t used() const;
    size_t peak() const;

    // Null if no free range is large enough.
    void* allocate(size_t bytes);
    // False if `pointer` was not given out by this arena.
    bool release(void* pointer);

    // The memory is never freed: a peer that was stopped, and goes on, may still write into it.
    void abandon() { abandoned_ = true; }

private:
    int device_;
    char* base_ = nullptr;
    size_t bytes_;
    bool abandoned_ = false;
    mutable std::mutex mutex_;
    std::map<size_t, size_t> free_;   // offset -> size
    std::map<size_t, size_t> taken_;  // offset -> size
    size_t used_ = 0;
    size_t peak_ = 0;
};

// Which arena `deepep_train_allocate` takes from, for the calling thread; null: none, and it returns null.
void set_current_arena(Arena* arena);

}  // namespace deepep_train
