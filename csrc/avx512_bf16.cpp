// AVX-512 with bfloat16: what avx512.cpp does, but products of bfloat16 by an instruction that adds two to each of 16
// sums, at the rate of multiply-adds, so twice their work. Real float32 is faster than three such products.
//
// Tile in registers as there: 8 rows by 3 vectors of 16 sums.

#include "instruction_sets.h"

#ifdef CLIPFAST_X86
#include <immintrin.h>
CLIPFAST_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include "pairs_entry.h"

namespace clipfast {

namespace {

struct Avx512Bf16 : Avx512Halves {
    static constexpr int kPairVectors = 3, kPairRows = 8;
    static constexpr bool kSplitsFloat32 = false;
    struct Session {};

    template <int NV>
    static CLIPFAST_INLINE void clear(V (&sum)[kPairRows][NV]) {
#pragma GCC unroll 16
        for (int i = 0; i < kPairRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[i][v] = V{};
    }

    // sum_iv += the products of A_ik and B_kv, pairs in pairs: see PairTile::multiply.
    template <int NV>
    static CLIPFAST_INLINE void add(V (&sum)[kPairRows][NV], index_t runs, index_t pairs, const std::uint32_t* a,
                                    index_t a_row, index_t a_run, const std::uint32_t* b) {
        for (index_t run = 0; run < runs; ++run, a += a_run)
            for (index_t k = 0; k < pairs; ++k, b += NV * 16) {
                __m512bh row[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) row[v] = as<__m512bh>(load_vector<Pairs>(b + v * 16));
#pragma GCC unroll 16
                for (int i = 0; i < kPairRows; ++i) {
                    const auto term = as<__m512bh>(Pairs{} + a[i * a_row + k]);
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], term, row[v]);
                }
            }
    }

    template <int NV>
    static CLIPFAST_INLINE void finish(V (&)[kPairRows][NV]) {}
};

bool available() { return avx512().available() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

Kernels avx512_bf16() { return PairEntry<Avx512Bf16>::kernels("avx512_bf16", available); }

}  // namespace clipfast
CLIPFAST_TARGET_END
#endif
