// Sums over the lines of a table (see fastppo_kernels.table).

#include <algorithm>

#include "loops.h"
#include "threads.h"

extern "C" {

// (3, C) sums, sums of squares and maxima of the columns of an (R, C) table, R > 0, C = 8 or 16. Blocks of rows are added
// up in their order: same numbers for every num_threads.
void fastppo_table_sums(
    int64_t num_rows,
    int64_t num_columns,  // C
    int64_t block,        // rows
    const float* table,   // (R, C)
    double* partials,     // (ceil(R / block), 3, C) scratch
    double* sums,         // (3, C)
    int isa,
    int num_threads
) {
    using namespace fastppo;
    const int64_t num_blocks = (num_rows + block - 1) / block, size = 3 * num_columns;
    const auto line_sums = instruction_set(isa).loops->line_sums[num_columns == 16];
    parallel_for(num_blocks, block * num_columns, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            line_sums(table + b * block * num_columns, std::min(block, num_rows - b * block), partials + b * size);
    });
    std::copy(partials, partials + size, sums);
    for (const double* more = partials + size; more < partials + num_blocks * size; more += size)
        for (int64_t i = 0; i < size; ++i) {
            const bool adds = i < 2 * num_columns, keeps = more[i] <= sums[i] || sums[i] != sums[i];
            sums[i] = adds ? sums[i] + more[i] : keeps ? sums[i] : more[i];
        }
}

}  // extern "C"
