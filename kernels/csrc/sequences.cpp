// Ops over packed sequences: GAE, token rewards, moments for whitening. All sums run in double.
// Letters: B sequences, N packed tokens.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "portable.h"

namespace fastppo {
namespace {

constexpr int64_t kGaeBlock = 64;
constexpr int64_t kStride = 8;
constexpr int64_t kMomentsBlock = 1024;
constexpr int64_t kMomentsLanes = 32;
constexpr double kExponentLimit = 20.0;  // reference.EXPONENT_LIMIT

bool rises(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens) {
    int64_t previous = 0;
    for (int64_t b = 0; b <= num_sequences; ++b) {
        if (cu_seqlens[b] < previous || cu_seqlens[b] > num_tokens) return false;
        previous = cu_seqlens[b];
    }
    return true;
}

void clear_outside(const int32_t* cu_seqlens, int64_t num_sequences, int64_t num_tokens, float* out) {
    std::fill(out, out + cu_seqlens[0], 0.0f);
    std::fill(out + cu_seqlens[num_sequences], out + num_tokens, 0.0f);
}

struct Step {  // what the recurrence carries back in time from the next action
    double value, advantage;
};

// n <= kGaeBlock actions in a row, all at once: A_t = delta_t + c A_{t+1} unrolled to A_t = x_t + c^8 A_{t+8} with
// x_t = delta_t + c delta_{t+1} + ... + c^7 delta_{t+7}, so that nothing waits for the element before it.
FASTPPO_CLONES void gae_block(
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

struct Gae {
    const float *rewards, *values;
    const uint8_t* mask;
    double gamma, decay;
    float *advantages, *returns;

    // Tokens first .. first + n - 1, some of them no actions: the actions are packed together and spread out again.
    void holed_block(int64_t first, int64_t n, Step* next) const {
        float reward[kGaeBlock], value[kGaeBlock], advantage[kGaeBlock + 1], ret[kGaeBlock + 1];
        int64_t actions = 0;
        for (int64_t t = first; t < first + n; ++t) {
            reward[actions] = rewards[t], value[actions] = values[t];
            actions += mask[t] != 0;
        }
        if (actions) gae_block(reward, value, actions, gamma, decay, next, advantage, ret);
        advantage[kGaeBlock] = ret[kGaeBlock] = 0.0f;  // where tokens that are no actions read: no branch to mispredict
        for (int64_t t = first, i = 0; t < first + n; ++t) {
            const int64_t source = mask[t] ? i : kGaeBlock;
            advantages[t] = advantage[source], returns[t] = ret[source];
            i += mask[t] != 0;
        }
    }

    void sequence(int64_t start, int64_t end, double bootstrap) const {
        Step next{bootstrap, 0.0};
        for (int64_t n; end > start; end -= n) {
            n = std::min(kGaeBlock, end - start);
            const int64_t first = end - n;
            const bool whole = !mask || !std::memchr(mask + first, 0, n);
            if (whole)
                gae_block(rewards + first, values + first, n, gamma, decay, &next, advantages + first, returns + first);
            else
                holed_block(first, n, &next);
        }
    }
};

// exp(x) - 1 - x with the exponent bounded as in reference.k3, of the same value at +-inf (NaN).
double k3(double x) {
    const double excess = x - std::min(std::max(x, -kExponentLimit), kExponentLimit);
    return std::expm1(x - excess) - x;
}

double kl_estimate(double difference, int estimator) {
    if (estimator == 1) return difference;
    return estimator == 2 ? 0.5 * difference * difference : k3(-difference);
}

struct Moments {
    double count, mean, square;  // square: sum of the squared deviations from the mean
};

// Two passes over n <= kMomentsBlock values: equal numbers have a square of exactly 0.
FASTPPO_CLONES Moments moments_of_block(const float* values, const uint8_t* mask, int64_t n) {
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
    const double mean = fold<kMomentsLanes>(lanes, Add()) / static_cast<double>(count);
    for (int64_t i = 0; i < n; ++i) deviations[i] -= mean;
    if (mask)
        for (int64_t i = 0; i < n; ++i) deviations[i] = mask[i] ? deviations[i] : 0.0;
    std::fill(lanes, lanes + kMomentsLanes, 0.0);
    for (int64_t i = 0; i < kMomentsBlock; i += kMomentsLanes)
        for (int64_t j = 0; j < kMomentsLanes; ++j) lanes[j] += deviations[i + j] * deviations[i + j];
    return {static_cast<double>(count), mean, fold<kMomentsLanes>(lanes, Add())};
}

// Chan, Golub and LeVeque (1983): moments of the union of two disjoint sets.
Moments merged(const Moments& a, const Moments& b) {
    if (!b.count) return a;
    const double count = a.count + b.count, apart = b.mean - a.mean;
    return {count, a.mean + apart * (b.count / count), a.square + b.square + apart * apart * (a.count * b.count / count)};
}

}  // namespace
}  // namespace fastppo

extern "C" {

// Generalized advantage estimation, one backward sweep per sequence.
//
//   delta_t = r_t + gamma * V_next(t) - V_t       A_t = delta_t + gamma * lam * A_next(t)       R_t = A_t + V_t
//
// next(t) is the next action of the same sequence; tokens that are no action, or in no sequence, get 0. Returns 0, or 1
// (having written nothing) if cu_seqlens does not rise within [0, N].
int fastppo_gae(
    int64_t num_sequences,
    int64_t num_tokens,
    const float* rewards,       // (N,)
    const float* values,        // (N,)
    const int32_t* cu_seqlens,  // (B+1,)
    const uint8_t* mask,        // (N,) or null: every token is an action
    const float* bootstrap,     // (B,) or null: 0
    double gamma,
    double lam,
    float* advantages,          // (N,)
    float* returns              // (N,)
) {
    using namespace fastppo;
    if (!rises(cu_seqlens, num_sequences, num_tokens)) return 1;
    clear_outside(cu_seqlens, num_sequences, num_tokens, advantages);
    clear_outside(cu_seqlens, num_sequences, num_tokens, returns);
    const Gae x{rewards, values, mask, gamma, gamma * lam, advantages, returns};
    for (int64_t b = 0; b < num_sequences; ++b)
        x.sequence(cu_seqlens[b], cu_seqlens[b + 1], bootstrap ? bootstrap[b] : 0.0);
    return 0;
}

// rewards_t = score - kl_coef * KL estimate at actions, 0 elsewhere. Returns as fastppo_gae does.
int fastppo_token_rewards(
    int64_t num_sequences,
    int64_t num_tokens,
    const float* scores,         // (N,) if scores_per_token, else (B,), credited to the last action of each sequence
    int scores_per_token,
    const float* logprobs,       // (N,)
    const float* ref_logprobs,   // (N,) or null: no penalty
    const int32_t* cu_seqlens,   // (B+1,)
    const uint8_t* mask,         // (N,) or null: every token is an action
    double kl_coef,
    int estimator,               // 1, 2 or 3 for k1, k2 or k3
    float* rewards               // (N,)
) {
    using namespace fastppo;
    if (!rises(cu_seqlens, num_sequences, num_tokens)) return 1;
    clear_outside(cu_seqlens, num_sequences, num_tokens, rewards);
    const bool penalised = ref_logprobs && kl_coef != 0.0;
    for (int64_t b = 0; b < num_sequences; ++b) {
        double score = scores_per_token ? 0.0 : scores[b];  // what the next action back in time is credited with
        for (int64_t t = int64_t{cu_seqlens[b + 1]} - 1; t >= cu_seqlens[b]; --t) {
            if (mask && !mask[t]) {
                rewards[t] = 0.0f;
                continue;
            }
            double reward = scores_per_token ? scores[t] : score;
            if (penalised) reward -= kl_coef * kl_estimate(double{logprobs[t]} - ref_logprobs[t], estimator);
            rewards[t] = static_cast<float>(reward);
            score = 0.0;
        }
    }
    return 0;
}

// Count, mean and sum of squared deviations of the masked values: blocks of one size, merged in their order.
void fastppo_moments(
    int64_t num_values,
    const float* values,  // (N,)
    const uint8_t* mask,  // (N,) or null: all
    double* out           // (3,)
) {
    using namespace fastppo;
    Moments all{0.0, 0.0, 0.0};
    for (int64_t i = 0; i < num_values; i += kMomentsBlock) {
        const int64_t n = std::min(kMomentsBlock, num_values - i);
        all = merged(all, moments_of_block(values + i, mask ? mask + i : nullptr, n));
    }
    out[0] = all.count, out[1] = all.mean, out[2] = all.square;
}

}  // extern "C"
