// A parallel loop on the threads that torch already has.
//
// torch brings an OpenMP runtime into the process. A second pool would compete with it: the threads of the one spin
// while those of the other work. Linking an OpenMP library would be no cure, since torch's copy may bear another file
// name. So its entry point is looked up by name, where torch has put it for all to see; GOMP_parallel is the ABI of
// compiled `#pragma omp parallel` and is offered by libgomp, libomp and libiomp5 alike. A process without one gets
// threads of its own for the duration of the call.

#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <thread>
#include <vector>

namespace fastppo {
namespace {

using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

struct Loop {
    std::atomic<int64_t> next;  // pieces are handed out as threads come for them
    std::atomic<int> workers;
    int64_t count;
    int64_t piece;
    void* context;
    void (*body)(void*, int, int64_t, int64_t);
};

void work(void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    const int worker = loop.workers.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
        const int64_t begin = loop.next.fetch_add(loop.piece, std::memory_order_relaxed);
        if (begin >= loop.count) return;
        loop.body(loop.context, worker, begin, begin + loop.piece < loop.count ? begin + loop.piece : loop.count);
    }
}

// A thread that cannot be had leaves its pieces to the others: the same numbers, later. Nothing is thrown: the caller's
// caller is Python, which an exception would not reach.
void on_threads_of_our_own(Loop& loop, int wanted) {
    std::vector<std::thread> others;
    try {
        others.reserve(wanted - 1);
        while (static_cast<int>(others.size()) < wanted - 1) others.emplace_back(work, &loop);
    } catch (const std::exception&) {
    }
    work(&loop);
    for (std::thread& thread : others) thread.join();
}

}  // namespace

void parallel_pieces(
    int64_t count, int64_t piece, int num_threads, void* context, void (*body)(void*, int, int64_t, int64_t)
) {
    static const ParallelRegion region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Loop loop = {{0}, {0}, count, piece, context, body};
    const int64_t pieces = (count + piece - 1) / piece;
    const int wanted = pieces < num_threads ? static_cast<int>(pieces) : num_threads;
    if (wanted <= 1) {
        work(&loop);
    } else if (region) {
        region(work, &loop, static_cast<unsigned>(wanted), 0);
    } else {
        on_threads_of_our_own(loop, wanted);
    }
}

}  // namespace fastppo
