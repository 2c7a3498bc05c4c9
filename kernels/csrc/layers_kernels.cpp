// The table of layers.h: FASTPPO_LAYERS names the one that this translation unit defines (CMakeLists.txt).

#include "layers.h"

#include "exp2.h"
#include "simd.h"

using namespace fastppo;

namespace {

constexpr float kLog2E = 1.44269504088896341f;

FASTPPO_INLINE F some(const float* p, int64_t count) {  // 0 past the end
    return count >= kLanes ? load(p) : load_first(p, static_cast<int>(count), 0.0f);
}
FASTPPO_INLINE void put(float* p, int64_t count, F x) {
    if (count >= kLanes)
        store(p, x);
    else
        store_first(p, static_cast<int>(count), x);
}

void norm(const float* x, const float* weight, int64_t rows, int64_t width, float eps, float* out, float* rates) {
    for (int64_t r = 0; r < rows; ++r, x += width, out += width) {
        F squares = set(0.0f);
        for (int64_t i = 0; i < width; i += kLanes) {
            const F v = some(x + i, width - i);
            squares = mul_add(v, v, squares);
        }
        rates[r] = static_cast<float>(1.0 / __builtin_sqrt(total(squares) / static_cast<double>(width) + eps));
        for (int64_t i = 0; i < width; i += kLanes)
            put(out + i, width - i, mul(some(weight + i, width - i), mul(some(x + i, width - i), set(rates[r]))));
    }
}

// With n = x rate: dx = rate (g - n mean(g n)) for g = weight dout, and dweight = sum of dout n.
void norm_backward(
    const float* dout, const float* x, const float* weight, const float* rates, int64_t rows, int64_t width, float* dx,
    float* dweight
) {
    std::memset(dweight, 0, width * sizeof(float));
    for (int64_t r = 0; r < rows; ++r, dout += width, x += width, dx += width) {
        const F rate = set(rates[r]);
        F dots = set(0.0f);
        for (int64_t i = 0; i < width; i += kLanes) {
            const F slope = mul(some(dout + i, width - i), mul(some(x + i, width - i), rate));
            put(dweight + i, width - i, add(some(dweight + i, width - i), slope));
            dots = mul_add(slope, some(weight + i, width - i), dots);
        }
        const F mean = set(static_cast<float>(-total(dots) / static_cast<double>(width)));
        for (int64_t i = 0; i < width; i += kLanes) {
            const F g = mul(some(weight + i, width - i), some(dout + i, width - i));
            put(dx + i, width - i, mul(rate, mul_add(mul(some(x + i, width - i), rate), mean, g)));
        }
    }
}

FASTPPO_INLINE F sigmoid(F x) {  // from the exponential of -|x|, which does not overflow
    const F lowest = set(-127.0f / kLog2E);
    const F small = exp2_of<6>(max(lowest, sub(set(0.0f), max(sub(set(0.0f), x), x))), set(kLog2E));
    const F share = div(set(1.0f), add(set(1.0f), small));
    return x >= set(0.0f) ? share : mul(small, share);
}

void gated(const float* gate, const float* up, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const F x = some(gate + i, n - i);
        put(out + i, n - i, mul(mul(x, sigmoid(x)), some(up + i, n - i)));
    }
}

void gated_backward(const float* dout, const float* gate, const float* up, int64_t n, float* dgate, float* dup) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const F x = some(gate + i, n - i), d = some(dout + i, n - i), share = sigmoid(x), made = mul(x, share);
        const F slope = mul_add(made, sub(set(1.0f), share), share);  // of x sigmoid(x)
        put(dgate + i, n - i, mul(mul(d, some(up + i, n - i)), slope));
        put(dup + i, n - i, mul(d, made));
    }
}

void rotate(
    const float* x, int64_t x_row, int64_t x_head, const float* cos, const float* sin, int64_t rows, int64_t heads,
    int64_t width, bool back, float* out
) {
    const int64_t half = width / 2;
    for (int64_t r = 0; r < rows; ++r, cos += width, sin += width)
        for (int64_t h = 0; h < heads; ++h, out += width) {
            const float* line = x + r * x_row + h * x_head;
            for (int64_t i = 0; i < half; i += kLanes) {
                const int64_t left = half - i;
                const F a = some(line + i, left), b = some(line + half + i, left);
                const F ac = mul(a, some(cos + i, left)), bd = mul(b, some(cos + half + i, left));
                const F s = some(sin + i, left), t = some(sin + half + i, left);
                put(out + i, left, back ? mul_add(b, t, ac) : sub(ac, mul(b, s)));
                put(out + half + i, left, back ? sub(bd, mul(a, s)) : mul_add(a, t, bd));
            }
        }
}

}  // namespace

namespace fastppo {

extern const Layers FASTPPO_LAYERS;
const Layers FASTPPO_LAYERS = {norm, norm_backward, gated, gated_backward, rotate};

}  // namespace fastppo
