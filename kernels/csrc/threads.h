// The one way in which the C++ ops use more than one thread.

#pragma once

#include <cstdint>

namespace fastppo {

constexpr int64_t kPieceElements = 1 << 16;  // of a piece of a loop: some 20 us of work, or waking a thread matters

// Calls body(context, worker, begin, end) for pieces of `piece` indices of [0, count), the last one shorter, on at most
// num_threads threads; a loop of one piece runs on the calling one. `worker` counts the threads from 0: body may keep
// memory for each. Pieces do not depend on num_threads, so what is made per piece does not either.
void parallel_pieces(
    int64_t count, int64_t piece, int num_threads, void* context,
    void (*body)(void* context, int worker, int64_t begin, int64_t end)
);

// The same with body(worker, begin, end), where one index is `elements` elements of work.
template <class Body>
void parallel_for(int64_t count, int64_t elements, int num_threads, Body body) {
    const int64_t piece = kPieceElements / (elements > 0 ? elements : 1);
    parallel_pieces(
        count, piece > 0 ? piece : 1, num_threads, &body,
        [](void* context, int worker, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(worker, begin, end); });
}

}  // namespace fastppo
