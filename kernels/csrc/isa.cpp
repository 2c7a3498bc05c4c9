#include "isa.h"

namespace fastppo {

extern const RowKernels rows_portable;
extern const Loops loops_portable;
extern const Attention attention_portable;
extern const Packed packed_portable;
extern const Layers layers_portable;
extern const Matmul matmul_portable;
#if defined(__x86_64__)
extern const RowKernels rows_avx2, rows_avx512, rows_avx512_bf16;
extern const Loops loops_avx2, loops_avx512, loops_avx512_bf16;
extern const Attention attention_avx2, attention_avx512, attention_avx512_bf16;
extern const Packed packed_avx2, packed_avx512, packed_avx512_bf16;
extern const Layers layers_avx2, layers_avx512, layers_avx512_bf16;
extern const Matmul matmul_avx2, matmul_avx512, matmul_avx512_bf16;
#endif

namespace {

// Fastest first.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
    }, &rows_avx512_bf16, &loops_avx512_bf16, &attention_avx512_bf16, &packed_avx512_bf16,
     &layers_avx512_bf16, &matmul_avx512_bf16},
    {"avx512", [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
    }, &rows_avx512, &loops_avx512, &attention_avx512, &packed_avx512, &layers_avx512,
     &matmul_avx512},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &rows_avx2, &loops_avx2,
     &attention_avx2, &packed_avx2, &layers_avx2, &matmul_avx2},
#endif
    {"portable", [] { return true; }, &rows_portable, &loops_portable, &attention_portable, &packed_portable,
     &layers_portable, &matmul_portable},
};

}  // namespace

const InstructionSet& instruction_set(int isa) { return kInstructionSets[isa]; }

}  // namespace fastppo

extern "C" {

int fastppo_num_isas() { return sizeof fastppo::kInstructionSets / sizeof fastppo::kInstructionSets[0]; }
const char* fastppo_isa_name(int isa) { return fastppo::instruction_set(isa).name; }
int fastppo_isa_supported(int isa) { return fastppo::instruction_set(isa).supported(); }

}  // extern "C"
