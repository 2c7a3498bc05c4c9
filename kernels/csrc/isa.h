// The instruction sets that the kernels are compiled for, and the table of kernels of each. Only plain data and pointers
// to functions cross from a translation unit of one instruction set to another.

#pragma once

#include <cstdint>

namespace fastppo {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

struct RowKernels;  // rows.h
struct Loops;       // loops.h
struct Attention;   // attention.h
struct Packed;      // packed.h
struct Layers;      // layers.h
struct Matmul;      // matmul.h

struct InstructionSet {
    const char* name;  // what FASTPPO_ISA takes
    bool (*supported)();
    const RowKernels* rows;
    const Loops* loops;
    const Attention* attention;
    const Packed* packed;
    const Layers* layers;
    const Matmul* matmul;
};

// Number 0 is the fastest; the caller has asked whether the CPU supports it.
const InstructionSet& instruction_set(int isa);

}  // namespace fastppo
