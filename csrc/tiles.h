// Products on a tile in registers, and how their operands are packed. Included once per instruction set.
//
// A kind of product is a class like Tile below: how operands are packed (pack_left, pack_right, pack_rows), x y^T of a
// few rows and a panel (multiply_rows), and G of a chunk with the products that it is the left operand of (Gradient).
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace clipfast {
namespace {

constexpr index_t kGroup = 64;  // rows of a group of logits

constexpr index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }
constexpr index_t round_up(index_t a, index_t b) { return ceil_div(a, b) * b; }

// The place of an element in an array of several dimensions: Index(i).in(J, j).in(K, k) is that of [i][j][k] in
// [][J][K].
struct Index {
    index_t at;
    constexpr explicit Index(index_t i) : at(i) {}
    constexpr Index in(index_t size, index_t i) const { return Index(at * size + i); }
    constexpr operator index_t() const { return at; }
};

// A tile of kRows_ rows by kVectors_ vectors.
template <class T, int W_, int kVectors_, int kRows_>
struct TileShape : Lanes<T, W_> {
    using Compute = T;
    using typename Lanes<T, W_>::V;
    static constexpr int W = W_, kVectors = kVectors_, kRows = kRows_;
    static constexpr index_t kWidth = kVectors * W;  // columns of a panel
    static_assert(kGroup % kRows == 0 && kGroup % W == 0 && kWidth % kRows == 0);

    // Calls visit(std::integral_constant<int, NV>) with the vectors that `cols` columns of a panel take.
    template <class Visit>
    static void with_vectors(index_t cols, const Visit& visit) {
        if constexpr (kVectors > 2) {
            if (cols > 2 * W) return visit(std::integral_constant<int, 3>{});
        }
        if (cols > W) visit(std::integral_constant<int, 2>{});
        else visit(std::integral_constant<int, 1>{});
    }

    // Adds a tile to sums in memory, [kRows][kWidth]; fresh ones are not there yet.
    template <int NV>
    static CLIPFAST_INLINE void add_tile(const V (&sum)[kRows][NV], T* to, bool fresh) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                T* const at = to + i * kWidth + v * W;
                store_vector(at, fresh ? sum[i][v] : load_vector<V>(at) + sum[i][v]);
            }
    }
};

// Products in the compute type T, of an instruction set that says kVectorBytes, and kRows: rows of a tile in registers.
template <class Isa, class T>
struct Tile : TileShape<T, Isa::kVectorBytes / sizeof(T), 3, std::min<int>(Isa::kRows, Isa::kVectorBytes / sizeof(T))> {
    using Shape =
        TileShape<T, Isa::kVectorBytes / sizeof(T), 3, std::min<int>(Isa::kRows, Isa::kVectorBytes / sizeof(T))>;
    using Operand = T;
    struct Session {};  // what a thread must have while it multiplies
    using typename Shape::V;
    using Shape::W, Shape::kRows, Shape::kWidth, Shape::load_elements;
    static constexpr int kParts = 1, kTerms = 1;  // an operand is one term, whole
    static constexpr bool kRounds = false;  // G
    static constexpr index_t kRowStep = 1, kColStep = 1;  // G's rows and columns are padded to multiples of them
    static constexpr index_t kDepth = 192 / kWidth * kWidth;  // terms of a sum in registers, at most
    static constexpr index_t kDotDepth = 128;  // the same of x y^T, whose error the scale multiplies

    // Operands per row of x or y in their product.
    static index_t operands(index_t d) { return d; }

    // Multiplies and adds in registers alone, a tile of sums `rounds` times; returns the floating-point operations.
    static CLIPFAST_NOINLINE double multiply_adds(index_t rounds) {
        constexpr int kVectors = Shape::kVectors;
        V sum[kRows][kVectors], factor = V{} + T(0.999), term = V{} + T(rounds);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[i][v] = V{} + T(i * kVectors + v);
        for (index_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sum[i][v] = sum[i][v] * factor + term;
#pragma GCC unroll 16
        for (int i = 1; i < kRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[0][v] += sum[i][v];
        V total = {};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) total += sum[0][v];
        volatile T used = reduce<T, W>(total, [](auto a, auto b) { return a + b; });
        (void)used;
        return 2.0 * double(rounds) * kRows * kVectors * W;
    }

    // How many of `terms` terms to add up in registers. Equal terms round one way, so a sum of b of them may be off by
    // b / 4 units in the last place, and a sum of terms / b such sums by as many more: near 2 sqrt(terms) both are
    // small. As many as for 1024 terms do not harm fewer, whose sums go to memory less often then.
    static index_t depth(index_t terms) {
        const double near = 2 * std::sqrt(double(std::max<index_t>(terms, 1024)));
        return std::min(kDepth, round_up(index_t(near), kWidth));
    }

    // visit(sum[kRows][NV]) with x y^T of kRows rows, `stride` numbers apart, and a packed panel of NV vectors.
    template <int NV, class Visit>
    static CLIPFAST_INLINE void multiply_rows(index_t d, const T* left, index_t stride, const T* right,
                                              const Visit& visit) {
        V total[kRows][NV];
        for (index_t k = 0; k < d; k += kDotDepth)
            multiply<NV>(1, std::min(kDotDepth, d - k), left + k, stride, 1, 0, right + k * NV * W,
                         [&](const V (&sum)[kRows][NV]) {
#pragma GCC unroll 16
                             for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                                 for (int v = 0; v < NV; ++v)
                                     total[i][v] = k ? total[i][v] + sum[i][v] : sum[i][v];
                         });
        visit(total);
    }

    // Whether rows of x are the left operand of x y^T as they lie; else they are packed, [row][d].
    template <class Element>
    static bool is_left(const Matrix& x) {
        return std::is_same_v<Element, T> && x.col_stride == 1 && !x.factors;
    }
    template <class Element>
    static void pack_left(const Matrix& x, index_t row, index_t rows, T* out) {
        for (index_t r = 0; r < round_up(rows, kRows); ++r, out += x.cols)
            for (index_t c = 0; c < x.cols; c += W) {
                const index_t count = x.cols - c;
                const V of_row = r < rows ? Shape::template load_row<Element>(x, row + r, c, count) : V{};
                Shape::store_elements(out + c, of_row, count);
            }
    }

    // Up to NV vectors of rows of y as its right operand, a panel: [d][NV * W].
    template <class Element, int NV>
    static void pack_right(const Matrix& y, index_t row, index_t rows, T* out) {
        for (index_t r = 0; r < rows; r += W)
            for (index_t c = 0; c < y.cols; c += W) {
                V block[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i)
                    block[i] = r + i < rows ? Shape::template load_row<Element>(y, row + r + i, c, y.cols - c) : V{};
                transpose<W>(block);
                const index_t terms = std::min<index_t>(W, y.cols - c);
                for (index_t k = 0; k < terms; ++k) store_vector(out + (c + k) * NV * W + r, block[k]);
            }
    }

    // Rows [row, row + rows) of a as the right operand of G y or G^T x: columns [col, col + cols) in a panel
    // [capacity][NV * W], from its row `skip` on, the rest of NV vectors zero.
    template <class Element, int NV>
    static void pack_rows(const Matrix& a, index_t row, index_t rows, index_t /*padded*/, index_t col, index_t cols,
                          index_t skip, index_t /*capacity*/, T* panel) {
        T* out = panel + skip * NV * W;
        for (index_t r = 0; r < rows; ++r) {
            for (index_t c = 0; c < NV * W; c += W, out += W)
                store_vector(out, Shape::template load_row<Element>(a, row + r, col + c, cols - c));
        }
    }

    // G of a chunk: panels of [rows][kWidth].
    class Gradient {
      public:
        static constexpr bool kInPlace = true;  // of as many bytes as its logits, group by group
        static index_t operands(index_t rows, index_t cols) { return rows * cols; }
        Gradient(T* panels, index_t rows) : panels_(panels), rows_(rows) {}

        // Where the logits of a group are to become G.
        T* place(index_t panel, index_t row, T*) const { return panels_ + (panel * rows_ + row) * kWidth; }
        template <class Group>
        void keep(const Group&, index_t, index_t) const {}

        // G y of G's rows [row, row + kRows) and columns [k, k + terms), k a multiple of kWidth, as add_tile adds it.
        // y is packed.
        template <int NV>
        void add_rows(index_t row, index_t k, index_t terms, const T* y, index_t, T* to, bool fresh) const {
            // Whole panels of G, then what is left.
            const index_t panel_size = rows_ * kWidth, whole = terms / kWidth * kWidth;
            const T* g = panels_ + k / kWidth * panel_size + row * kWidth;
            y += k * NV * W;
            if (whole) add_product<NV, kWidth, 1>(whole / kWidth, kWidth, g, panel_size, y, to, fresh);
            if (whole < terms)
                add_product<NV, kWidth, 1>(1, terms - whole, g + whole * rows_, 0, y + whole * NV * W, to,
                                           fresh && !whole);
        }

        // G^T x of G's columns [col, col + kRows) and rows [k, k + terms). x is packed.
        template <int NV>
        void add_cols(index_t col, index_t k, index_t terms, const T* x, index_t, T* to, bool fresh) const {
            const T* g = panels_ + (col / kWidth * rows_ + k) * kWidth + col % kWidth;
            add_product<NV, 1, kWidth>(1, terms, g, 0, x + k * NV * W, to, fresh);
        }

      private:
        T* panels_;
        index_t rows_;
    };

  private:
    // visit(sum[kRows][NV]) with sum_iv = sum_k A_ik B_kv over `runs` runs of `terms` terms. A_ik lies at
    // a[i * a_row + k * a_col], a run a_run after the one before; B is packed, [runs * terms][NV * W].
    template <int NV, class Visit>
    static CLIPFAST_INLINE void multiply(index_t runs, index_t terms, const T* a, index_t a_row, index_t a_col,
                                         index_t a_run, const T* b, const Visit& visit) {
        V sum[kRows][NV];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[i][v] = V{};
        for (index_t run = 0; run < runs; ++run, a += a_run) {
            const T* a_k = a;
            for (index_t k = 0; k < terms; ++k, a_k += a_col, b += NV * W) {
                V row[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) row[v] = load_vector<V>(b + v * W);
#pragma GCC unroll 16
                for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) sum[i][v] += a_k[i * a_row] * row[v];
            }
        }
        visit(sum);
    }

    template <int NV, index_t kARow, index_t kACol>
    CLIPFAST_NOINLINE static void add_product(index_t runs, index_t terms, const T* a, index_t a_run, const T* b,
                                              T* to, bool fresh) {
        multiply<NV>(runs, terms, a, kARow, kACol, a_run, b,
                     [&](const V (&sum)[kRows][NV]) { Shape::template add_tile<NV>(sum, to, fresh); });
    }
};

}  // namespace
}  // namespace clipfast
