// One token per row by inverse CDF, with temperature, top-k and top-p. Letters: R rows, V vocabulary.
//
// A row is swept once, in blocks of 256 columns: the maximum of a block, then the sum of exp((z - maximum) / T) while
// the block is in the L1 cache. Sums of blocks add up in double; the block in which the CDF crosses u * total is then
// swept column by column. Truncation first gathers the columns that can survive it, which the maxima of the blocks
// bound, and finds where to cut by bisection, so that nothing but a few columns around the cut is ever sorted.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "portable.h"

namespace fastppo {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kSortable = 16;    // so few columns are sorted rather than bisected any further
constexpr int kBisections = 40;      // 2^-40 of a row's range is less than one ulp of its largest logit
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

// 2^x for x <= 0, within 1e-7 of it; 0 below 2^-126.5, NaN for NaN, exactly 1 for 0. Adding 1.5 * 2^23 rounds to an
// integer n in the low bits, and 2^-127, of exponent bits 0, is 0. The polynomial spreads its relative error evenly.
FASTPPO_INLINE float exp2_of_negative(float x) {
    const float bounded = -127.0f > x ? -127.0f : x;
    const float shifted = bounded + 12582912.0f;
    const float f = bounded - (shifted - 12582912.0f);
    float p = 1.535336204e-4f;
    p = p * f + 1.339887450e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.0f;
    return p * float_of_bits((bits_of_float(shifted) + 127) << 23);
}

// Maximum of n columns (a multiple of kLanes; NaN counts as nothing) and the sum of 2^((z - maximum) * scale).
FASTPPO_CLONES float sweep(const float* z, int64_t n, float scale, float* maximum) {
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = -kInfinity;
    for (int64_t j = 0; j < n; j += kLanes)
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] = Larger()(lanes[i], z[j + i]);
    *maximum = fold(lanes, Larger());
    const float origin = *maximum == -kInfinity ? 0.0f : *maximum;  // -inf - -inf would be NaN
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = 0.0f;
    for (int64_t j = 0; j < n; j += kLanes)
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] += exp2_of_negative((z[j + i] - origin) * scale);
    return fold(lanes, Add());
}

FASTPPO_CLONES void exponentials(const float* z, int64_t n, float origin, float scale, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = exp2_of_negative((z[i] - origin) * scale);
}

FASTPPO_CLONES void widen(const bfloat16* z, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(z[i]);
}

struct Mass {
    double sum;
    int64_t count;
};

// Sum of the weights, and number, of the columns with z > cut. Lanes of float32 for a block, then double.
FASTPPO_CLONES Mass mass_above(const float* z, const float* weights, int64_t n, float cut) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t last = std::min(first + kBlock, n);
        float lanes[kLanes] = {};
        int32_t counts[kLanes] = {};
        int64_t j = first;
        for (; j + kLanes <= last; j += kLanes)
            for (int64_t i = 0; i < kLanes; ++i) {
                lanes[i] += z[j + i] > cut ? weights[j + i] : 0.0f;
                counts[i] += z[j + i] > cut ? 1 : 0;
            }
        for (int64_t i = 0; j + i < last; ++i) {
            lanes[i] += z[j + i] > cut ? weights[j + i] : 0.0f;
            counts[i] += z[j + i] > cut ? 1 : 0;
        }
        sum += fold(lanes, Add());
        count += fold(counts, Add());
    }
    return {sum, count};
}

FASTPPO_INLINE bool any_between(const float* z, int64_t n, float below, float above) {
    int32_t any = 0;
    for (int64_t i = 0; i < n; ++i) any |= (z[i] > below) & (z[i] <= above);
    return any != 0;
}

// Indices of the columns with below < z <= above, rising; returns how many.
FASTPPO_CLONES int64_t indices_between(const float* z, int64_t n, float below, float above, int32_t* indices) {
    int64_t found = 0;
    for (int64_t first = 0; first < n; first += kLanes) {
        const int64_t length = std::min(kLanes, n - first);
        if (length == kLanes && !any_between(z + first, kLanes, below, above)) continue;
        for (int64_t i = first; i < first + length; ++i) {
            indices[found] = static_cast<int32_t>(i);
            found += (z[i] > below) & (z[i] <= above);
        }
    }
    return found;
}

FASTPPO_CLONES void drop(float* z, float* weights, int64_t n, float cut, int64_t tie) {
    for (int64_t i = 0; i <= tie; ++i) {  // columns that a tie keeps
        weights[i] = z[i] >= cut ? weights[i] : 0.0f;
        z[i] = z[i] >= cut ? z[i] : -kInfinity;
    }
    for (int64_t i = tie + 1; i < n; ++i) {
        weights[i] = z[i] > cut ? weights[i] : 0.0f;
        z[i] = z[i] > cut ? z[i] : -kInfinity;
    }
}

// A row of logits read in blocks of float32.
template <typename T>
struct Row {
    const T* logits;
    int64_t num_columns;

    // Block b and its length rounded up to kLanes, -inf past the end of the row. The buffer holds a block.
    const float* block(int64_t b, int64_t* length, float* buffer) const {
        const int64_t first = b * kBlock, n = std::min(kBlock, num_columns - first);
        *length = (n + kLanes - 1) / kLanes * kLanes;
        if constexpr (sizeof(T) == sizeof(float))
            if (n == *length) return logits + first;
        copy(logits + first, n, buffer);
        std::fill(buffer + n, buffer + *length, -kInfinity);
        return buffer;
    }

    static void copy(const float* z, int64_t n, float* out) { std::copy(z, z + n, out); }
    static void copy(const bfloat16* z, int64_t n, float* out) { widen(z, n, out); }
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

// Memory of one thread for rows of V columns; what truncation does not touch costs nothing.
struct Scratch {
    explicit Scratch(int64_t num_columns)
        : maxima(new float[blocks_of(num_columns)]),
          sums(new float[blocks_of(num_columns)]),
          masses(new double[blocks_of(num_columns)]) {}

    void reserve_columns(int64_t num_columns) {
        z.reset(new float[num_columns]);
        weights.reset(new float[num_columns]);
        columns.reset(new int32_t[num_columns]);
        order.reset(new int32_t[num_columns]);
    }

    std::unique_ptr<float[]> maxima, sums;
    std::unique_ptr<double[]> masses;
    std::unique_ptr<float[]> z, weights;  // of the columns that truncation considers, in the order of the vocabulary
    std::unique_ptr<int32_t[]> columns, order;
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
void narrow(Scratch& s, int64_t n, double target, float below, float above) {
    const float *z = s.z.get(), *weights = s.weights.get();
    Mass kept{0.0, 0};  // of z > above: less than the target, which the mass of z > below reaches
    int64_t undecided = n;
    for (int i = 0; i < kBisections && undecided > kSortable; ++i) {
        const float middle = 0.5f * below + 0.5f * above;
        if (!(below < middle && middle < above)) break;
        const Mass mass = mass_above(z, weights, n, middle);
        if (mass.sum < target) {
            undecided -= mass.count - kept.count;
            above = middle, kept = mass;
        } else {
            below = middle, undecided = mass.count - kept.count;
        }
    }
    int32_t* order = s.order.get();
    const int64_t m = indices_between(z, n, below, above, order);
    const auto before = [z](int32_t a, int32_t b) { return z[a] != z[b] ? z[a] > z[b] : a < b; };
    if (!std::is_sorted(order, order + m, before)) std::sort(order, order + m, before);
    int64_t last = 0;
    for (double sum = kept.sum + weights[order[0]]; sum < target && last + 1 < m; sum += weights[order[last]]) ++last;
    drop(s.z.get(), s.weights.get(), n, z[order[last]], order[last]);
}

// One row's sampling, in steps that share its statistics.
template <typename T>
struct Sampler {
    const Row<T>& row;
    const Settings& settings;
    Scratch& scratch;
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
            scratch.sums[b] = sweep(z, length, scale, &scratch.maxima[b]);
            maximum = std::max(maximum, scratch.maxima[b]);
        }
        for (int64_t b = 0; b < n; ++b) {
            scratch.masses[b] = double{scratch.sums[b]} * exp2_of_negative((scratch.maxima[b] - maximum) * scale);
            total += scratch.masses[b];
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
        const int64_t b = find_block(scratch.masses.get(), blocks_of(row.num_columns), threshold, &before);
        int64_t length;
        float buffer[kBlock], weights[kBlock];
        const float* z = row.block(b, &length, buffer);
        exponentials(z, length, maximum, scale, weights);
        const int64_t i = find_column(weights, length, threshold - before);
        return {b * kBlock + i, (double{z[i]} - maximum) / settings.temperature - std::log(total), 0.0};
    }

    // Puts the columns that may survive truncation into the scratch, of weight 0 if they do not; returns how many.
    int64_t gather(bool top_k) {
        const float possible = std::max(static_cast<float>(maximum - 127.0 / scale), kLowest);  // less has probability 0
        const float bound = std::max(top_k ? bound_of_top_k() : bound_of_top_p(), possible);
        const float below = std::nextafter(bound, -kInfinity);
        const int64_t n = gather_above(below);
        float *z = scratch.z.get(), *weights = scratch.weights.get();
        if (top_k && settings.top_k < n) {
            std::fill(weights, weights + n, 1.0f);
            narrow(scratch, n, static_cast<double>(settings.top_k), below, maximum);
        }
        exponentials(z, n, maximum, scale, weights);
        if (settings.top_p < 1.0) {
            const double mass = top_k ? mass_above(z, weights, n, below).sum : total;
            narrow(scratch, n, settings.top_p * mass, below, maximum);
        }
        return n;
    }

    // The k-th largest maximum of a block: so many columns at least reach it.
    float bound_of_top_k() {
        const int64_t n = blocks_of(row.num_columns), k = settings.top_k;
        if (k > n) return -kInfinity;
        std::copy(scratch.maxima.get(), scratch.maxima.get() + n, scratch.sums.get());
        std::nth_element(scratch.sums.get(), scratch.sums.get() + k - 1, scratch.sums.get() + n, std::greater<float>());
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
            const int64_t found = indices_between(z, length, below, kInfinity, indices);
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
            scratch.masses[b] = mass_above(&scratch.z[first], &scratch.weights[first], length, -kInfinity).sum;
            kept += scratch.masses[b];
        }
        const double threshold = uniform * kept;
        const int64_t first = kBlock * find_block(scratch.masses.get(), blocks_of(n), threshold, &before);
        const int64_t length = std::min(kBlock, n - first);
        const int64_t i = first + find_column(&scratch.weights[first], length, threshold - before);
        const double logprob = (double{scratch.z[i]} - maximum) / settings.temperature - std::log(kept);
        return {scratch.columns[i], logprob, std::min(std::log(kept / total), 0.0)};
    }
};

struct Batch {
    int64_t num_rows, num_columns, stride;
    const void* uniform;
    bool uniform_is_double;
    Settings settings;
    int64_t* tokens;
    float *logprobs, *log_mass;

    double uniform_of(int64_t r) const {
        return uniform_is_double ? static_cast<const double*>(uniform)[r] : static_cast<const float*>(uniform)[r];
    }
};

template <typename T>
void sample_rows(const Batch& x, const T* logits, int num_threads) {
    const bool truncated = (0 < x.settings.top_k && x.settings.top_k < x.num_columns) || x.settings.top_p < 1.0;
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads)
#else
    (void)num_threads;
#endif
    {
        Scratch scratch(x.num_columns);
        if (truncated) scratch.reserve_columns(x.num_columns);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (int64_t r = 0; r < x.num_rows; ++r) {
            const Row<T> row{logits + r * x.stride, x.num_columns};
            const Draw draw = Sampler<T>{row, x.settings, scratch}.draw(x.uniform_of(r));
            x.tokens[r] = draw.token;
            x.logprobs[r] = static_cast<float>(draw.logprob);
            x.log_mass[r] = static_cast<float>(draw.log_mass);
        }
    }
}

}  // namespace
}  // namespace fastppo

extern "C" {

// One token per row of softmax(logits / temperature), truncated to the top_k most probable columns (0: all; ties: those
// of lowest column) and then to the fewest whose mass reaches top_p (>= 1: all): the first column, in the order of the
// vocabulary, at which the CDF exceeds uniform times its total. A column 2^-126.5 times as probable as the most
// probable one, or less, has probability 0 and is never drawn. A row that is no distribution (a NaN or +inf, or nothing but -inf) gives
// token 0 and NaN. The draws of a row depend on nothing but the row.
void fastppo_sample(
    int64_t num_rows,
    int64_t num_columns,   // V >= 1
    int is_bfloat16,       // logits are bfloat16, else float32
    const void* logits,    // (R, V), rows stride elements apart
    int64_t stride,
    int uniform_is_double, // else float32
    const void* uniform,   // (R,) in [0, 1)
    double temperature,    // > 0
    int64_t top_k,
    double top_p,
    int64_t* tokens,       // (R,)
    float* logprobs,       // (R,) under the distribution drawn from
    float* log_mass,       // (R,) log of the mass that truncation keeps
    int num_threads
) {
    using namespace fastppo;
    const Batch batch{num_rows,  num_columns, stride,  uniform, uniform_is_double != 0, {temperature, top_k, top_p},
                      tokens,    logprobs,    log_mass};
    if (is_bfloat16)
        sample_rows(batch, static_cast<const bfloat16*>(logits), num_threads);
    else
        sample_rows(batch, static_cast<const float*>(logits), num_threads);
}

}  // extern "C"
