// The table of loops.h, compiled for every instruction set (CMakeLists.txt): FASTPPO_LOOPS names the table that this
// translation unit defines. Nothing here is inline across translation units, so nothing of the standard library is used.
//
// Most are plain loops, which the compiler turns into vectors. The width of a register changes no order of summation and
// multiply-adds that round differently are made in exp2.h alone, so all instruction sets that have those give the same
// bits.

#include "loops.h"

#include "exp2.h"
#include "simd.h"

using namespace fastppo;

namespace {

constexpr int64_t kVectors = kGroup / kLanes;
constexpr int64_t kStride = 8;  // of the recurrence of GAE
constexpr int64_t kMomentsLanes = 32;
constexpr float kInfinity = __builtin_inff();

// lanes[0] + lanes[1] + ..., pairwise; overwrites the lanes. Widths are constants, so that every level is a vector.
template <int64_t kWidth, typename T>
FASTPPO_INLINE T sum_of(T* lanes) {
    if constexpr (kWidth > 1) {
        for (int64_t i = 0; i < kWidth / 2; ++i) lanes[i] += lanes[i + kWidth / 2];
        return sum_of<kWidth / 2>(lanes);
    }
    return lanes[0];
}

template <typename T>
void widen(const void* given, int64_t n, float* out) {
    const T* z = static_cast<const T*>(given);
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(z[i]);
}

// 2^((z - origin) * scale) of one vector; NaN stays NaN
struct Exponential {
    F origin, scale, least;

    Exponential(float from, float by) : origin(set(from)), scale(set(by)), least(set(-127.0f / by)) {}
    inline __attribute__((always_inline)) F operator()(F z) const {
        return exp2_of<6>(max(least, sub(z, origin)), scale);
    }
};

float sweep(const float* z, int64_t n, float scale, float* maximum) {
    F lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = set(-kInfinity);
    for (int64_t j = 0; j < n; j += kGroup)
        for (int v = 0; v < kVectors; ++v) lanes[v] = max(load(z + j + v * kLanes), lanes[v]);
    for (int v = 1; v < kVectors; ++v) lanes[0] = max(lanes[0], lanes[v]);
    *maximum = largest(lanes[0]);
    const Exponential exponential(*maximum == -kInfinity ? 0.0f : *maximum, scale);  // -inf - -inf would be NaN
    for (int v = 0; v < kVectors; ++v) lanes[v] = set(0.0f);
    for (int64_t j = 0; j < n; j += kGroup)
        for (int v = 0; v < kVectors; ++v) lanes[v] = add(lanes[v], exponential(load(z + j + v * kLanes)));
    float sums[kGroup];
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, lanes[v]);
    return sum_of<kGroup>(sums);
}

void exponentials(const float* z, int64_t n, float origin, float scale, float* out) {
    const Exponential exponential(origin, scale);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, exponential(load(z + i)));
    if (i < n) store_first(out + i, static_cast<int>(n - i), exponential(load_first(z + i, static_cast<int>(n - i), origin)));
}

Mass mass_above(const float* z, const float* weights, int64_t n, float cut) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t last = least(first + kBlock, n);
        float lanes[kGroup] = {};
        int32_t counts[kGroup] = {};
        int64_t j = first;
        for (; j + kGroup <= last; j += kGroup)
            for (int64_t i = 0; i < kGroup; ++i) {
                lanes[i] += z[j + i] > cut ? weights[j + i] : 0.0f;
                counts[i] += z[j + i] > cut ? 1 : 0;
            }
        for (int64_t i = 0; j + i < last; ++i) {
            lanes[i] += z[j + i] > cut ? weights[j + i] : 0.0f;
            counts[i] += z[j + i] > cut ? 1 : 0;
        }
        sum += sum_of<kGroup>(lanes);
        count += sum_of<kGroup>(counts);
    }
    return {sum, count};
}

FASTPPO_INLINE bool any_between(const float* z, int64_t n, float below, float above) {
    int32_t any = 0;
    for (int64_t i = 0; i < n; ++i) any |= (z[i] > below) & (z[i] <= above);
    return any != 0;
}

int64_t indices_between(const float* z, int64_t n, float below, float above, int32_t* indices) {
    int64_t found = 0;
    for (int64_t first = 0; first < n; first += kGroup) {
        const int64_t length = least(kGroup, n - first);
        if (length == kGroup && !any_between(z + first, kGroup, below, above)) continue;
        for (int64_t i = first; i < first + length; ++i) {
            indices[found] = static_cast<int32_t>(i);
            found += (z[i] > below) & (z[i] <= above);
        }
    }
    return found;
}

void drop(float* z, float* weights, int64_t n, float cut, int64_t tie) {
    for (int64_t i = 0; i <= tie; ++i) {
        weights[i] = z[i] >= cut ? weights[i] : 0.0f;
        z[i] = z[i] >= cut ? z[i] : -kInfinity;
    }
    for (int64_t i = tie + 1; i < n; ++i) {
        weights[i] = z[i] > cut ? weights[i] : 0.0f;
        z[i] = z[i] > cut ? z[i] : -kInfinity;
    }
}

template <typename T>
float dot(const void* given, const float* w, int64_t n) {
    const T* x = static_cast<const T*>(given);
    float lanes[kGroup] = {};
    int64_t j = 0;
    for (; j + kGroup <= n; j += kGroup)
        for (int64_t i = 0; i < kGroup; ++i) lanes[i] += to_float(x[j + i]) * w[j + i];
    for (int64_t i = 0; j + i < n; ++i) lanes[i] += to_float(x[j + i]) * w[j + i];
    return sum_of<kGroup>(lanes);
}

// a * b + c where a and b are float32: the product is exact in double, so that fusing it changes no bit.
FASTPPO_INLINE double add_product(float a, float b, double c) {
#if defined(__FMA__) || defined(__AVX512F__) || defined(__aarch64__)
    return __builtin_fma(double{a}, double{b}, c);
#else
    return double{a} * double{b} + c;
#endif
}

template <typename T>
void spread(float slope, const void* hidden, const float* weight, int64_t n, void* dhidden, double* dweight) {
    const T* x = static_cast<const T*>(hidden);
    T* out = static_cast<T*>(dhidden);
    for (int64_t j = 0; j < n; ++j) dweight[j] = add_product(slope, to_float(x[j]), dweight[j]);
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store_rounded(out + j, mul(set(slope), load(weight + j)));
    const int rest = static_cast<int>(n - j);
    if (rest) store_first(out + j, rest, mul(set(slope), load_first(weight + j, rest, 0.0f)));
}

void column_sums(const double* partials, int64_t num_rows, int64_t width, int64_t n, float* out) {
    double sums[kGroup] = {};
    for (int64_t r = 0; r < num_rows; ++r)
        for (int64_t i = 0; i < n; ++i) sums[i] += partials[r * width + i];
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(sums[i]);
}

template <int64_t kColumns>
void line_sums(const float* table, int64_t n, double* out) {
    double sums[kColumns] = {}, squares[kColumns] = {};
    float largest[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) largest[i] = -kInfinity;
    for (const float* line = table; line < table + n * kColumns; line += kColumns) {
        for (int64_t i = 0; i < kColumns; ++i) sums[i] += double{line[i]};
        for (int64_t i = 0; i < kColumns; ++i) squares[i] = add_product(line[i], line[i], squares[i]);
        for (int64_t i = 0; i < kColumns; ++i) largest[i] = line[i] <= largest[i] || largest[i] != largest[i] ? largest[i] : line[i];
    }
    for (int64_t i = 0; i < kColumns; ++i) out[i] = sums[i];
    for (int64_t i = 0; i < kColumns; ++i) out[kColumns + i] = squares[i];
    for (int64_t i = 0; i < kColumns; ++i) out[2 * kColumns + i] = largest[i];
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

// Which of up to 16 bytes are set.
FASTPPO_INLINE __mmask16 set_of(const uint8_t* mask, __mmask16 inside) {
    const __m128i bytes = _mm_maskz_loadu_epi8(inside, mask);
    return _mm_test_epi8_mask(bytes, bytes);
}

FASTPPO_INLINE __mmask16 inside_of(int64_t rest) { return rest < 16 ? (1u << rest) - 1 : 0xffff; }

int64_t pack(const float* x, const uint8_t* mask, int64_t n, float* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 inside = inside_of(n - i), taken = set_of(mask + i, inside);
        _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(taken, _mm512_maskz_loadu_ps(inside, x + i)));
        count += __builtin_popcount(taken);
    }
    return count;
}

void unpack(const float* x, const uint8_t* mask, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 inside = inside_of(n - i), taken = set_of(mask + i, inside);
        _mm512_mask_storeu_ps(out + i, inside, _mm512_maskz_expand_ps(taken, _mm512_loadu_ps(x)));
        x += __builtin_popcount(taken);
    }
}

#else

int64_t pack(const float* x, const uint8_t* mask, int64_t n, float* out) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
        out[count] = x[i];
        count += mask[i] != 0;
    }
    return count;
}

void unpack(const float* x, const uint8_t* mask, int64_t n, float* out) {
    for (int64_t i = 0, j = 0; i < n; ++i) {  // reads where it takes nothing: no branch to mispredict
        out[i] = mask[i] ? x[j] : 0.0f;
        j += mask[i] != 0;
    }
}

#endif

// A_t = delta_t + c A_{t+1} unrolled to A_t = x_t + c^8 A_{t+8} with x_t = delta_t + c delta_{t+1} + ... + c^7
// delta_{t+7}, so that nothing waits for the element before it.
void gae(
    const float* rewards, const float* values, int64_t n, double gamma, double c, Step* next, float* advantages,
    float* returns
) {
    double x[kGaeBlock + kStride] = {}, y[kGaeBlock + kStride] = {};  // 0 past the end
    for (int64_t i = 0; i + 1 < n; ++i) x[i] = rewards[i] + gamma * values[i + 1] - values[i];
    x[n - 1] = rewards[n - 1] + gamma * next->value - values[n - 1] + c * next->advantage;
    for (int64_t i = 0; i < kGaeBlock; ++i) {
        double sum = x[i + kStride - 1];
        for (int64_t k = kStride - 2; k >= 0; --k) sum = x[i + k] + c * sum;
        y[i] = sum;
    }
    const double c2 = c * c, c4 = c2 * c2, power = c4 * c4;
    for (int64_t i = kGaeBlock - kStride; i >= 0; i -= kStride)
        for (int64_t j = 0; j < kStride; ++j) y[i + j] += power * y[i + kStride + j];
    for (int64_t i = 0; i < n; ++i) advantages[i] = static_cast<float>(y[i]);
    for (int64_t i = 0; i < n; ++i) returns[i] = static_cast<float>(y[i] + values[i]);
    *next = {values[0], y[0]};
}

// Two passes over the block.
Moments moments(const float* values, const uint8_t* mask, int64_t n) {
    double deviations[kMomentsBlock] = {}, lanes[kMomentsLanes] = {};  // values first; 0 where there is none
    int64_t count = n;
    for (int64_t i = 0; i < n; ++i) deviations[i] = values[i];
    if (mask) {
        count = 0;
        for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
        for (int64_t i = 0; i < n; ++i) deviations[i] = mask[i] ? deviations[i] : 0.0;
    }
    if (!count) return {0.0, 0.0, 0.0};
    for (int64_t i = 0; i < kMomentsBlock; i += kMomentsLanes)
        for (int64_t j = 0; j < kMomentsLanes; ++j) lanes[j] += deviations[i + j];
    const double mean = sum_of<kMomentsLanes>(lanes) / static_cast<double>(count);
    for (int64_t i = 0; i < n; ++i) deviations[i] -= mean;
    if (mask)
        for (int64_t i = 0; i < n; ++i) deviations[i] = mask[i] ? deviations[i] : 0.0;
    for (int64_t j = 0; j < kMomentsLanes; ++j) lanes[j] = 0.0;
    for (int64_t i = 0; i < kMomentsBlock; i += kMomentsLanes)
        for (int64_t j = 0; j < kMomentsLanes; ++j) lanes[j] += deviations[i + j] * deviations[i + j];
    return {static_cast<double>(count), mean, sum_of<kMomentsLanes>(lanes)};
}

}  // namespace

namespace fastppo {

extern const Loops FASTPPO_LOOPS;
const Loops FASTPPO_LOOPS = {
    {widen<float>, widen<BFloat16>}, sweep, exponentials, mass_above, indices_between, drop,
    {dot<float>, dot<BFloat16>}, {spread<float>, spread<BFloat16>}, column_sums,
    {line_sums<8>, line_sums<16>}, pack, unpack, gae, moments,
};

}  // namespace fastppo
