// One token per row by inverse CDF, with temperature, top-k and top-p. Letters: R rows, V vocabulary.
//
// A row is swept once, in blocks of 256 columns: the maximum of a block, then the sum of exp((z - maximum) / T) while
// the block is in the L1 cache. Sums of blocks add up in double; the block in which the CDF crosses u * total is then
// swept column by column. Truncation first gathers the columns that can survive it, which the maxima of the blocks
// bound, and finds where to cut by bisection, so that nothing but a few columns around the cut is ever sorted.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "loops.h"
#include "threads.h"

namespace fastppo {
namespace {

constexpr int64_t kSortable = 16;    // so few columns are sorted rather than bisected any further
constexpr int kBisections = 40;      // 2^-40 of a row's range is less than one ulp of its largest logit
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// A row of logits read in blocks of float32.
struct Row {
    const Loops& loops;
    Dtype dtype;
    const char* logits;
    int64_t num_columns;

    // Block b and its length rounded up to kGroup, -inf past the end of the row. The buffer holds a block.
    const float* block(int64_t b, int64_t* length, float* buffer) const {
        const int64_t first = b * kBlock, n = std::min(kBlock, num_columns - first);
        *length = (n + kGroup - 1) / kGroup * kGroup;
        const char* z = logits + first * (dtype == kFloat32 ? 4 : 2);
        if (dtype == kFloat32 && n == *length) return reinterpret_cast<const float*>(z);
        loops.widen[dtype](z, n, buffer);
        std::fill(buffer + n, buffer + *length, -kInfinity);
        return buffer;
    }
};

struct Settings {
    double temperature;
    int64_t top_k;  // 0: all
    double top_p;   // >= 1: all
};

struct Draw {
    int64_t token;
    double logprob, log_mass;
};

// Memory of one thread for rows of V columns, which the caller gives; no row finds in it what another one left.
struct Scratch {
    Scratch(double* memory, int64_t num_columns)
        : masses(memory),
          maxima(reinterpret_cast<float*>(memory + blocks_of(num_columns))),
          sums(maxima + blocks_of(num_columns)),
          z(sums + blocks_of(num_columns)),
          weights(z + num_columns),
          columns(reinterpret_cast<int32_t*>(weights + num_columns)),
          order(columns + num_columns) {}

    static int64_t doubles(int64_t num_columns, bool truncated) {
        const int64_t cache_line = 8, n = 2 * blocks_of(num_columns) + (truncated ? 2 * num_columns : 0);
        return (n + 2 * cache_line - 1) / cache_line * cache_line;  // so that threads share no line
    }

    double* masses;
    float *maxima, *sums;
    float *z, *weights;  // of the columns that truncation considers, in the order of the vocabulary; from here on unused
    int32_t *columns, *order;  // without truncation
};

// The first block at whose end the CDF exceeds the threshold, else (rounding) the last that has mass. *before is the
// mass of the blocks before it.
int64_t find_block(const double* masses, int64_t n, double threshold, double* before) {
    double end = 0.0;
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (masses[i] > 0.0) found = i, *before = end;
        end += masses[i];
        if (end > threshold) break;
    }
    return found;
}

int64_t find_column(const float* weights, int64_t n, double threshold) {
    double end = 0.0;
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (weights[i] > 0.0f) found = i;
        end += weights[i];
        if (end > threshold) break;
    }
    return found;
}

// Drops from the n columns of the scratch all but the fewest of largest z (ties: of lowest column) whose weights reach the
// target: the others get weight 0 and z -inf. Every z that is not -inf lies in (below, above].
void narrow(const Loops& loops, const Scratch& s, int64_t n, double target, float below, float above) {
    const float *z = s.z, *weights = s.weights;
    Mass kept{0.0, 0};  // of z > above: less than the target, which the mass of z > below reaches
    int64_t undecided = n;
    for (int i = 0; i < kBisections && undecided > kSortable; ++i) {
        const float middle = 0.5f * below + 0.5f * above;
        if (!(below < middle && middle < above)) break;
        const Mass mass = loops.mass_above(z, weights, n, middle);
        if (mass.sum < target) {
            undecided -= mass.count - kept.count;
            above = middle, kept = mass;
        } else {
            below = middle, undecided = mass.count - kept.count;
        }
    }
    int32_t* order = s.order;
    const int64_t m = loops.indices_between(z, n, below, above, order);
    const auto before = [z](int32_t a, int32_t b) { return z[a] != z[b] ? z[a] > z[b] : a < b; };
    if (!std::is_sorted(order, order + m, before)) std::sort(order, order + m, before);
    int64_t last = 0;
    for (double sum = kept.sum + weights[order[0]]; sum < target && last + 1 < m; sum += weights[order[last]]) ++last;
    loops.drop(s.z, s.weights, n, z[order[last]], order[last]);
}

// One row's sampling, in steps that share its statistics.
struct Sampler {
    const Row& row;
    const Settings& settings;
    const Scratch& scratch;
    const Loops& loops = row.loops;
    float scale = 0.0f;      // log2(e) / temperature
    float maximum = -kInfinity;
    double total = 0.0;      // of exp((z - maximum) / temperature), NaN for a row that is no distribution

    void measure() {
        const int64_t n = blocks_of(row.num_columns);
        const double wanted = 1.4426950408889634 / settings.temperature;
        scale = static_cast<float>(std::min<double>(wanted, std::numeric_limits<float>::max()));
        float buffer[kBlock];
        for (int64_t b = 0; b < n; ++b) {
            int64_t length;
            const float* z = row.block(b, &length, buffer);
            scratch.sums[b] = loops.sweep(z, length, scale, &scratch.maxima[b]);
            maximum = std::max(maximum, scratch.maxima[b]);
        }
        for (int64_t first = 0; first < n; first += kBlock) {
            const int64_t length = std::min(kBlock, n - first);
            loops.exponentials(scratch.maxima + first, length, maximum, scale, buffer);
            for (int64_t i = 0; i < length; ++i) {
                scratch.masses[first + i] = double{scratch.sums[first + i]} * buffer[i];
                total += scratch.masses[first + i];
            }
        }
    }

    Draw draw(double uniform) {
        measure();
        if (!(total >= 1.0)) return {0, std::nan(""), std::nan("")};  // the maximum alone has mass 1
        const bool top_k = 0 < settings.top_k && settings.top_k < row.num_columns;
        if (!top_k && settings.top_p >= 1.0) return draw_from_all(uniform);
        return draw_from(gather(top_k), uniform);
    }

    Draw draw_from_all(double uniform) {
        const double threshold = uniform * total;
        double before = 0.0;
        const int64_t b = find_block(scratch.masses, blocks_of(row.num_columns), threshold, &before);
        int64_t length;
        float buffer[kBlock], weights[kBlock];
        const float* z = row.block(b, &length, buffer);
        loops.exponentials(z, length, maximum, scale, weights);
        const int64_t i = find_column(weights, length, threshold - before);
        return {b * kBlock + i, (double{z[i]} - maximum) / settings.temperature - std::log(total), 0.0};
    }

    // Puts the columns that may survive truncation into the scratch, of weight 0 if they do not; returns how many.
    int64_t gather(bool top_k) {
        const float possible = std::max(static_cast<float>(maximum - 127.0 / scale), kLowest);  // less has probability 0
        const float bound = std::max(top_k ? bound_of_top_k() : bound_of_top_p(), possible);
        const float below = std::nextafter(bound, -kInfinity);
        const int64_t n = gather_above(below);
        float *z = scratch.z, *weights = scratch.weights;
        if (top_k && settings.top_k < n) {
            std::fill(weights, weights + n, 1.0f);
            narrow(loops, scratch, n, static_cast<double>(settings.top_k), below, maximum);
        }
        loops.exponentials(z, n, maximum, scale, weights);
        if (settings.top_p < 1.0) {
            const double mass = top_k ? loops.mass_above(z, weights, n, below).sum : total;
            narrow(loops, scratch, n, settings.top_p * mass, below, maximum);
        }
        return n;
    }

    // The k-th largest maximum of a block: so many columns at least reach it.
    float bound_of_top_k() {
        const int64_t n = blocks_of(row.num_columns), k = settings.top_k;
        if (k > n) return -kInfinity;
        std::copy(scratch.maxima, scratch.maxima + n, scratch.sums);
        std::nth_element(scratch.sums, scratch.sums + k - 1, scratch.sums + n, std::greater<float>());
        return scratch.sums[k - 1];
    }

    // Columns of less than (1 - top_p) / V of the mass sum to less than 1 - top_p: the nucleus is complete before
    // they begin. Half of that is taken, so that rounding does not matter.
    float bound_of_top_p() const {
        const double least = 0.5 * (1.0 - settings.top_p) * total / static_cast<double>(row.num_columns);
        return std::nextafter(static_cast<float>(maximum + std::log2(least) / scale), -kInfinity);
    }

    // Columns of z > below into the scratch, in the order of the vocabulary; returns how many.
    int64_t gather_above(float below) {
        int64_t n = 0;
        int32_t indices[kBlock];
        float buffer[kBlock];
        for (int64_t b = 0; b < blocks_of(row.num_columns); ++b) {
            if (!(scratch.maxima[b] > below)) continue;
            int64_t length;
            const float* z = row.block(b, &length, buffer);
            const int64_t found = loops.indices_between(z, length, below, kInfinity, indices);
            for (int64_t i = 0; i < found; ++i) {
                scratch.z[n + i] = z[indices[i]];
                scratch.columns[n + i] = static_cast<int32_t>(b * kBlock) + indices[i];
            }
            n += found;
        }
        return n;
    }

    // One of the n columns in the scratch.
    Draw draw_from(int64_t n, double uniform) {
        double kept = 0.0, before = 0.0;
        for (int64_t b = 0; b < blocks_of(n); ++b) {
            const int64_t first = b * kBlock, length = std::min(kBlock, n - first);
            scratch.masses[b] = loops.mass_above(&scratch.z[first], &scratch.weights[first], length, -kInfinity).sum;
            kept += scratch.masses[b];
        }
        const double threshold = uniform * kept;
        const int64_t first = kBlock * find_block(scratch.masses, blocks_of(n), threshold, &before);
        const int64_t length = std::min(kBlock, n - first);
        const int64_t i = first + find_column(&scratch.weights[first], length, threshold - before);
        const double logprob = (double{scratch.z[i]} - maximum) / settings.temperature - std::log(kept);
        return {scratch.columns[i], logprob, std::min(std::log(kept / total), 0.0)};
    }
};

bool truncates(int64_t num_columns, int64_t top_k, double top_p) {
    return (0 < top_k && top_k < num_columns) || top_p < 1.0;
}

}  // namespace
}  // namespace fastppo

extern "C" {

// Elements of the scratch of one thread.
int64_t fastppo_sample_scratch(int64_t num_columns, int64_t top_k, double top_p) {
    return fastppo::Scratch::doubles(num_columns, fastppo::truncates(num_columns, top_k, top_p));
}

// One token per row of softmax(logits / temperature), truncated to the top_k most probable columns (0: all; ties: those
// of lowest column) and then to the fewest whose mass reaches top_p (>= 1: all): the first column, in the order of the
// vocabulary, at which the CDF exceeds uniform times its total. A column 2^-126.5 times as probable as the most
// probable one, or less, has probability 0 and is never drawn. A row that is no distribution (a NaN or +inf, or nothing
// but -inf) gives token 0 and NaN. The draws of a row depend on nothing but the row.
void fastppo_sample(
    int64_t num_rows,
    int64_t num_columns,   // V >= 1
    int dtype,             // of logits
    const void* logits,    // (R, V), rows stride elements apart
    int64_t stride,
    const double* uniform, // (R,) in [0, 1)
    double temperature,    // > 0
    int64_t top_k,
    double top_p,
    int64_t* tokens,       // (R,)
    float* logprobs,       // (R,) under the distribution drawn from
    float* log_mass,       // (R,) log of the mass that truncation keeps
    double* scratch,       // (num_threads, fastppo_sample_scratch(...))
    int isa,
    int num_threads
) {
    using namespace fastppo;
    const Settings settings{temperature, top_k, top_p};
    const int64_t step = stride * (dtype == kFloat32 ? 4 : 2), own = fastppo_sample_scratch(num_columns, top_k, top_p);
    parallel_for(num_rows, num_columns, num_threads, [&](int worker, int64_t begin, int64_t end) {
        const Scratch memory(scratch + worker * own, num_columns);
        for (int64_t r = begin; r < end; ++r) {
            const char* z = static_cast<const char*>(logits) + r * step;
            const Row row{*instruction_set(isa).loops, static_cast<Dtype>(dtype), z, num_columns};
            const Draw draw = Sampler{row, settings, memory}.draw(uniform[r]);
            tokens[r] = draw.token;
            logprobs[r] = static_cast<float>(draw.logprob);
            log_mass[r] = static_cast<float>(draw.log_mass);
        }
    });
}

}  // extern "C"
