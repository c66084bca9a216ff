// A block of GPU memory that peers may open, and the allocator that gives parts of it to torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "closings.hpp"

namespace deepep_train {

// One block of device memory. `reserve` bytes at its start are the owner's; the rest is a heap, given out first-fit.
//
// torch's caching allocator asks the heap for whole segments (2 MiB and more) and splits them itself, so there are few, and a
// map of free ranges is enough. Tensors may outlive the arena's owner: the memory is freed when the owner has retired the
// arena, nothing of it is taken any more and no peer can write to it. That is looked at whenever an arena of this process is
// made or retired, or memory of one comes back. All methods may be called from any thread.
class Arena {
public:
    static std::shared_ptr<Arena> make(int device, size_t bytes, size_t reserve);
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    char* base() const { return base_; }
    size_t bytes() const { return bytes_; }
    size_t used() const;
    size_t peak() const;

    // Null if no free range is large enough.
    void* allocate(size_t bytes);
    // False if `pointer` was not given out by this arena. Kernels of the stream that used it may still run, and torch does not
    // say which: the range is given out again only after `begin_settling`, a synchronization of the device, and `settle`.
    bool release(void* pointer);
    void begin_settling();
    void settle();

    // Finds the arena that gave `pointer` out.
    static void release_anywhere(void* pointer);

    // From now on peers write to it, until all have said in `closings` that they have closed; null: nobody will know.
    void share(std::shared_ptr<const Closings> closings);

    // The owner needs it no longer. With `abandoned`, the memory is never freed: a peer that was stopped, and goes on, may
    // still write into it, and so may a CUDA graph.
    void retire(bool abandoned);

private:
    Arena(int device, size_t bytes, size_t reserve);
    bool is_garbage() const;
    static void collect();

    int device_;
    char* base_ = nullptr;
    size_t bytes_;
    bool retired_ = false;
    bool abandoned_ = false;
    bool shared_ = false;
    std::shared_ptr<const Closings> closings_;
    mutable std::mutex mutex_;
    std::map<size_t, size_t> free_;   // offset -> size
    std::map<size_t, size_t> taken_;  // offset -> size
    std::map<size_t, size_t> unsettled_;
    std::map<size_t, size_t> settling_;
    size_t used_ = 0;
    size_t peak_ = 0;
};

// Which arena `deepep_train_allocate` takes from, for the calling thread; null: none, and it returns null.
void set_current_arena(Arena* arena);

}  // namespace deepep_train
