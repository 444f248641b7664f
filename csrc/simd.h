// Vectors of W numbers in the compiler's own notation, so that one source serves every instruction set.
//
// Included once per instruction set, below its target region: nothing here may be shared between them, which is what
// the unnamed namespace is for.
#pragma once

#include <utility>

#include "dtypes.h"

#define CLIPFAST_INLINE inline __attribute__((always_inline))
#define CLIPFAST_NOINLINE __attribute__((noinline))  // one copy for all element types

namespace clipfast {
namespace {

template <class T, int W>
struct VectorOf {
    typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

template <class V, class T>
CLIPFAST_INLINE V load_vector(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
CLIPFAST_INLINE void store_vector(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// The same bits. Unlike bit_cast it is compiled where vectors may be passed in registers.
template <class To, class From>
CLIPFAST_INLINE To as(From v) {
    static_assert(sizeof(To) == sizeof(From));
    return load_vector<To>(&v);
}

// A NaN in the first argument stays in `clamped` and is ignored by the other two.
template <class V>
CLIPFAST_INLINE V clamped(V v, V low, V high) {
    v = v < low ? low : v;
    return v > high ? high : v;
}
template <class V>
CLIPFAST_INLINE V minimum(V v, V low) { return v < low ? v : low; }
template <class V>
CLIPFAST_INLINE V maximum(V v, V high) { return v > high ? v : high; }

template <class Element>
const Element* element(const Matrix& a, index_t row, index_t col) {
    return static_cast<const Element*>(a.data) + row * a.row_stride + col * a.col_stride;
}

// Rows of elements of any type as vectors of W numbers.
template <class T, int lanes>
struct Lanes {
    static constexpr int W = lanes;
    using V = Vector<T, W>;

    // What lies beyond `count` elements is zero.
    template <class Element>
    static CLIPFAST_INLINE V load_elements(const Element* p, index_t stride, index_t count) {
        if (stride == 1 && count >= W) return load_whole(p);
        T values[W];
        for (index_t l = 0; l < W; ++l) values[l] = l < count ? load(p[l * stride]) : T(0);
        return load_vector<V>(values);
    }

    template <class Element>
    static CLIPFAST_INLINE void store_elements(Element* p, V v, index_t count) {
        if (count >= W) return store_whole(p, v);
        T values[W];
        store_vector(values, v);
        for (index_t l = 0; l < count; ++l) p[l] = store<Element>(values[l]);
    }

    // Row `row` of a matrix as it is taken, from column `col` on. What lies beyond `count` elements is zero.
    template <class Element>
    static CLIPFAST_INLINE V load_row(const Matrix& a, index_t row, index_t col, index_t count) {
        const V elements = load_elements(element<Element>(a, row, col), a.col_stride, count);
        return a.factors ? elements * static_cast<const T*>(a.factors)[row] : elements;
    }

    // The first or the second half of v in float64: GCC keeps vectors that are longer than a register in memory.
    using Doubles = Vector<double, W / 2>;
    template <int h>
    static CLIPFAST_INLINE Doubles half(V v) {
        return half_of<h>(v, std::make_integer_sequence<int, W / 2>{});
    }

  private:
    template <int h, int... L>
    static CLIPFAST_INLINE Doubles half_of(V v, std::integer_sequence<int, L...>) {
        return __builtin_convertvector(__builtin_shufflevector(v, v, (h * W / 2 + L)...), Doubles);
    }

    using Bits = Vector<std::uint32_t, W>;
    using HalfBits = Vector<std::uint16_t, W>;

    // The loads and stores of dtypes.h, W at a time. Lanes that go through memory one by one would stall the next load.
    static CLIPFAST_INLINE V load_whole(const T* p) { return load_vector<V>(p); }
    static CLIPFAST_INLINE V load_whole(const bfloat16* p) {
        return as<V>(__builtin_convertvector(load_vector<HalfBits>(p), Bits) << 16);
    }
    static CLIPFAST_INLINE V load_whole(const float16* p) {
        const Bits bits = __builtin_convertvector(load_vector<HalfBits>(p), Bits);
        const Bits sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
        const Bits finite = as<Bits>(as<V>(magnitude) * 0x1p112f);
        return as<V>(sign | (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite));
    }

    static CLIPFAST_INLINE void store_whole(T* p, V v) { store_vector(p, v); }
    static CLIPFAST_INLINE void store_whole(bfloat16* p, V v) {
        const Bits bits = as<Bits>(v), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        store_vector(p, __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0u, HalfBits));
    }
    static CLIPFAST_INLINE void store_whole(float16* p, V v) {
        T values[W];
        store_vector(values, v);
        for (int l = 0; l < W; ++l) p[l] = float16::store(values[l]);
    }
};

// Calls combine(a, b) on halves until one number is left: a fixed order of sums.
template <class T, int W, class Combine>
CLIPFAST_INLINE T reduce(Vector<T, W> v, const Combine& combine) {
    T lanes[W];
    std::memcpy(lanes, &v, sizeof v);
    if constexpr (W == 1) {
        return lanes[0];
    } else {
        Vector<T, W / 2> low, high;
        std::memcpy(&low, lanes, sizeof low);
        std::memcpy(&high, lanes + W / 2, sizeof high);
        return reduce<T, W / 2>(combine(low, high), combine);
    }
}

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
    using Bits = std::uint32_t;
    static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, found in the low bits
    static constexpr int kMantissa = 23, kBias = 127;
    // Minimax in relative error on [-1/2, 1/2]: 1.9e-9.
    static constexpr float kTerms[] = {1.0f,           0.693147205737f, 0.240226468907f, 0.0555032877711f,
                                       0.00961848896f, 0.00133999312f,  0.000153458122f};
};

template <>
struct Exp2<double> {
    using Bits = std::uint64_t;
    static constexpr double kRound = 0x1.8p52;
    static constexpr int kMantissa = 52, kBias = 1023;
    // 3.1e-18.
    static constexpr double kTerms[] = {1.0,
                                        0.69314718055994533,
                                        0.240226506959101562,
                                        0.0555041086648199216,
                                        0.00961812910758833524,
                                        0.00133335581467899217,
                                        0.000154035304625144321,
                                        1.52527334899885256e-5,
                                        1.32154330896763992e-6,
                                        1.01781980216719308e-7,
                                        7.0741056135081428e-9,
                                        4.43528270695727715e-10};
};

// 2^x, relative error below 2 units in the last place (tests/test_cpu.py); 0 where 2^x is below the normal numbers,
// inf for inf, NaN for NaN.
template <class T, int W>
CLIPFAST_INLINE Vector<T, W> exp2(Vector<T, W> x) {
    using E = Exp2<T>;
    using V = Vector<T, W>;
    using I = Vector<typename E::Bits, W>;
    constexpr int degree = sizeof(E::kTerms) / sizeof(T) - 1;
    x = clamped(x, V{} - T(E::kBias), V{} + T(E::kBias + 1));
    const V rounded = x + E::kRound;
    const V rest = x - (rounded - E::kRound);
    I bits, round_bits;
    const V round = V{} + E::kRound;
    std::memcpy(&bits, &rounded, sizeof bits);
    std::memcpy(&round_bits, &round, sizeof bits);
    bits = (bits - round_bits + typename E::Bits(E::kBias)) << E::kMantissa;
    V power;
    std::memcpy(&power, &bits, sizeof power);
    V sum = V{} + E::kTerms[degree];
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) sum = sum * rest + E::kTerms[i];
    return sum * power;
}

template <class T>
struct Log1p;

// log(1 + e) = 2 atanh(s) with s = e / (2 + e), as s times a polynomial in s^2; minimax in relative error on [0, 1/9].
template <>
struct Log1p<float> {
    // 4.5e-9.
    static constexpr float kTerms[] = {2.0f, 0.6666641629f, 0.4002152723f, 0.280018054f, 0.2801198625f};
};

template <>
struct Log1p<double> {
    // 1.3e-18.
    static constexpr double kTerms[] = {2.0,
                                        0.6666666666666630969,
                                        0.4000000000015511903,
                                        0.2857142854811776422,
                                        0.2222222395365618319,
                                        0.1818174447886395287,
                                        0.1538654839505176636,
                                        0.1330112136866713263,
                                        0.1210494486435273364,
                                        0.08344972074062557503,
                                        0.1700975500122823575};
};

template <class V>
struct SoftplusAndSigmoid {
    V softplus, sigmoid;
};

// Of x in log2 units: log(1 + 2^x) and 1 / (1 + 2^-x), relative error below 4 units in the last place beside that of x
// (tests/test_cpu.py); 0 where 2^x is below the normal numbers, NaN for NaN.
template <class T, int W>
CLIPFAST_INLINE SoftplusAndSigmoid<Vector<T, W>> softplus_and_sigmoid(Vector<T, W> x) {
    using V = Vector<T, W>;
    constexpr int degree = sizeof(Log1p<T>::kTerms) / sizeof(T) - 1;
    const V e = exp2<T, W>(x < 0 ? x : -x);
    // One division for both: 1 / (1 + e) and s = e / (2 + e).
    const V inverse = T(1) / ((T(1) + e) * (T(2) + e)), s = e * (T(1) + e) * inverse, s2 = s * s;
    V sum = V{} + Log1p<T>::kTerms[degree];
#pragma GCC unroll 16
    for (int i = degree - 1; i >= 0; --i) sum = sum * s2 + Log1p<T>::kTerms[i];
    const V above = (T(2) + e) * inverse;
    return {(x > 0 ? x * T(0.69314718055994530942) : V{}) + s * sum, x < 0 ? e * above : above};
}

// One step of a transposition: swaps the blocks of `distance` lanes that lie off the diagonal.
template <int distance, int W, class V, int... L>
CLIPFAST_INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, L...>) {
    const V low = __builtin_shufflevector(a, b, (L & distance ? W + L - distance : L)...);
    b = __builtin_shufflevector(a, b, (L & distance ? W + L : L + distance)...);
    a = low;
}

template <int distance, int W, class V>
CLIPFAST_INLINE void transpose_from(V (&v)[W]) {
    if constexpr (distance > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if (!(i & distance))
                swap_blocks<distance, W>(v[i], v[i + distance], std::make_integer_sequence<int, W>{});
        transpose_from<distance / 2, W>(v);
    }
}

template <int W, class V>
CLIPFAST_INLINE void transpose(V (&v)[W]) {
    transpose_from<W / 2, W>(v);
}

}  // namespace
}  // namespace clipfast
