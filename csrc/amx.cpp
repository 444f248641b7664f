// AMX with bfloat16: eight registers of 16 rows by 64 bytes. One instruction adds the products of 16 rows by 16 pairs
// and 16 pairs by 16 columns to 16 by 16 float32 sums, in 16 cycles; a load of a register takes 8 (Intel 64 and IA-32
// architectures optimization reference manual, chapter on AMX). Tested on emulated registers; not measured yet.
//
// Tile: 32 rows by 32 columns: 4 registers of sums, 2 of A and 2 of B. 4 products take 64 cycles, their 4 loads 32.

#include "instruction_sets.h"

#ifdef CLIPFAST_X86
#include <immintrin.h>
#include <sys/syscall.h>
CLIPFAST_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#include "amx_registers.h"
#include "pairs_entry.h"

namespace clipfast {

namespace {

struct Amx : Avx512Halves {
    static constexpr int kPairVectors = 2, kPairRows = 32;
    static constexpr bool kSplitsFloat32 = true;
    using Session = AmxRegisters;

    template <int NV>
    static CLIPFAST_INLINE void clear(V (&)[kPairRows][NV]) {
        for_tiles<NV>([](auto sum, auto, auto) { AmxRegisters::clear<sum.value>(); });
    }

    // See PairTile::multiply.
    template <int NV>
    static CLIPFAST_INLINE void add(V (&)[kPairRows][NV], index_t runs, index_t pairs, const std::uint32_t* a,
                                    index_t a_row, index_t a_run, const std::uint32_t* b) {
        for (index_t run = 0; run < runs; ++run, a += a_run)
            for (index_t k = 0; k < pairs; k += 16, b += 16 * NV * 16) {
                AmxRegisters::load<4>(a + k, a_row);
                AmxRegisters::load<5>(a + k + 16 * a_row, a_row);
                AmxRegisters::load<6>(b, NV * 16);
                if constexpr (NV == 2) AmxRegisters::load<7>(b + 16, NV * 16);
                for_tiles<NV>([](auto sum, auto i, auto v) {
                    AmxRegisters::add_product<sum.value, 4 + i.value, 6 + v.value>();
                });
            }
    }

    template <int NV>
    static CLIPFAST_INLINE void finish(V (&sums)[kPairRows][NV]) {
        for_tiles<NV>([&](auto sum, auto i, auto v) {
            AmxRegisters::store<sum.value>(&sums[16 * i.value][v.value], NV * 16);
        });
    }

  private:
    // Calls visit(register, i, v) for the tile's 2 by NV registers of sums.
    template <int NV, class Visit>
    static CLIPFAST_INLINE void for_tiles(const Visit& visit) {
        using std::integral_constant;
        visit(integral_constant<int, 0>{}, integral_constant<int, 0>{}, integral_constant<int, 0>{});
        visit(integral_constant<int, 1>{}, integral_constant<int, 1>{}, integral_constant<int, 0>{});
        if constexpr (NV == 2) {
            visit(integral_constant<int, 2>{}, integral_constant<int, 0>{}, integral_constant<int, 1>{});
            visit(integral_constant<int, 3>{}, integral_constant<int, 1>{}, integral_constant<int, 1>{});
        }
    }
};

bool available() {
    return avx512().available() && __builtin_cpu_supports("avx512bf16") && AmxRegisters::available();
}

}  // namespace

Kernels amx() { return PairEntry<Amx>::kernels("amx", available); }

}  // namespace clipfast
CLIPFAST_TARGET_END
#endif
