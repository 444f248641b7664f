// AVX-512: 32 registers of 512 bits, two fused multiply-adds per cycle, two loads.
//
// Tile in registers: 8 rows by 3 vectors of 16 float32 (8 float64): 24 sums, 3 vectors of B, 1 of A = 28 registers.
// 24 multiply-adds take 12 cycles and need 11 loads of the 24 that fit.

#include "instruction_sets.h"

#ifdef CLIPFAST_X86
CLIPFAST_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#include "entry.h"

namespace clipfast {

namespace {

struct Avx512 {
    static constexpr int kVectorBytes = 64;
    static constexpr int kRows = 8;
};

bool available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

Kernels avx512() { return Entry<Avx512>::kernels("avx512", available); }

}  // namespace clipfast
CLIPFAST_TARGET_END
#endif
