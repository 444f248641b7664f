// Element types: how a row is read into the compute type and written back, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

namespace clipfast {

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct bfloat16 {
    std::uint16_t bits;
    static float load(bfloat16 v) { return bit_cast<float>(std::uint32_t{v.bits} << 16); }
    static bfloat16 store(float v) {
        if (std::isnan(v)) return {0x7fc0};
        const auto u = bit_cast<std::uint32_t>(v);
        return {static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
    }
};

struct float16 {
    std::uint16_t bits;
    static float load(float16 v) {
        // Shift the 15 magnitude bits into a float32 pattern and let a multiplication rebias the exponent, which also
        // normalizes subnormals; infinities and NaNs keep the full exponent.
        const std::uint32_t sign = std::uint32_t{v.bits & 0x8000u} << 16;
        const std::uint32_t magnitude = std::uint32_t{v.bits & 0x7fffu} << 13;
        if (magnitude >= 0x0f800000u) return bit_cast<float>(sign | magnitude | 0x7f800000u);
        return bit_cast<float>(sign | bit_cast<std::uint32_t>(bit_cast<float>(magnitude) * 0x1p112f));
    }
    static float16 store(float v) {
        const auto u = bit_cast<std::uint32_t>(v);
        const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
        const float magnitude = std::fabs(v);
        if (std::isnan(v)) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
        if (magnitude >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
        if (magnitude < 0x1p-14f) {
            // Subnormal: adding 0.5 aligns the last place of a float16 subnormal with that of the float32 sum.
            const auto aligned = bit_cast<std::uint32_t>(magnitude + 0.5f);
            return {static_cast<std::uint16_t>(sign | (aligned - 0x3f000000u))};
        }
        const std::uint32_t rebiased = bit_cast<std::uint32_t>(magnitude) - (112u << 23);
        return {static_cast<std::uint16_t>(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13))};
    }
};

template <class T>
T load(T v) { return v; }
inline float load(bfloat16 v) { return bfloat16::load(v); }
inline float load(float16 v) { return float16::load(v); }

template <class Element, class T>
Element store(T v) {
    if constexpr (std::is_same_v<Element, T>) return v;
    else return Element::store(v);
}

}  // namespace clipfast
