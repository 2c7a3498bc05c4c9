// The CPU ops in C++. Plain C ABI: no Python or torch headers, so one library serves every Python and torch version.
// Tensors arrive as contiguous pointers; shapes are in the comments. Letters: B sequences, N packed tokens.

#include <cstdint>

extern "C" {

int fastppo_abi_version() { return 1; }

// Generalized advantage estimation, one backward sweep per sequence, accumulated in double.
//
//   delta_t = r_t + gamma * V_next(t) - V_t       A_t = delta_t + gamma * lam * A_next(t)       R_t = A_t + V_t
//
// next(t) is the next action of the same sequence; tokens with mask 0 are no steps and keep the zeros the caller put
// into the outputs. Returns 0, or 1 (having written nothing) if cu_seqlens does not rise within [0, N].
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
    float* advantages,          // (N,) zeros on entry
    float* returns              // (N,) zeros on entry
) {
    int64_t previous = 0;
    for (int64_t b = 0; b <= num_sequences; ++b) {
        if (cu_seqlens[b] < previous || cu_seqlens[b] > num_tokens) return 1;
        previous = cu_seqlens[b];
    }
    const double decay = gamma * lam;
    for (int64_t b = 0; b < num_sequences; ++b) {
        double next_value = bootstrap ? bootstrap[b] : 0.0;
        double advantage = 0.0;
        for (int64_t t = int64_t{cu_seqlens[b + 1]} - 1; t >= cu_seqlens[b]; --t) {
            if (mask && !mask[t]) continue;
            const double value = values[t];
            advantage = rewards[t] + gamma * next_value - value + decay * advantage;
            next_value = value;
            advantages[t] = static_cast<float>(advantage);
            returns[t] = static_cast<float>(advantage + value);
        }
    }
    return 0;
}

}  // extern "C"
