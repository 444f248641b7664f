// The portable instruction set: what the compiler's baseline has, 128-bit vectors on x86-64 (SSE2) and Arm (NEON).
//
// Units: one multiplier and one adder (SSE2 has no fused multiply-add), or two fused ones on Arm.
// Tile in registers: 4 rows by 3 vectors of 4 float32: 12 sums, 3 vectors of B, 1 of A = 16 registers, all that SSE2
// has; float64: 2 rows by 3 vectors of 2.

#include "instruction_sets.h"
#include "entry.h"

namespace clipfast {

namespace {

struct Portable {
    static constexpr int kVectorBytes = 16;
    static constexpr int kRows = 4;
};

}  // namespace

Kernels portable() {
    return Entry<Portable>::kernels("portable", [] { return true; });
}

}  // namespace clipfast
