// The row ops of the CPU: log-probability, entropy, PPO and the gradient of the logits, two sweeps per row.

#include "rows.h"

#include <cmath>
#include <cstring>

#include "ppo_token.h"
#include "threads.h"

namespace fastppo {
namespace {

constexpr double kLog2E = 1.44269504088896340736;
constexpr int64_t kTokenElements = 64;  // elements of a row that take as long as the objective of a token

int64_t element_size(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

// One row between its two sweeps: everything that is known of its softmax.
struct Row {
    const Batch& batch;
    const RowKernels& kernels;
    Scale scale;
    const char* logits;
    int64_t target;
    RowSums sums;
    double above;  // d of the target
    double mean;   // of d; 0 without entropy
    float logprob;
    float entropy;

    Row(const Batch& b, int64_t i) : batch(b), kernels(*instruction_set(b.isa).rows), target(b.targets[i]) {
        scale.log2_scale = static_cast<float>(kLog2E / b.temperature);
        scale.softcap = static_cast<float>(b.softcap);
        scale.inverse_softcap = b.softcap != 0.0 ? static_cast<float>(1.0 / b.softcap) : 0.0f;
        logits = static_cast<const char*>(b.logits) + i * b.logits_stride * element_size(b.logits_dtype);
    }

    // First sweep. The target's logit is taken relative to the maximum before anything else happens to it.
    void measure(bool with_entropy) {
        const SumSweep sweep = kernels.sum[batch.logits_dtype][with_entropy][batch.softcap != 0.0];
        sums = sweep(logits, batch.vocab_size, target, scale);
        above = static_cast<double>(sums.target) - sums.shift;
        mean = with_entropy ? sums.weighted_sum / sums.sum : 0.0;
        logprob = static_cast<float>(above / batch.temperature - std::log(sums.sum));
        entropy = with_entropy ? static_cast<float>(std::log(sums.sum) - mean / batch.temperature) : 0.0f;
    }

    // Second sweep: the gradient of c log p_target + h H, with d relative to the maximum,
    //   dlogits_j = (c ([j = target] - p_j) - h p_j (d_j - E[d]) / temperature) / temperature * (1 - tanh^2)
    // The target's own column holds a difference, made in double from the logit read before it is written over.
    void differentiate(int64_t i, float dlogprob, float dentropy) {
        const bool with_entropy = dentropy != 0.0f;
        const double constant = dlogprob / batch.temperature, slope = dentropy / (batch.temperature * batch.temperature);
        const double p = std::exp(above / batch.temperature) / sums.sum;
        const double entropy_part = p == 0.0 || !with_entropy ? 0.0 : -slope * p * (above - mean);
        const double tanh = batch.softcap != 0.0 ? sums.target / batch.softcap : 0.0;
        const double at_target = (constant * (1.0 - p) + entropy_part) * (1.0 - tanh * tanh);
        const Gradient gradient = {
            sums.shift,
            static_cast<float>((slope * mean - constant) / sums.sum),
            static_cast<float>(-slope / sums.sum),
            static_cast<float>(at_target),
            target,
        };
        const bool cap = batch.softcap != 0.0;
        kernels.gradient[batch.logits_dtype][batch.dlogits_dtype][with_entropy][cap](
            logits, dlogits(i), batch.vocab_size, scale, gradient);
    }

    void* dlogits(int64_t i) const {
        return static_cast<char*>(batch.dlogits) + i * batch.dlogits_stride * element_size(batch.dlogits_dtype);
    }
};

// Calls body(i) for every row, in parallel.
template <class Body>
void for_each(int64_t num_rows, int64_t elements, int num_threads, Body body) {
    parallel_for(num_rows, elements, num_threads, [&](int, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
    });
}

template <class Body>
void for_each_row(const Batch& batch, Body body) {
    for_each(batch.num_rows, batch.vocab_size, batch.num_threads, body);
}

// First row whose target is no column, or -1. Rows of weight 0 may hold anything.
int64_t first_bad_target(const Batch& batch, const float* weights) {
    for (int64_t i = 0; i < batch.num_rows; ++i) {
        if (weights && weights[i] == 0.0f) continue;
        if (batch.targets[i] < 0 || batch.targets[i] >= batch.vocab_size) return i;
    }
    return -1;
}

}  // namespace
}  // namespace fastppo

using namespace fastppo;

extern "C" {

// Every function below returns -1, or the first row whose target lies outside [0, V), having written nothing.

// The (R, 16) table and, where batch.dlogits is given, the gradient of the summed loss.
int64_t fastppo_ppo_rows(const Batch* batch, const PPORows* rows, const PPOSettings* settings, float* table) {
    const int64_t bad = first_bad_target(*batch, rows->weights);
    if (bad >= 0) return bad;
    for_each_row(*batch, [&](int64_t i) {
        Row row(*batch, i);
        float* line = table + i * kPPOColumns;
        if (rows->weights[i] == 0.0f) {
            std::memset(line, 0, kPPOColumns * sizeof(float));
            if (batch->dlogits) std::memset(row.dlogits(i), 0, batch->vocab_size * element_size(batch->dlogits_dtype));
            return;
        }
        row.measure(batch->entropy);
        const RowGradient gradient = ppo_token(row.logprob, row.entropy, i, *rows, *settings, line);
        if (batch->dlogits) row.differentiate(i, gradient.dlogprob, gradient.dentropy);
    });
    return -1;
}

// (R,) log-probabilities and, where wanted, (R,) entropies.
int64_t fastppo_logprob_rows(const Batch* batch, float* logprobs, float* entropy) {
    const int64_t bad = first_bad_target(*batch, nullptr);
    if (bad >= 0) return bad;
    for_each_row(*batch, [&](int64_t i) {
        Row row(*batch, i);
        row.measure(batch->entropy);
        logprobs[i] = row.logprob;
        if (entropy) entropy[i] = row.entropy;
    });
    return -1;
}

// dlogits of given d logprob (R,) and d entropy (R,) or null.
int64_t fastppo_logprob_rows_backward(const Batch* batch, const float* dlogprobs, const float* dentropy) {
    const int64_t bad = first_bad_target(*batch, nullptr);
    if (bad >= 0) return bad;
    for_each_row(*batch, [&](int64_t i) {
        Row row(*batch, i);
        row.measure(dentropy != nullptr);
        row.differentiate(i, dlogprobs[i], dentropy ? dentropy[i] : 0.0f);
    });
    return -1;
}

// The (R, 16) table from (R,) log-probabilities and entropies (or null).
void fastppo_ppo_tokens(
    int64_t num_rows, const float* logprobs, const float* entropy, const PPORows* rows, const PPOSettings* settings,
    int num_threads, float* table
) {
    for_each(num_rows, kTokenElements, num_threads, [&](int64_t i) {
        ppo_token(logprobs[i], entropy ? entropy[i] : 0.0f, i, *rows, *settings, table + i * kPPOColumns);
    });
}

}  // extern "C"
