// The blockwise symmetric cross-entropy statistics and their gradient, forward and backward, for one compute type T.
//
// Rows go in panels, columns in tiles. A panel's tiles run in parallel: each thread forms S = x_panel y_tile^T in its
// own buffer, and the epilogue runs on groups of S while they are in cache. Logits are in log2 units (log2(e) is folded
// into scale and bias once), so every exponential is an exp2.
//
// One exponential serves both directions: with a shift k common to a group, e_ij = exp2(S_ij - k) gives its row sums and
// its column sums. That is exact while the group's spread stays below kMaxSpread, for then the smallest e is a normal
// number; a wider group takes separate shifts. Positives are left out of all sums (see clipfast/backends/__init__.py).
#pragma once

#include <cmath>
#include <limits>
#include <memory>

#include "dtypes.h"
#include "parallel.h"

namespace clipfast {

constexpr index_t kTile = 64;         // columns of a tile
constexpr index_t kGroup = 16;        // rows of a group, the unit of the epilogue
constexpr index_t kPanel = 128;       // rows of a panel, at most
constexpr index_t kDepth = 128;        // terms of a sum in registers
constexpr index_t kPanelBytes = 16 << 20;  // of G for one panel, at most, from kGroup rows on
constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

template <class T>
constexpr T kMaxSpread = std::is_same_v<T, float> ? T(100) : T(900);

inline index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// Multiples of kGroup, so that group boundaries, and with them all roundings, do not depend on the panel's size.
template <class T>
index_t panel_rows(index_t n, index_t m) {
    const index_t fit = kPanelBytes / (m * index_t{sizeof(T)}) / kGroup * kGroup;
    return std::min(n, std::clamp(fit, kGroup, kPanel));
}

// sum * exp2(shift): a sum of exponentials with a finite shift, so that no inf - inf arises from merging.
template <class T>
struct ShiftedSum {
    T shift = std::numeric_limits<T>::lowest();
    T sum = 0;

    void add(T other_shift, T other_sum) {
        constexpr T largest = std::numeric_limits<T>::max();
        const T finite = std::min(std::max(other_shift, -largest), largest);
        if (finite <= shift) {
            sum += other_sum * std::exp2(finite - shift);
        } else {
            sum = sum * std::exp2(shift - finite) + other_sum;
            shift = finite;
        }
    }
    void add(const ShiftedSum& other) { add(other.shift, other.sum); }
    double log() const { return (double(shift) + std::log2(double(sum))) * kLn2; }
};

// C[R][W] += A B over `depth` terms, with the sums in registers; they start at zero, so that long sums are sums of sums.
template <int R, int W, class T>
inline void multiply_tile(index_t depth, const T* a, index_t a_row, index_t a_col, const T* b, index_t ldb, T* c,
                          index_t ldc) {
    T sum[R][W] = {};
    for (index_t k = 0; k < depth; ++k)
        for (int i = 0; i < R; ++i) {
            const T factor = a[i * a_row + k * a_col];
            for (int j = 0; j < W; ++j) sum[i][j] += factor * b[k * ldb + j];
        }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < W; ++j) c[i * ldc + j] += sum[i][j];
}

// C[rows][cols] += A B with A[i][k] at a[i * a_row + k * a_col] and row-major B and C.
template <class T>
void multiply(index_t rows, index_t cols, index_t depth, const T* a, index_t a_row, index_t a_col, const T* b,
              index_t ldb, T* c, index_t ldc) {
    constexpr int kRows = 4, kCols = 32 / sizeof(T);
    for (index_t k = 0; k < depth; k += kDepth)
        for (index_t j = 0; j < cols;) {
            const bool wide = cols - j >= kCols;
            for (index_t i = 0; i < rows;) {
                const bool tall = rows - i >= kRows;
                const index_t terms = std::min(kDepth, depth - k);
                const T *a_ik = a + i * a_row + k * a_col, *b_kj = b + k * ldb + j;
                T* c_ij = c + i * ldc + j;
                if (tall && wide) multiply_tile<kRows, kCols>(terms, a_ik, a_row, a_col, b_kj, ldb, c_ij, ldc);
                else if (tall) multiply_tile<kRows, 1>(terms, a_ik, a_row, a_col, b_kj, ldb, c_ij, ldc);
                else if (wide) multiply_tile<1, kCols>(terms, a_ik, a_row, a_col, b_kj, ldb, c_ij, ldc);
                else multiply_tile<1, 1>(terms, a_ik, a_row, a_col, b_kj, ldb, c_ij, ldc);
                i += tall ? kRows : 1;
            }
            j += wide ? kCols : 1;
        }
}

// A group of logits in log2 units: rows x cols at s, and the column of row 0's positive.
template <class T>
struct Group {
    T* s;
    index_t rows, cols, positive;

    T* row(index_t i) const { return s + i * kTile; }
    bool has_positive(index_t i) const { return positive + i >= 0 && positive + i < cols; }
    // Where row i's positive is, calls visit(i, its logit).
    template <class Visit>
    void for_positives(const Visit& visit) const {
        for (index_t i = 0; i < rows; ++i)
            if (has_positive(i)) visit(i, row(i)[positive + i]);
    }
};

// The spread of a group without its positives. A NaN passes through every later sum by itself, so it may be ignored.
template <class T>
struct Spread {
    T low = std::numeric_limits<T>::infinity();
    T high = -std::numeric_limits<T>::infinity();

    explicit Spread(const Group<T>& group) {
        for (index_t i = 0; i < group.rows; ++i) {
            const T* s = group.row(i);
            const index_t skip = group.positive + i;
            for (index_t j = 0; j < group.cols; ++j) {
                if (j == skip) continue;
                low = s[j] < low ? s[j] : low;
                high = s[j] > high ? s[j] : high;
            }
        }
    }
    bool narrow() const { return low <= high && high - low < kMaxSpread<T>; }
};

template <class T, class Element>
class Kernel {
  public:
    Kernel(const Block& block, int threads)
        : block_(block),
          threads_(threads),
          scale_(T(block.scale)),
          scale2_(T(block.scale * kLog2e)),
          scale2_rest_(T(block.scale * kLog2e - double(scale2_))),
          bias2_(T(block.bias * kLog2e)),
          panel_(panel_rows<T>(block.n(), block.m())),
          tiles_(ceil_div(block.m(), kTile)),
          x_panel_(new T[panel_ * block.d()]),
          y_tile_(new T[threads * kTile * block.d()]),
          s_(new T[threads * panel_ * kTile]) {}

    void forward(const Statistics& out) {
        const index_t n = block_.n(), m = block_.m();
        std::vector<ShiftedSum<T>> columns(m), partial(tiles_ * panel_);
        for (index_t first = 0; first < n; first += panel_) {
            const index_t rows = std::min(panel_, n - first);
            load_rows<Element>(block_.x, first, rows, x_panel_.get());
            std::fill(partial.begin(), partial.end(), ShiftedSum<T>{});
            std::fill(out.positive + first, out.positive + first + rows, 0.0);
            parallel_for(threads_, tiles_, [&](int worker, index_t tile) {
                for_groups(worker, tile, first, rows, [&](const Group<T>& group, index_t row) {
                    group.for_positives([&](index_t i, T& logit) {
                        out.positive[first + row + i] = double(logit) * kLn2;
                        logit = -std::numeric_limits<T>::infinity();
                    });
                    add_sums(group, &partial[tile * panel_ + row], &columns[tile * kTile]);
                });
            });
            parallel_for(threads_, ceil_div(rows, kGroup), [&](int, index_t task) {
                for (index_t i = task * kGroup; i < std::min(rows, (task + 1) * kGroup); ++i) {
                    ShiftedSum<T> row;
                    for (index_t tile = 0; tile < tiles_; ++tile) row.add(partial[tile * panel_ + i]);
                    out.row_lse[first + i] = row.log();
                }
            });
        }
        for (index_t j = 0; j < m; ++j) out.col_lse[j] = columns[j].log();
    }

    // Returns dscale.
    double backward(const Weights& in, const Gradients& out) {
        const index_t n = block_.n(), m = block_.m(), d = block_.d();
        constexpr bool accumulate_apart = !std::is_same_v<T, Element>;
        std::vector<T> dy_apart(accumulate_apart ? m * d : 0);
        T* dy = accumulate_apart ? dy_apart.data() : static_cast<T*>(out.dy);
        std::fill(dy, dy + m * d, T(0));
        const index_t width = tiles_ * kTile;
        std::unique_ptr<T[]> gradient(new T[panel_ * width]), gradient_y(new T[panel_ * d]);
        std::vector<double> row_dot(panel_);
        double dscale = 0;
        for (index_t first = 0; first < n; first += panel_) {
            const index_t rows = std::min(panel_, n - first);
            load_rows<Element>(block_.x, first, rows, x_panel_.get());
            parallel_for(threads_, tiles_, [&](int worker, index_t tile) {
                for_groups(worker, tile, first, rows, [&](const Group<T>& group, index_t row) {
                    form_gradient(group, in, first + row, tile * kTile);
                    for (index_t i = 0; i < group.rows; ++i)
                        std::copy(group.row(i), group.row(i) + group.cols, &gradient[(row + i) * width + tile * kTile]);
                });
                multiply(tile_cols(tile), d, rows, &gradient[tile * kTile], 1, width, x_panel_.get(), d,
                         dy + tile * kTile * d, d);
            });
            // As few tasks as there are threads: each reads all of y.
            const index_t share = ceil_div(ceil_div(rows, kGroup), threads_) * kGroup;
            parallel_for(threads_, ceil_div(rows, share), [&](int worker, index_t task) {
                const index_t row = task * share, count = std::min(share, rows - row);
                times_y(worker, &gradient[row * width], width, count, &gradient_y[row * d]);
                for (index_t i = row; i < row + count; ++i) {
                    row_dot[i] = 0;
                    Element* dx = static_cast<Element*>(out.dx) + (first + i) * d;
                    for (index_t c = 0; c < d; ++c) {
                        row_dot[i] += double(gradient_y[i * d + c]) * double(x_panel_[i * d + c]);
                        dx[c] = store<Element>(scale_ * gradient_y[i * d + c]);
                    }
                }
            });
            for (index_t i = 0; i < rows; ++i) dscale += row_dot[i];
        }
        for (index_t i = 0; i < m * d; ++i) static_cast<Element*>(out.dy)[i] = store<Element>(scale_ * dy[i]);
        return dscale;
    }

    // What a backward pass holds at most, apart from its outputs.
    index_t workspace_bytes() const {
        const index_t n = block_.n(), m = block_.m(), d = block_.d();
        const index_t apart = std::is_same_v<T, Element> ? 0 : m * d;
        const index_t per_thread = kTile * d + panel_ * kTile;
        return index_t{sizeof(T)} * (apart + panel_ * (tiles_ * kTile + 2 * d) + threads_ * per_thread);
    }

  private:
    index_t tile_cols(index_t tile) const { return std::min(kTile, block_.m() - tile * kTile); }

    // Forms the tile's logits for the panel of `rows` rows from `first`, then calls visit(group, its row in the panel).
    template <class Visit>
    void for_groups(int worker, index_t tile, index_t first, index_t rows, const Visit& visit) {
        const index_t d = block_.d(), cols = tile_cols(tile);
        T* y = &y_tile_[worker * kTile * d];
        T* s = &s_[worker * panel_ * kTile];
        load_transposed<Element>(block_.y, tile * kTile, cols, kTile, y);
        std::fill(s, s + rows * kTile, T(0));
        multiply(rows, kTile, d, x_panel_.get(), d, index_t{1}, y, kTile, s, kTile);
        for (index_t row = 0; row < rows; row += kGroup) {
            const Group<T> group{s + row * kTile, std::min(kGroup, rows - row), cols,
                                 first + row + block_.diag_offset - tile * kTile};
            for (index_t i = 0; i < group.rows; ++i)
                for (index_t j = 0; j < cols; ++j) {
                    const T dot = group.row(i)[j];
                    group.row(i)[j] = dot * scale2_ + (dot * scale2_rest_ + bias2_);
                }
            visit(group, row);
        }
    }

    // Adds the group's exponentials to its rows' and its columns' sums; positives are -inf by now.
    static void add_sums(const Group<T>& group, ShiftedSum<T>* row_sums, ShiftedSum<T>* col_sums) {
        const Spread<T> spread(group);
        if (!spread.narrow()) return add_wide_sums(group, row_sums, col_sums);
        T col_sum[kTile] = {};
        for (index_t i = 0; i < group.rows; ++i) {
            T* s = group.row(i);
            T row_sum = 0;
            for (index_t j = 0; j < group.cols; ++j) {
                s[j] = std::exp2(s[j] - spread.high);
                row_sum += s[j];
                col_sum[j] += s[j];
            }
            row_sums[i].add(spread.high, row_sum);
        }
        for (index_t j = 0; j < group.cols; ++j) col_sums[j].add(spread.high, col_sum[j]);
    }

    static void add_wide_sums(const Group<T>& group, ShiftedSum<T>* row_sums, ShiftedSum<T>* col_sums) {
        for (index_t i = 0; i < group.rows; ++i)
            for (index_t j = 0; j < group.cols; ++j) {
                if (j == group.positive + i) continue;
                const T logit = group.row(i)[j];
                // A shift is finite, so an infinite logit stays in the sum, and a NaN does too.
                row_sums[i].add(std::isnan(logit) ? T(0) : logit, term(logit));
                col_sums[j].add(std::isnan(logit) ? T(0) : logit, term(logit));
            }
    }

    // exp2(logit - its own shift): 1, or 0 for -inf, inf for +inf, NaN for NaN.
    static T term(T logit) {
        constexpr T infinity = std::numeric_limits<T>::infinity();
        return std::isnan(logit) || logit == infinity ? logit : T(logit != -infinity);
    }

    // Replaces the group's logits, the first of which is at (first, column), by G.
    static void form_gradient(const Group<T>& group, const Weights& in, index_t first, index_t column) {
        const T* row_lse = static_cast<const T*>(in.row_lse) + first;
        const T* col_lse = static_cast<const T*>(in.col_lse) + column;
        const T* row_weight = static_cast<const T*>(in.row_weight) + first;
        const T* col_weight = static_cast<const T*>(in.col_weight) + column;
        const T* positive_weight = static_cast<const T*>(in.positive_weight) + first;
        const Spread<T> spread(group);
        T factor[kTile];
        if (spread.narrow())
            for (index_t j = 0; j < group.cols; ++j)
                factor[j] = col_weight[j] * std::exp2(spread.high - col_lse[j]);
        for (index_t i = 0; i < group.rows; ++i) {
            T* s = group.row(i);
            if (spread.narrow()) {
                const T row_factor = row_weight[i] * std::exp2(spread.high - row_lse[i]);
                for (index_t j = 0; j < group.cols; ++j)
                    s[j] = std::exp2(s[j] - spread.high) * (row_factor + factor[j]);
            } else {
                for (index_t j = 0; j < group.cols; ++j)
                    s[j] = row_weight[i] * std::exp2(s[j] - row_lse[i]) +
                           col_weight[j] * std::exp2(s[j] - col_lse[j]);
            }
        }
        group.for_positives([&](index_t i, T& logit) { logit = positive_weight[i]; });
    }

    // out[rows][d] = G y for `rows` rows of G.
    void times_y(int worker, const T* gradient, index_t width, index_t rows, T* out) {
        const index_t d = block_.d();
        T* y = &y_tile_[worker * kTile * d];
        std::fill(out, out + rows * d, T(0));
        for (index_t tile = 0; tile < tiles_; ++tile) {
            load_rows<Element>(block_.y, tile * kTile, tile_cols(tile), y);
            multiply(rows, d, tile_cols(tile), gradient + tile * kTile, width, index_t{1}, y, d, out, d);
        }
    }

    Block block_;
    int threads_;
    T scale_;
    T scale2_, scale2_rest_, bias2_;  // log2 units; the rest keeps the rounding of scale2 from shifting every logit
    index_t panel_, tiles_;
    std::unique_ptr<T[]> x_panel_;  // [panel, d]
    std::unique_ptr<T[]> y_tile_;   // a worker's tile, [d, kTile] or [kTile, d]
    std::unique_ptr<T[]> s_;        // a worker's logits, [panel, kTile]
};

}  // namespace clipfast
