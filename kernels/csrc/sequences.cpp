// Ops over packed sequences: GAE, token rewards, moments for whitening. All sums run in double.
// Letters: B sequences, N packed tokens.

#include <algorithm>
#include <cstring>

#include "loops.h"
#include "ppo_token.h"
#include "threads.h"

namespace fastppo {
namespace {

constexpr int64_t kGaeElements = 4;     // elements of a row that take as long as a token
constexpr int64_t kRewardElements = 32;
constexpr int64_t kHoledBlock = 1024;   // tokens that are packed at a time

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

struct Gae {
    const Loops& loops;
    const float *rewards, *values;
    const uint8_t* mask;
    double gamma, decay;
    float *advantages, *returns;

    // n actions in a row.
    void actions(const float* reward, const float* value, int64_t n, Step* next, float* advantage, float* ret) const {
        for (int64_t size; n > 0; n -= size) {
            size = std::min(kGaeBlock, n);
            const int64_t i = n - size;
            loops.gae(reward + i, value + i, size, gamma, decay, next, advantage + i, ret + i);
        }
    }

    // Tokens first .. first + n - 1, some of them no actions: the actions are packed together and spread out again.
    void holed_block(int64_t first, int64_t n, Step* next) const {
        constexpr int64_t size = kHoledBlock + kLooseEnd;
        float reward[size], value[size], advantage[size], ret[size];
        const int64_t packed = loops.pack(rewards + first, mask + first, n, reward);
        loops.pack(values + first, mask + first, n, value);
        actions(reward, value, packed, next, advantage, ret);
        loops.unpack(advantage, mask + first, n, advantages + first);
        loops.unpack(ret, mask + first, n, returns + first);
    }

    void sequence(int64_t start, int64_t end, double bootstrap) const {
        Step next{bootstrap, 0.0};
        for (int64_t n; end > start; end -= n) {
            n = std::min(kHoledBlock, end - start);
            const int64_t first = end - n;
            const bool whole = !mask || !std::memchr(mask + first, 0, n);
            if (whole)
                actions(rewards + first, values + first, n, &next, advantages + first, returns + first);
            else
                holed_block(first, n, &next);
        }
    }
};

double kl_estimate(double difference, int estimator) {
    if (estimator == 1) return difference;
    return estimator == 2 ? 0.5 * difference * difference : k3(-difference);
}

struct Rewards {
    const float *scores, *logprobs, *ref_logprobs;  // ref_logprobs null: no penalty
    const uint8_t* mask;
    bool per_token;
    double kl_coef;
    int estimator;
    float* rewards;

    void sequence(int64_t b, int64_t start, int64_t end) const {
        double score = per_token ? 0.0 : scores[b];  // what the next action back in time is credited with
        for (int64_t t = end - 1; t >= start; --t) {
            if (mask && !mask[t]) {
                rewards[t] = 0.0f;
                continue;
            }
            double reward = per_token ? scores[t] : score;
            if (ref_logprobs) reward -= kl_coef * kl_estimate(double{logprobs[t]} - ref_logprobs[t], estimator);
            rewards[t] = static_cast<float>(reward);
            score = 0.0;
        }
    }
};

// What a piece of a loop over sequences should think one of them costs: as much as the average one.
int64_t elements_of(int64_t num_tokens, int64_t num_sequences, int64_t per_token) {
    return num_sequences > 0 ? per_token * num_tokens / num_sequences : 1;
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
    float* returns,             // (N,)
    int isa,
    int num_threads
) {
    using namespace fastppo;
    if (!rises(cu_seqlens, num_sequences, num_tokens)) return 1;
    clear_outside(cu_seqlens, num_sequences, num_tokens, advantages);
    clear_outside(cu_seqlens, num_sequences, num_tokens, returns);
    const Gae x{*instruction_set(isa).loops, rewards, values, mask, gamma, gamma * lam, advantages, returns};
    const int64_t elements = elements_of(num_tokens, num_sequences, kGaeElements);
    parallel_for(num_sequences, elements, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            x.sequence(cu_seqlens[b], cu_seqlens[b + 1], bootstrap ? bootstrap[b] : 0.0);
    });
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
    float* rewards,              // (N,)
    int num_threads
) {
    using namespace fastppo;
    if (!rises(cu_seqlens, num_sequences, num_tokens)) return 1;
    clear_outside(cu_seqlens, num_sequences, num_tokens, rewards);
    const Rewards x{scores, logprobs, kl_coef != 0.0 ? ref_logprobs : nullptr, mask, scores_per_token != 0,
                    kl_coef, estimator, rewards};
    const int64_t elements = elements_of(num_tokens, num_sequences, kRewardElements);
    parallel_for(num_sequences, elements, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) x.sequence(b, cu_seqlens[b], cu_seqlens[b + 1]);
    });
    return 0;
}

// Count, mean and sum of squared deviations of the masked values: blocks of one size, merged in their order.
void fastppo_moments(
    int64_t num_values,
    const float* values,  // (N,)
    const uint8_t* mask,  // (N,) or null: all
    double* blocks,       // (ceil(N / 1024), 3) scratch
    double* out,          // (3,)
    int isa,
    int num_threads
) {
    using namespace fastppo;
    const Loops& loops = *instruction_set(isa).loops;
    Moments* made = reinterpret_cast<Moments*>(blocks);
    const int64_t num_blocks = (num_values + kMomentsBlock - 1) / kMomentsBlock;
    parallel_for(num_blocks, kMomentsBlock, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t i = b * kMomentsBlock, n = std::min(kMomentsBlock, num_values - i);
            made[b] = loops.moments(values + i, mask ? mask + i : nullptr, n);
        }
    });
    Moments all{0.0, 0.0, 0.0};
    for (int64_t b = 0; b < num_blocks; ++b) all = merged(all, made[b]);
    out[0] = all.count, out[1] = all.mean, out[2] = all.square;
}

}  // extern "C"
