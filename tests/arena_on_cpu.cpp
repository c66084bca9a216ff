// When an arena's memory is freed: csrc/common/arena.cpp over the CPU's memory, with what CUDA is asked for made up.
// Prints what is wrong; nothing else.
#include <cstdio>
#include <cstdlib>
#include <set>

#include "../csrc/common/arena.cpp"
#include "../csrc/common/closings.cpp"

static std::set<void*> there;

extern "C" {
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaMalloc(void** memory, size_t bytes) {
    there.insert(*memory = std::malloc(bytes));
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    if (there.erase(memory) != 1) std::puts("freed what was not there");
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemset(void*, int, size_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
}

using deepep_train::Arena;
using deepep_train::Closings;

static void expect(bool so, const char* what) {
    if (!so) std::puts(what);
}

// What a communicator's `close` does with its arena.
static void close(std::shared_ptr<Arena>& arena, bool abandoned = false) {
    arena->retire(abandoned);
    arena.reset();
}

int main() {
    {
        auto arena = Arena::make(0, 1 << 20, 4096);
        void* tensor = arena->allocate(4096);
        close(arena);
        expect(there.size() == 1, "a tensor's memory was freed with its buffer");
        Arena::release_anywhere(tensor);
        expect(there.empty(), "the last tensor's death did not free the arena");
    }
    {
        auto arena = Arena::make(0, 1 << 20, 0);
        close(arena);
        expect(there.empty(), "an arena that nobody uses was kept");
    }
    {
        const auto closings = std::make_shared<Closings>(2);
        auto first = Arena::make(0, 1 << 20, 0), late = Arena::make(0, 1 << 20, 0);
        first->share(closings);
        late->share(closings);
        closings->say(0);
        close(first);
        expect(there.size() == 2, "memory that a peer may still write to was freed");
        closings->say(1);
        close(late, true);  // it has waited for the first in vain
        expect(there.size() == 1, "what nobody can reach any more was kept");
        Arena::make(0, 1 << 20, 0)->retire(false);
        expect(there.size() == 1, "an abandoned arena was freed, or another kept");
    }
    {
        auto arena = Arena::make(0, 1 << 20, 0);
        arena->share(nullptr);
        close(arena);
        expect(there.size() == 2, "nobody knows whether the peers have closed, and it was freed");
    }
}
