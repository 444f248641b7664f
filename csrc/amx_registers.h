// A thread's AMX registers, configured while an object lives. With CLIPFAST_EMULATE_AMX they are arrays in memory, so
// that amx.cpp can be tested on a processor without them.
#pragma once

#include "simd.h"

namespace clipfast {
namespace {

#ifndef CLIPFAST_EMULATE_AMX

class AmxRegisters {
  public:
    AmxRegisters() {
        // Intel 64 and IA-32 architectures software developer's manual, TILECFG: palette 1 has 8 registers of up to 16
        // rows of 64 bytes.
        alignas(64) struct {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~AmxRegisters() { _tile_release(); }
    AmxRegisters(const AmxRegisters&) = delete;
    AmxRegisters& operator=(const AmxRegisters&) = delete;

    // Linux gives a process the registers' state, 8 KiB per thread, when it asks (Documentation/arch/x86/xstate.rst).
    static bool available() {
        constexpr int kRequestPermission = 0x1023, kTileData = 18;
        return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }

    // Assembly, because GCC's intrinsics take no template parameter for a register's number.
    template <int r>
    static CLIPFAST_INLINE void clear() { asm volatile("tilezero %%tmm%c0" : : "i"(r)); }
    // 16 rows of 16 numbers of 32 bits, `stride` numbers apart.
    template <int r>
    static CLIPFAST_INLINE void load(const std::uint32_t* from, index_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(r), "r"(from), "r"(stride * 4) : "memory");
    }
    template <int r>
    static CLIPFAST_INLINE void store(void* to, index_t stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(r), "r"(to), "r"(stride * 4) : "memory");
    }
    template <int sum, int a, int b>
    static CLIPFAST_INLINE void add_product() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
    }
};

#else

class AmxRegisters {
    using Register = std::uint32_t[16][16];

  public:
    AmxRegisters() { configured() = true; }
    ~AmxRegisters() { configured() = false; }
    AmxRegisters(const AmxRegisters&) = delete;
    AmxRegisters& operator=(const AmxRegisters&) = delete;

    static bool available() { return true; }

    template <int r>
    static void clear() { std::memset(get(r), 0, sizeof(Register)); }
    template <int r>
    static void load(const std::uint32_t* from, index_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(get(r)[i], from + i * stride, 64);
    }
    template <int r>
    static void store(void* to, index_t stride) {
        for (int i = 0; i < 16; ++i) std::memcpy(static_cast<std::uint32_t*>(to) + i * stride, get(r)[i], 64);
    }
    template <int sum, int a, int b>
    static void add_product() {
        const Register &x = get(a), &y = get(b);
        Register& total = get(sum);
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 16; ++j) {
                float dot = bit_cast<float>(total[i][j]);
                for (int k = 0; k < 16; ++k)
                    for (const int shift : {16, 0})  // the first number of a pair lies in the low bits
                        dot += term(x[i][k] << shift) * term(y[k][j] << shift);
                total[i][j] = bit_cast<std::uint32_t>(dot);
            }
    }

  private:
    static float term(std::uint32_t bits) { return bit_cast<float>(bits & 0xffff0000u); }
    static bool& configured() {
        thread_local bool value = false;
        return value;
    }
    // Registers that are not configured may not be used.
    static Register& get(int r) {
        thread_local Register registers[8];
        if (!configured()) std::abort();
        return registers[r];
    }
};

#endif

}  // namespace
}  // namespace clipfast
