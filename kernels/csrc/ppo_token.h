// The PPO objective of one token, the only place in C++ where it is written, and the line of numbers that is reported of
// it. In double: its cost is nothing beside a row's. See ppo_token_terms in reference.py and the columns in table.py.

#pragma once

#include <cmath>

#include "rows.h"

namespace fastppo {

constexpr double kExponentLimit = 20.0;  // |log ratio| beyond which exp() is not followed
constexpr int kPPOColumns = 16;

inline double bounded(double x) { return x > kExponentLimit ? kExponentLimit : x < -kExponentLimit ? -kExponentLimit : x; }

// exp(x) - 1 - x of a given exp(bounded(x)), which beyond the limit keeps the value it has there; near 0, where the
// difference would lose digits, by the series (its next term is below 1e-10 of the sum). x - x makes it NaN at +-inf, as
// in reference.k3.
inline double k3(double x, double exponential) {
    if (std::fabs(x) > 1.0 / 64) return exponential - 1.0 - x + (x - x);
    return x * x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720)))));
}
inline double k3(double x) { return k3(x, std::exp(bounded(x))); }
inline double k3_slope(double x) { return std::expm1(bounded(x)); }

// value and d value / d logprob
struct Term {
    double value;
    double slope;
};

// is_weight * max(-A r, -A clip(r)), for A < 0 at most is_weight * -dual_clip * A
struct Surrogate : Term {
    double ratio;
    bool clipped;
    bool dual_clipped;
};

inline Surrogate surrogate(double log_ratio, double advantage, double is_weight, const PPOSettings& s) {
    Surrogate out = {};
    out.ratio = std::exp(bounded(log_ratio));
    const double low = 1.0 - s.clip_low, high = 1.0 + s.clip_high;
    const double unclipped = -advantage * out.ratio;
    const double pessimistic = -advantage * (out.ratio < low ? low : out.ratio > high ? high : out.ratio);
    out.clipped = pessimistic > unclipped;
    out.value = out.clipped ? pessimistic : unclipped;
    out.dual_clipped = advantage < 0.0 && out.value > -s.dual_clip * advantage;
    if (out.dual_clipped) out.value = -s.dual_clip * advantage;
    const bool flat = out.clipped || out.dual_clipped || std::fabs(log_ratio) > kExponentLimit;
    out.slope = flat ? 0.0 : is_weight * unclipped;
    out.value *= is_weight;
    return out;
}

// kl_coef * the estimate of KL(policy || reference), d = logprob - reference logprob
inline Term kl_penalty(double d, const PPOSettings& s) {
    const double k2 = 0.5 * d * d;
    const double value = s.kl_estimator == 1 ? d : s.kl_estimator == 2 ? k2 : k3(-d);
    const double own_slope = s.kl_estimator == 1 ? 1.0 : s.kl_estimator == 2 ? d : -k3_slope(-d);
    return {s.kl_coef * value, s.kl_coef * (s.straight_through ? d : own_slope)};
}

// What the second sweep needs of a row, rounded as it is reported.
struct RowGradient {
    float dlogprob;
    float dentropy;
};

// Fills the (16,) line of row i and returns its derivatives. A row of weight 0 is 0 throughout.
inline RowGradient ppo_token(float logprob, float entropy, int64_t i, const PPORows& rows, const PPOSettings& s, float* line) {
    const double weight = rows.weights[i];
    for (int k = 0; k < kPPOColumns; ++k) line[k] = 0.0f;
    if (weight == 0.0) return {0.0f, 0.0f};
    const double advantage = rows.advantages[i];
    const double log_ratio = rows.old_logprobs ? static_cast<double>(logprob) - rows.old_logprobs[i] : 0.0;
    const Surrogate policy = surrogate(log_ratio, advantage, rows.is_weights ? rows.is_weights[i] : 1.0, s);
    const double ref_k1 = rows.ref_logprobs ? static_cast<double>(logprob) - rows.ref_logprobs[i] : 0.0;
    const Term kl = rows.ref_logprobs && s.kl_coef != 0.0 ? kl_penalty(ref_k1, s) : Term{0.0, 0.0};
    const double old_k3 = k3(log_ratio, policy.ratio);
    const bool old_kl = s.old_kl_coef != 0.0;
    const double old_value = old_kl ? s.old_kl_coef * old_k3 : 0.0;
    const double old_slope = old_kl ? s.old_kl_coef * k3_slope(log_ratio) : 0.0;
    const double bonus = s.entropy_coef != 0.0 ? s.entropy_coef * entropy : 0.0;
    const double numbers[kPPOColumns] = {
        weight * (policy.value + kl.value + old_value - bonus),
        weight * policy.value,
        weight * kl.value,
        logprob,
        entropy,
        policy.ratio,
        log_ratio,
        old_k3,
        policy.clipped && advantage < 0.0 ? 1.0 : 0.0,
        policy.clipped && advantage > 0.0 ? 1.0 : 0.0,
        policy.dual_clipped ? 1.0 : 0.0,
        ref_k1,
        rows.ref_logprobs ? k3(-ref_k1) : 0.0,
        rows.sampler_logprobs ? std::fabs(static_cast<double>(logprob) - rows.sampler_logprobs[i]) : 0.0,
        weight * (policy.slope + kl.slope + old_slope),
        1.0,
    };
    for (int k = 0; k < kPPOColumns; ++k) line[k] = static_cast<float>(numbers[k]);
    return {line[14], static_cast<float>(-s.entropy_coef * weight)};
}

}  // namespace fastppo
