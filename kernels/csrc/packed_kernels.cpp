// The table of packed.h: FASTPPO_PACKED names the one that this translation unit defines (CMakeLists.txt).
//
// Every product is C = A B by `multiply`: rows of A are read an element at a time, rows of B a panel of two vectors at a
// time. Keys and values are transposed once per sequence where they are the B of a product over the width of a head.

#include "packed.h"

#include "exp2.h"
#include "simd.h"

using namespace fastppo;

namespace {

constexpr int kRows = kLanes >= 16 ? 8 : 4;  // of C in registers
constexpr int64_t kPanel = 2 * kLanes;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

FASTPPO_INLINE int64_t most(int64_t a, int64_t b) { return b > a ? b : a; }
FASTPPO_INLINE int64_t up(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

struct Matrix {  // element (i, j) of A at i * row + j * column; of B, in panels, at j / kPanel * column + i * row + j % kPanel
    const float* data;
    int64_t row, column;
};

template <int R, int V>
FASTPPO_INLINE void tile(Matrix a, const float* b, int64_t b_row, int64_t depth, float* c, int64_t c_row, bool adds) {
    F sums[R][V];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) sums[i][j] = set(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
        F line[V];
        for (int j = 0; j < V; ++j) line[j] = load(b + k * b_row + j * kLanes);
        for (int i = 0; i < R; ++i) {
            const F x = set(a.data[i * a.row + k * a.column]);
            for (int j = 0; j < V; ++j) sums[i][j] = mul_add(x, line[j], sums[i][j]);
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < V; ++j) {
            float* place = c + i * c_row + j * kLanes;
            store(place, adds ? add(load(place), sums[i][j]) : sums[i][j]);  // sums of blocks err less than one long sum
        }
}

template <int V>
void columns(
    int64_t rows, int64_t depth, Matrix a, const float* b, int64_t b_row, float* c, int64_t c_row, bool adds
) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows, a.data += kRows * a.row, c += kRows * c_row)
        tile<kRows, V>(a, b, b_row, depth, c, c_row, adds);
    for (; i + 2 <= rows; i += 2, a.data += 2 * a.row, c += 2 * c_row) tile<2, V>(a, b, b_row, depth, c, c_row, adds);
    if (i < rows) tile<1, V>(a, b, b_row, depth, c, c_row, adds);
}

// C (rows, width) = A (rows, depth) B (depth, width), or C + A B; width a multiple of kLanes.
void multiply(
    int64_t rows, int64_t width, int64_t depth, Matrix a, Matrix b, float* c, int64_t c_row, bool adds = false
) {
    int64_t j = 0;
    for (; j + kPanel <= width; j += kPanel, b.data += b.column)
        columns<2>(rows, depth, a, b.data, b.row, c + j, c_row, adds);
    for (; j < width; j += kLanes, b.data += kLanes) columns<1>(rows, depth, a, b.data, b.row, c + j, c_row, adds);
}

// Rows first..last as the columns of panels (width, kPanel), one after the other; 0 in columns past the last.
void transpose(const float* x, int64_t x_row, int64_t rows, int64_t width, float* panels) {
    for (int64_t first = 0; first < rows; first += kPanel, panels += width * kPanel)
        for (int64_t j = 0; j < kPanel; ++j) {
            const float* line = x + (first + j) * x_row;
            if (first + j < rows)
                for (int64_t d = 0; d < width; ++d) panels[d * kPanel + j] = line[d];
            else
                for (int64_t d = 0; d < width; ++d) panels[d * kPanel + j] = 0.0f;
        }
}

FASTPPO_INLINE void keep(float* line, int64_t count, int64_t first, int64_t end, float fill) {
    for (int64_t j = 0; j < first; ++j) line[j] = fill;
    for (int64_t j = end; j < count; ++j) line[j] = fill;
}

// Scores become exponentials of their distance to the largest, which is `origin`; returns their sum.
FASTPPO_INLINE float exponentials(float* line, int64_t count, float rate, float* origin) {
    F top = set(-kInfinity), mass = set(0.0f);
    for (int64_t j = 0; j < count; j += kLanes) top = max(load(line + j), top);
    *origin = largest(top);
    const F lowest = set(-127.0f / rate), from = set(*origin), k = set(rate);
    for (int64_t j = 0; j < count; j += kLanes) {
        const F weight = exp2_of<6>(max(lowest, sub(load(line + j), from)), k);
        store(line + j, weight);
        mass = add(mass, weight);
    }
    return sum(mass);
}

void forward(const Sequence& s, int64_t begin, int64_t end, float* scratch) {
    const int64_t lowest = most(0, begin + 1 - s.window) / kPanel * kPanel, length = up(end - lowest);
    float *panels = scratch, *scores = scratch + length * s.width;
    const float rate = s.scale * kLog2E;
    transpose(s.k + lowest * s.k_row, s.k_row, end - lowest, s.width, panels);
    for (int64_t g = 0; g < s.group; ++g)
        for (int64_t i = begin; i < end; i += kRows) {
            const int64_t rows = least(kRows, end - i), first = most(0, i + 1 - s.window) / kPanel * kPanel;
            const int64_t seen = i + rows - first, count = up(seen);
            float* out = s.out + i * s.out_row + g * s.width;
            multiply(rows, count, s.width, {s.q + i * s.q_row + g * s.q_head, s.q_row, 1},
                     {panels + (first - lowest) * s.width, kPanel, s.width * kPanel}, scores, count);
            float *origins = s.origins + g * s.origins_head + i, *shares = s.shares + g * s.origins_head + i;
            for (int64_t r = 0; r < rows; ++r) {
                float* line = scores + r * count;
                keep(line, count, most(0, i + r + 1 - s.window) - first, i + r + 1 - first, -kInfinity);
                shares[r] = 1.0f / exponentials(line, count, rate, origins + r);
            }
            multiply(rows, s.width, seen, {scores, count, 1}, {s.v + first * s.v_row, s.v_row, kPanel}, out, s.out_row);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t d = 0; d < s.width; d += kLanes)
                    store(out + r * s.out_row + d, mul(load(out + r * s.out_row + d), set(shares[r])));
        }
}

FASTPPO_INLINE float dot(const float* a, const float* b, int64_t count) {
    F sums = set(0.0f);
    for (int64_t j = 0; j < count; j += kLanes) sums = mul_add(load(a + j), load(b + j), sums);
    return sum(sums);
}

// Gradients through one block of scores: queries i.., keys j.. of head g.
void block(
    const Sequence& s, int64_t g, int64_t i, int64_t rows, int64_t j, int64_t keys, const float* k_panels,
    const float* v_panels, const float* dots, float* weights, float* slopes
) {
    const int64_t count = up(keys);
    const float rate = s.scale * kLog2E;
    const Matrix q = {s.q + i * s.q_row + g * s.q_head, s.q_row, 1};
    const int64_t at = i * s.out_row + g * s.width;
    const Matrix dout = {s.dout + at, s.out_row, 1};
    multiply(rows, count, s.width, q, {k_panels + j * s.width, kPanel, s.width * kPanel}, weights, count);
    multiply(rows, count, s.width, dout, {v_panels + j * s.width, kPanel, s.width * kPanel}, slopes, count);
    const F lowest = set(-127.0f / rate), k = set(rate), scale = set(s.scale);
    for (int64_t r = 0; r < rows; ++r) {
        float *line = weights + r * count, *slope = slopes + r * count;
        const int64_t first = least(keys, most(0, i + r + 1 - s.window - j)), end = most(0, least(keys, i + r + 1 - j));
        keep(line, count, first, end, -kInfinity);
        const int64_t query = g * s.origins_head + i + r;
        const F from = set(s.origins[query]), share = set(s.shares[query]), mean = set(dots[r]);
        for (int64_t t = 0; t < count; t += kLanes) {
            const F weight = mul(exp2_of<6>(max(lowest, sub(load(line + t), from)), k), share);
            store(line + t, weight);
            store(slope + t, mul(mul(weight, sub(load(slope + t), mean)), scale));
        }
    }
    multiply(keys, s.width, rows, {weights, 1, count}, {s.dout + at, s.out_row, kPanel}, s.dv + j * s.dk_row, s.dk_row, true);
    multiply(keys, s.width, rows, {slopes, 1, count}, {q.data, s.q_row, kPanel}, s.dk + j * s.dk_row, s.dk_row, true);
    multiply(rows, s.width, keys, {slopes, count, 1}, {s.k + j * s.k_row, s.k_row, kPanel}, s.dq + at, s.out_row, true);
}

void backward(const Sequence& s, float* scratch) {
    const int64_t length = up(s.length);
    float *k_panels = scratch, *v_panels = k_panels + length * s.width;
    float *weights = v_panels + length * s.width, *slopes = weights + kBlockQueries * kBlockKeys;
    transpose(s.k, s.k_row, s.length, s.width, k_panels);
    transpose(s.v, s.v_row, s.length, s.width, v_panels);
    for (int64_t g = 0; g < s.group; ++g)
        for (int64_t i = 0; i < s.length; i += kBlockQueries) {
            const int64_t rows = least(kBlockQueries, s.length - i), end = i + rows;
            float dots[kBlockQueries];
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = (i + r) * s.out_row + g * s.width;
                dots[r] = dot(s.dout + at, s.out + at, s.width);
                std::memset(s.dq + at, 0, s.width * sizeof(float));
            }
            for (int64_t j = most(0, i + 1 - s.window) / kPanel * kPanel; j < end; j += kBlockKeys)
                block(s, g, i, rows, j, least(kBlockKeys, end - j), k_panels, v_panels, dots, weights, slopes);
        }
}

}  // namespace

namespace fastppo {

extern const Packed FASTPPO_PACKED;
const Packed FASTPPO_PACKED = {forward, backward};

}  // namespace fastppo
