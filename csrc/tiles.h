// Products on a tile in registers, and how their operands are packed. Included once per instruction set.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace clipfast {
namespace {

constexpr index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }
constexpr index_t round_up(index_t a, index_t b) { return ceil_div(a, b) * b; }

// Compute in T on an instruction set, which says kVectorBytes, and kRows: rows of a tile in registers.
template <class Isa, class T>
struct Tile {
    static constexpr int W = Isa::kVectorBytes / sizeof(T);
    static constexpr int kVectors = 3;
    static constexpr int kRows = std::min(Isa::kRows, W);  // divides kWidth
    static constexpr index_t kWidth = kVectors * W;       // columns of a panel
    static constexpr index_t kDepth = 192 / kWidth * kWidth;  // terms of a sum in registers, at most
    using V = Vector<T, W>;

    // How many of `terms` terms to add up in registers. Equal terms round one way, so a sum of b of them may be off by
    // b / 4 units in the last place, and a sum of terms / b such sums by as many more: near 2 sqrt(terms) both are small.
    static index_t depth(index_t terms) {
        return std::min(kDepth, round_up(index_t(2 * std::sqrt(double(terms))), kWidth));
    }

    // visit(sum[kRows][NV]) with sum_iv = sum_k A_ik B_kv over `runs` runs of `terms` terms. A_ik lies at
    // a[i * kARow + k * kACol], a run a_run after the one before; B is packed, [runs * terms][NV * W].
    template <int NV, index_t kARow, index_t kACol, class Visit>
    static CLIPFAST_INLINE void multiply(index_t runs, index_t terms, const T* a, index_t a_run, const T* b,
                                         const Visit& visit) {
        V sum[kRows][NV];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[i][v] = V{};
        for (index_t run = 0; run < runs; ++run, a += a_run) {
            const T* a_k = a;
            for (index_t k = 0; k < terms; ++k, a_k += kACol, b += NV * W) {
                V row[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) row[v] = load_vector<V>(b + v * W);
#pragma GCC unroll 16
                for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) sum[i][v] += a_k[i * kARow] * row[v];
            }
        }
        visit(sum);
    }

    // C += A B on `rows` <= kRows rows and `cols` <= NV * W columns.
    template <int NV, index_t kARow, index_t kACol>
    CLIPFAST_NOINLINE static void add_product(index_t runs, index_t terms, const T* a, index_t a_run, const T* b, T* c, index_t ldc,
                            index_t rows, index_t cols) {
        multiply<NV, kARow, kACol>(runs, terms, a, a_run, b, [&](const V (&sum)[kRows][NV]) {
            if (rows >= kRows && cols >= NV * W) {
#pragma GCC unroll 16
                for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) {
                        T* to = c + i * ldc + v * W;
                        store_vector(to, load_vector<V>(to) + sum[i][v]);
                    }
                return;
            }
            T tile[kRows][NV * W];
            std::memcpy(tile, sum, sizeof tile);
            for (index_t i = 0; i < std::min<index_t>(rows, kRows); ++i)
                for (index_t j = 0; j < cols; ++j) c[i * ldc + j] += tile[i][j];
        });
    }

    // Calls visit(std::integral_constant<int, NV>) with the vectors that `cols` columns of a panel take.
    template <class Visit>
    static void with_vectors(index_t cols, const Visit& visit) {
        if (cols > 2 * W) visit(std::integral_constant<int, 3>{});
        else if (cols > W) visit(std::integral_constant<int, 2>{});
        else visit(std::integral_constant<int, 1>{});
    }

    template <class Element>
    static CLIPFAST_INLINE V load_elements(const Element* p, index_t stride, index_t count) {
        T lanes[W];
        if (stride == 1 && count >= W) {
            for (int l = 0; l < W; ++l) lanes[l] = load(p[l]);
        } else {
            for (index_t l = 0; l < W; ++l) lanes[l] = l < count ? load(p[l * stride]) : T(0);
        }
        return load_vector<V>(lanes);
    }

    template <class Element>
    static CLIPFAST_INLINE void store_elements(Element* p, V v, index_t count) {
        T lanes[W];
        store_vector(lanes, v);
        if (count >= W) {
            for (int l = 0; l < W; ++l) p[l] = store<Element>(lanes[l]);
        } else {
            for (index_t l = 0; l < count; ++l) p[l] = store<Element>(lanes[l]);
        }
    }

    // out[r / Width][c][r % Width] = a[row + r][c] for r in [0, rows). Up to W rows more are written, with zeros.
    template <class Element, int Width>
    static void pack_transposed(const Matrix& a, index_t row, index_t rows, T* out) {
        for (index_t r = 0; r < rows; r += W)
            for (index_t c = 0; c < a.cols; c += W) {
                V block[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i)
                    block[i] = r + i < rows ? load_elements(element<Element>(a, row + r + i, c), a.col_stride, a.cols - c)
                                            : V{};
                transpose<W>(block);
                const index_t terms = std::min<index_t>(W, a.cols - c);
                for (index_t k = 0; k < terms; ++k) {
                    if constexpr (Width % W == 0) {
                        store_vector(out + (r / Width * a.cols + c + k) * Width + r % Width, block[k]);
                    } else {
                        static_assert(W % Width == 0);
                        T lanes[W];
                        store_vector(lanes, block[k]);
                        for (int l = 0; l < W; l += Width)
                            std::memcpy(out + ((r + l) / Width * a.cols + c + k) * Width, lanes + l, Width * sizeof(T));
                    }
                }
            }
    }

    // out[r][c] = a[row + r][col + c] for c in [0, cols), the rest of `width` columns zero.
    template <class Element>
    static void pack_rows(const Matrix& a, index_t row, index_t rows, index_t col, index_t cols, index_t width,
                          T* out) {
        for (index_t r = 0; r < rows; ++r, out += width) {
            const Element* in = element<Element>(a, row + r, col);
            for (index_t c = 0; c < width; c += W)
                store_vector(out + c, load_elements(in + c * a.col_stride, a.col_stride, cols - c));
        }
    }

    template <class Element>
    static const Element* element(const Matrix& a, index_t row, index_t col) {
        return static_cast<const Element*>(a.data) + row * a.row_stride + col * a.col_stride;
    }
};

}  // namespace
}  // namespace clipfast
