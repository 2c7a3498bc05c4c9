// The table of matmul.h: FASTPPO_MATMUL names the one that this translation unit defines (CMakeLists.txt).
//
// The blocks of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008): kDepth columns of a
// are in the second cache, packed where its rows have gaps, a strip of b as deep in the first, and a few rows of the
// result in registers.

#include "matmul.h"

#include <utility>

#include "simd.h"

using namespace fastppo;

namespace {

constexpr int kVectors = 2;
constexpr int64_t kColumns = kVectors * kLanes;  // of a strip
constexpr int kRows = kLanes == 8 ? 6 : 8;       // with kVectors sums each, for 16 registers of AVX2, 32 of AVX-512 and NEON
constexpr int64_t kDepth = 128;
constexpr int64_t kLine = 64 / sizeof(float);

// c (kCount, columns) = a b, for a with columns side by side and a packed strip b.
template <int kCount>
void strip(
    const float* a, int64_t a_row, const float* b, int64_t depth, const float* bias, int64_t columns, bool accumulate,
    float* c, int64_t c_row
) {
    F sums[kCount][kVectors];
    for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kVectors; ++v) sums[r][v] = set(0.0f);
        __builtin_prefetch(c + r * c_row, 1), __builtin_prefetch(c + r * c_row + least(columns, kColumns) - 1, 1);
    }
    for (int64_t k = 0; k < depth; ++k) {
        F w[kVectors];
        for (int v = 0; v < kVectors; ++v) w[v] = load(b + k * kColumns + v * kLanes);
        for (int r = 0; r < kCount; ++r) {
            const F x = set(a[r * a_row + k]);
            for (int v = 0; v < kVectors; ++v) sums[r][v] = mul_add(x, w[v], sums[r][v]);
        }
    }
    float edge[kColumns] = {}, edge_bias[kColumns] = {};
    const bool whole = columns >= kColumns;
    if (bias && !whole) std::memcpy(edge_bias, bias, columns * sizeof(float)), bias = edge_bias;
    for (int r = 0; r < kCount; ++r, c += c_row) {
        float* line = whole ? c : edge;
        if (accumulate && !whole) std::memcpy(edge, c, columns * sizeof(float));
        for (int v = 0; v < kVectors; ++v) {
            F x = sums[r][v];
            if (accumulate) x = add(load(line + v * kLanes), x);
            if (bias) x = add(x, load(bias + v * kLanes));
            store(line + v * kLanes, x);
        }
        if (!whole) std::memcpy(c, edge, columns * sizeof(float));
    }
}

using Strip = void (*)(const float*, int64_t, const float*, int64_t, const float*, int64_t, bool, float*, int64_t);

template <int... kCounts>
Strip strip_of(int64_t rows, std::integer_sequence<int, kCounts...>) {
    static constexpr Strip kStrips[] = {strip<kCounts + 1>...};
    return kStrips[rows - 1];
}

// out (kSide, kSide) = x turned: out[i, j] = x[j, i]
#if defined(__AVX512F__)

constexpr int64_t kSide = 16;

FASTPPO_INLINE __m512 pairs_low(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FASTPPO_INLINE __m512 pairs_high(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

void turn(const float* x, int64_t x_row, float* out, int64_t out_row) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load(x + i * x_row);
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    for (int i = 0; i < 16; i += 4) {  // a[i + j]: column j of every quarter of the rows i to i + 3
        a[i] = pairs_low(b[i], b[i + 2]), a[i + 1] = pairs_high(b[i], b[i + 2]);
        a[i + 2] = pairs_low(b[i + 1], b[i + 3]), a[i + 3] = pairs_high(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {  // quarters 0 and 2, then 1 and 3
        const __m512 even_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd_top = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        const __m512 even_end = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const __m512 odd_end = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        store(out + j * out_row, _mm512_shuffle_f32x4(even_top, even_end, 0x88));
        store(out + (4 + j) * out_row, _mm512_shuffle_f32x4(odd_top, odd_end, 0x88));
        store(out + (8 + j) * out_row, _mm512_shuffle_f32x4(even_top, even_end, 0xdd));
        store(out + (12 + j) * out_row, _mm512_shuffle_f32x4(odd_top, odd_end, 0xdd));
    }
}

#else

constexpr int64_t kSide = 8;

void turn(const float* x, int64_t x_row, float* out, int64_t out_row) {
    for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) out[i * out_row + j] = x[j * x_row + i];
}

#endif

FASTPPO_INLINE void turn(const BFloat16* x, int64_t x_row, float* out, int64_t out_row) {
    float square[kSide * kSide];
    for (int j = 0; j < kSide; ++j)
        for (int i = 0; i < kSide; ++i) square[j * kSide + i] = to_float(x[j * x_row + i]);
    turn(square, kSide, out, out_row);
}

FASTPPO_INLINE void copy_line(const float* x, int64_t columns, float* out) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) store(out + j, load(x + j));
    for (; j < columns; ++j) out[j] = x[j];
}
FASTPPO_INLINE void copy_line(const BFloat16* x, int64_t columns, float* out) {
    for (int64_t j = 0; j < columns; ++j) out[j] = to_float(x[j]);
}

// out (rows, columns) = x, in float32.
template <typename T>
void pack(const T* x, int64_t row, int64_t column, int64_t rows, int64_t columns, float* out, int64_t out_row) {
    if (column == 1) {
        for (int64_t i = 0; i < rows; ++i) copy_line(x + i * row, columns, out + i * out_row);
        return;
    }
    const int64_t turned_rows = row == 1 ? rows / kSide * kSide : 0, turned = columns / kSide * kSide;
    for (int64_t i = 0; i < turned_rows; i += kSide)
        for (int64_t j = 0; j < turned; j += kSide) turn(x + i + j * column, column, out + i * out_row + j, out_row);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = i < turned_rows ? turned : 0; j < columns; ++j) out[i * out_row + j] = to_float(x[i * row + j * column]);
}

void pack_from(Operand x, int64_t i, int64_t j, int64_t rows, int64_t columns, float* out, int64_t out_row) {
    const int64_t at = i * x.row + j * x.column;
    if (x.dtype == kFloat32)
        pack(static_cast<const float*>(x.data) + at, x.row, x.column, rows, columns, out, out_row);
    else
        pack(static_cast<const BFloat16*>(x.data) + at, x.row, x.column, rows, columns, out, out_row);
}

// The block of a that comes next, in lines that the processor does not guess.
void prefetch(const float* a, int64_t a_row, int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; k += kLine) __builtin_prefetch(a + r * a_row + k, 0, 2);
}

void tile(
    Operand a, Operand b, const float* bias, int64_t rows, int64_t columns, int64_t depth, bool accumulate, float* c,
    int64_t c_row
) {
    alignas(64) float packed_a[kTileRows * kDepth];
    alignas(64) float packed_b[kDepth * kColumns];
    const bool direct = a.dtype == kFloat32 && a.column == 1;
    const int64_t a_row = direct ? a.row : kDepth;
    int64_t k = 0;
    do {
        const int64_t block = least(kDepth, depth - k), after = least(kDepth, depth - k - block);
        const float* own_a = direct ? static_cast<const float*>(a.data) + k : packed_a;
        if (!direct) pack_from(a, 0, k, rows, block, packed_a, kDepth);
        for (int64_t n = 0; n < columns; n += kColumns) {
            const int64_t width = least(kColumns, columns - n);
            if (width < kColumns) std::memset(packed_b, 0, sizeof packed_b);
            pack_from(b, k, n, block, width, packed_b, kColumns);
            const float* own_bias = bias && k + block == depth ? bias + n : nullptr;
            for (int64_t m = 0; m < rows; m += kRows) {
                const int64_t count = least(kRows, rows - m);
                if (direct && n == 0) prefetch(own_a + m * a_row + block, a_row, count, after);
                strip_of(count, std::make_integer_sequence<int, kRows>())(
                    own_a + m * a_row, a_row, packed_b, block, own_bias, width, accumulate || k > 0, c + m * c_row + n, c_row);
            }
        }
        k += block;
    } while (k < depth);
}

}  // namespace

namespace fastppo {

extern const Matmul FASTPPO_MATMUL;
const Matmul FASTPPO_MATMUL = {kColumns, tile};

}  // namespace fastppo
