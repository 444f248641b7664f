// AVX2 and FMA: 16 registers of 256 bits, two fused multiply-adds per cycle, two loads.
//
// Tile in registers: 4 rows by 3 vectors of 8 float32 (4 float64): 12 sums, 3 vectors of B, 1 of A = 16 registers.
// 12 multiply-adds take 6 cycles and need 7 loads of the 12 that fit; 10 independent sums hide their latency of 4-5
// cycles.

#include "instruction_sets.h"

#ifdef CLIPFAST_X86
CLIPFAST_TARGET("avx2,fma,f16c")
#include "entry.h"

namespace clipfast {

namespace {

struct Avx2 {
    static constexpr int kVectorBytes = 32;
    static constexpr int kRows = 4;
};

bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

Kernels avx2() { return Entry<Avx2>::kernels("avx2", available); }

}  // namespace clipfast
CLIPFAST_TARGET_END
#endif
