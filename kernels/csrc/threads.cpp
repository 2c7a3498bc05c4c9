// A parallel loop on the threads that torch already has.
//
// torch brings an OpenMP runtime into the process. A second pool would compete with it: the threads of the one spin
// while those of the other work. Linking an OpenMP library would be no cure, since torch's copy may bear another file
// name. So its entry point is looked up by name, where torch has put it for all to see; GOMP_parallel is the ABI of
// compiled `#pragma omp parallel` and is offered by libgomp, libomp and libiomp5 alike. A process without one gets
// threads of its own for the duration of the call.

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

#include "rows.h"

namespace fastppo {
namespace {

using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

struct Loop {
    std::atomic<int64_t> next;  // pieces are handed out as threads come for them
    int64_t count;
    int64_t piece;
    void* context;
    void (*body)(void*, int64_t, int64_t);
};

void work(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    for (;;) {
        const int64_t begin = loop.next.fetch_add(loop.piece, std::memory_order_relaxed);
        if (begin >= loop.count) return;
        loop.body(loop.context, begin, begin + loop.piece < loop.count ? begin + loop.piece : loop.count);
    }
}

}  // namespace

void parallel_for(
    int64_t count, int64_t piece, int num_threads, void* context, void (*body)(void* context, int64_t begin, int64_t end)
) {
    static const ParallelRegion region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Loop loop = {{0}, count, piece, context, body};
    const int64_t pieces = (count + piece - 1) / piece;
    const int wanted = pieces < num_threads ? static_cast<int>(pieces) : num_threads;
    if (wanted <= 1) {
        work(&loop);
    } else if (region) {
        region(work, &loop, static_cast<unsigned>(wanted), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < wanted; ++i) others.emplace_back(work, &loop);
        work(&loop);
        for (std::thread& thread : others) thread.join();
    }
}

}  // namespace fastppo
