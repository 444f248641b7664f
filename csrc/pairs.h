// Products of bfloat16 in units that add up pairs: an operand is a pair of terms, 32 bits. What Tile (tiles.h) is for
// products in the compute type. Included once per instruction set, all of which have AVX-512 with bfloat16.
//
// kParts = 1: features and G are rounded to bfloat16 (a bfloat16 feature is itself). kParts = 2: a float32 is the sum
// of two bfloat16, high + low, up to 2^-17 of it, and a product is high high + high low + low high; low low is as
// small.
//
// A left operand has its pairs along the row, in runs of 16 or more, so that a matrix unit can load 16 rows by 16
// pairs: rows of bfloat16 as they lie. A right operand is [pair][column]. Both are padded with zeros to whole runs. A
// chunk holds G twice, its pairs along the rows and along the columns: as many bytes as once in float32.
#pragma once

#include "tiles.h"

namespace clipfast {
namespace {

using Halves = Vector<std::uint16_t, 16>;
using Pairs = Vector<std::uint32_t, 16>;

// Isa says kPairVectors and kPairRows, the tile; Session, what a thread must have while it multiplies; round, of
// vectors; and how the tile's sums begin (clear), grow (add) and are read (finish).
template <class Isa, int kParts_>
struct PairTile : TileShape<float, 16, Isa::kPairVectors, Isa::kPairRows> {
    using Shape = TileShape<float, 16, Isa::kPairVectors, Isa::kPairRows>;
    using Operand = std::uint32_t;
    using Session = typename Isa::Session;
    using typename Shape::V;
    using Shape::W, Shape::kRows, Shape::kWidth, Shape::kVectors, Shape::load_elements;
    static constexpr int kParts = kParts_, kTerms = 2;
    static constexpr bool kRounds = true;
    static constexpr index_t kRun = 16;  // pairs of a run of x
    static constexpr index_t kRowStep = kGroup, kColStep = kWidth;
    static constexpr index_t kDepth = 384;  // terms of a sum in registers
    static_assert(kDepth % kGroup == 0 && kDepth % kWidth == 0);

    static index_t operands(index_t d) { return kParts * pairs(d); }

    // As Tile::multiply_adds, of pairs that lie in the first-level cache.
    static CLIPFAST_NOINLINE double multiply_adds(index_t rounds) {
        constexpr index_t kRuns = 4;
        alignas(64) static const Operand a[kRows * kRun] = {}, b[kRuns * kRun * kWidth] = {};
        [[maybe_unused]] const Session session;
        V sum[kRows][kVectors];
        Isa::clear(sum);
        for (index_t round = 0; round < rounds; ++round) Isa::add(sum, kRuns, kRun, a, kRun, 0, b);
        Isa::finish(sum);
        V total = {};  // of all, or the compiler would leave sums out
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) total += sum[i][v];
        volatile float used = reduce<float, W>(total, [](auto p, auto q) { return p + q; });
        (void)used;
        return 2.0 * 2.0 * double(rounds * kRuns * kRun) * kRows * kWidth;
    }
    static index_t depth(index_t) { return kDepth; }

    template <int NV, class Visit>
    static CLIPFAST_INLINE void multiply_rows(index_t d, const Operand* left, index_t stride, const Operand* right,
                                              const Visit& visit) {
        const index_t count = pairs(d);
        multiply<NV>(1, count, left, stride, 0, count, right, count * NV * W, visit);
    }

    template <class Element>
    static bool is_left(const Matrix& x) {
        return kParts == 1 && std::is_same_v<Element, bfloat16> && x.cols == 2 * pairs(x.cols) && x.col_stride == 1 &&
               x.row_stride % 2 == 0 && reinterpret_cast<std::uintptr_t>(x.data) % sizeof(Operand) == 0 && !x.factors;
    }
    // [row][part][pair].
    template <class Element>
    static void pack_left(const Matrix& x, index_t row, index_t rows, Operand* out) {
        for (index_t r = 0; r < round_up(rows, kRows); ++r)
            for_parts([&](auto part) {
                for (index_t k = 0; k < pairs(x.cols); k += kRun, out += kRun)
                    store_vector(out, r < rows ? load_pairs<part.value, Element>(x, row + r, 2 * k) : Pairs{});
            });
    }

    // A panel: [part][pair][NV * W].
    template <class Element, int NV>
    static void pack_right(const Matrix& y, index_t row, index_t rows, Operand* out) {
        for_parts([&](auto part) {
            for (index_t k = 0; k < pairs(y.cols); k += kRun, out += kRun * NV * W)
                for (int v = 0; v < NV; ++v) {
                    Pairs block[W];
                    for (index_t l = 0; l < W; ++l)
                        block[l] = v * W + l < rows ? load_pairs<part.value, Element>(y, row + v * W + l, 2 * k)
                                                    : Pairs{};
                    transpose<W>(block);
                    for (int l = 0; l < W; ++l) store_vector(out + l * NV * W + v * W, block[l]);
                }
        });
    }

    // Rows [row, row + rows) of a in a panel [part][capacity / 2][NV * W], from its row `skip` on, with zeros up to row
    // skip + padded.
    template <class Element, int NV>
    static void pack_rows(const Matrix& a, index_t row, index_t rows, index_t padded, index_t col, index_t cols,
                          index_t skip, index_t capacity, Operand* panel) {
        const auto load_row = [&](index_t r, int v) {
            const index_t c = col + v * W;
            return r < rows ? Shape::template load_row<Element>(a, row + r, c, cols - v * W) : V{};
        };
        for_parts([&](auto part) {
            Operand* out = panel + Index(part).in(capacity / 2, skip / 2).in(NV * W, 0);
            for (index_t r = 0; r < padded; r += 2, out += NV * W)
                for (int v = 0; v < NV; ++v)
                    store_vector(out + v * W, pairs_of<part.value>(load_row(r, v), load_row(r + 1, v)));
        });
    }

    // G of a chunk, [panel][group of rows][part], twice in each: with its pairs along the rows, [kGroup][kWidth / 2],
    // and along the columns, [kWidth][kGroup / 2].
    class Gradient {
      public:
        static constexpr bool kInPlace = kParts == 1;
        static index_t operands(index_t rows, index_t cols) { return kParts * rows * cols; }
        Gradient(Operand* memory, index_t rows) : memory_(memory), groups_(rows / kGroup) {}

        float* place(index_t, index_t, float* apart) const { return apart; }

        // Takes the group's logits, which have become G.
        template <class Group>
        void keep(const Group& group, index_t panel, index_t row) const {
            for (index_t i = 0; i < group.rows; ++i) std::fill(group.row(i) + group.cols, group.row(i + 1), 0.0f);
            std::fill(group.row(group.rows), group.row(kGroup), 0.0f);
            for_parts([&](auto part) {
                keep_rows<part.value>(group.s, memory_ + at_row(panel, part, row));
                keep_cols<part.value>(group.s, memory_ + at_col(panel, part, row, 0));
            });
        }

        template <int NV>
        void add_rows(index_t row, index_t k, index_t terms, const Operand* y, index_t capacity,
                      float* to, bool fresh) const {
            const Operand* g = memory_ + at_row(k / kWidth, 0, row);
            add_product<NV, kWidth / 2>(ceil_div(terms, kWidth), kWidth / 2, g, at(1, 0, 0), at(0, 0, 1),
                                        y + k / 2 * NV * W, capacity / 2 * NV * W, to, fresh);
        }

        template <int NV>
        void add_cols(index_t col, index_t k, index_t terms, const Operand* x, index_t capacity,
                      float* to, bool fresh) const {
            const Operand* g = memory_ + at_col(col / kWidth, 0, k, col % kWidth);
            add_product<NV, kGroup / 2>(ceil_div(terms, kGroup), kGroup / 2, g, at(0, 1, 0), at(0, 0, 1),
                                        x + k / 2 * NV * W, capacity / 2 * NV * W, to, fresh);
        }

      private:
        // Of a group, and in its two copies of G, of the first pair of a row and of a column of the panel.
        index_t at(index_t panel, index_t group, index_t part) const {
            return Index(panel).in(groups_, group).in(kParts, part).in(kGroup, 0).in(kWidth, 0);
        }
        index_t at_row(index_t panel, index_t part, index_t row) const {
            return at(panel, row / kGroup, part) + row % kGroup * kWidth / 2;
        }
        index_t at_col(index_t panel, index_t part, index_t row, index_t col) const {
            return at(panel, row / kGroup, part) + kGroup * kWidth / 2 + col * kGroup / 2;
        }

        template <int part>
        static void keep_rows(const float* g, Operand* out) {
            for (index_t at = 0; at < kGroup * kWidth; at += W) {
                const auto rounded = Isa::round(part_of<part>(load_vector<V>(g + at)));
                store_vector(out + at / 2, rounded);
            }
        }

        template <int part>
        static void keep_cols(const float* g, Operand* out) {
            for (int v = 0; v < kVectors; ++v)
                for (index_t i = 0; i < kGroup; i += 2 * W) {
                    const float* from = g + i * kWidth + v * W;
                    Pairs block[W];
#pragma GCC unroll 16
                    for (int p = 0; p < W; ++p, from += 2 * kWidth)
                        block[p] = pairs_of<part>(load_vector<V>(from), load_vector<V>(from + kWidth));
                    transpose<W>(block);
                    for (int j = 0; j < W; ++j) store_vector(out + Index(v * W + j).in(kGroup / 2, i / 2), block[j]);
                }
        }

        Operand* memory_;
        index_t groups_;  // of rows
    };

  private:
    static index_t pairs(index_t d) { return round_up(ceil_div(d, 2), kRun); }

    template <class Visit>
    static CLIPFAST_INLINE void for_parts(const Visit& visit) {
        visit(std::integral_constant<int, 0>{});
        if constexpr (kParts == 2) visit(std::integral_constant<int, 1>{});
    }

    // The high part is the number itself, which is rounded later; the low part is what that rounding takes away,
    // nothing where the high part is infinite or NaN.
    template <int part>
    static CLIPFAST_INLINE V part_of(V v) {
        if constexpr (part == 0) {
            return v;
        } else {
            const V rest = v - as<V>(__builtin_convertvector(Isa::round(v), Pairs) << 16);
            return rest - rest == 0 ? rest : V{};
        }
    }

    // A part of the numbers of two rows as pairs.
    template <int part>
    static CLIPFAST_INLINE Pairs pairs_of(V even, V odd) {
        return __builtin_convertvector(Isa::round(part_of<part>(even)), Pairs) |
               __builtin_convertvector(Isa::round(part_of<part>(odd)), Pairs) << 16;
    }

    // The pairs of row `row` from column `col` on.
    template <int part, class Element>
    static CLIPFAST_INLINE Pairs load_pairs(const Matrix& a, index_t row, index_t col) {
        Halves halves[2];
        for (int h = 0; h < 2; ++h) {
            const index_t c = col + h * W;
            halves[h] = Isa::round(part_of<part>(Shape::template load_row<Element>(a, row, c, a.cols - c)));
        }
        return load_vector<Pairs>(halves);
    }

    // visit(sum[kRows][NV]) with sum_iv = sum_k A_ik B_kv over `runs` runs of `pairs` pairs. A_ik lies at
    // a[i * a_row + k], a run a_run after the one before; B is packed, [runs * pairs][NV * W]. The parts of A and B lie
    // a_part and b_part apart.
    template <int NV, class Visit>
    static CLIPFAST_INLINE void multiply(index_t runs, index_t pairs, const Operand* a, index_t a_row, index_t a_run,
                                         index_t a_part, const Operand* b, index_t b_part, const Visit& visit) {
        V sum[kRows][NV];
        Isa::clear(sum);
        Isa::add(sum, runs, pairs, a, a_row, a_run, b);
        if constexpr (kParts == 2) {
            Isa::add(sum, runs, pairs, a, a_row, a_run, b + b_part);
            Isa::add(sum, runs, pairs, a + a_part, a_row, a_run, b);
        }
        Isa::finish(sum);
        visit(sum);
    }

    template <int NV, index_t kARow>
    CLIPFAST_NOINLINE static void add_product(index_t runs, index_t pairs, const Operand* a, index_t a_run,
                                              index_t a_part, const Operand* b, index_t b_part,
                                              float* to, bool fresh) {
        multiply<NV>(runs, pairs, a, kARow, a_run, a_part, b, b_part,
                     [&](const V (&sum)[kRows][NV]) { Shape::template add_tile<NV>(sum, to, fresh); });
    }
};

}  // namespace
}  // namespace clipfast
