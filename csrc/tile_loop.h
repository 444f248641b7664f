// The blockwise symmetric cross-entropy statistics and their gradient, forward and backward: the algorithm, once, for
// any instruction set and compute type T. What is computed: clipfast/backends/__init__.py.
//
// The logits go in chunks, a chunk in panels of kWidth columns, a panel in groups of up to kGroup rows. A thread forms a
// group by a register-blocked product (tiles.h), and the epilogue runs on it while it is in the first-level cache
// (logits.h). Forward costs one product. Backward forms G of a chunk, all panels in memory, then adds G y to dx and
// G^T x to dy: three products. Every number is written by one task and added up in one order, whatever the threads do.
//
// Operands are packed once per chunk. A task's left operand stays in the second-level cache (kBlockBytes), so that what
// it reads from beyond is a small part of what it computes.
#pragma once

#include "kernels.h"
#include "logits.h"
#include "parallel.h"

namespace clipfast {
namespace {

constexpr index_t kChunkRows = 4096;         // at most
constexpr index_t kChunkBytes = 16 << 20;    // of G, about
constexpr index_t kBlockBytes = 512 << 10;   // of a task's left operand, at most
constexpr index_t kBlockRows = 256;          // of a task, at most
constexpr index_t kTasksPerThread = 4;       // at least, where there is so much to do
constexpr index_t kFlopsPerThread = 1'000'000;  // below it a thread costs more than it brings

template <class Isa, class T, class Element>
class Kernel {
    using Tiles = Tile<Isa, T>;
    using V = typename Tiles::V;
    static constexpr int W = Tiles::W, kRows = Tiles::kRows;
    static constexpr index_t kWidth = Tiles::kWidth;
    static constexpr index_t kBlockCols = kBlockRows / kWidth * kWidth;
    static constexpr bool kApart = !std::is_same_v<T, Element>;  // gradients are added up in T and rounded once
    static_assert(kBlockRows % kGroup == 0 && kWidth % kRows == 0);

  public:
    Kernel(const Block& block, int threads)
        : block_(block),
          d_(block.d()),
          threads_(std::clamp<index_t>(2 * block.n() * block.m() * d_ / kFlopsPerThread, 1, threads)),
          scale_(T(block.scale)),
          logits_(block),
          chunk_rows_(round_up(std::min(block.n(), kChunkRows), kGroup)),
          chunk_cols_(std::min(round_up(block.m(), kWidth),
                               round_up(kChunkBytes / (chunk_rows_ * index_t{sizeof(T)}), kWidth))),
          block_rows_(std::clamp(kBlockBytes / (d_ * index_t{sizeof(T)}) / kGroup * kGroup, kGroup, kBlockRows)) {}

    void forward(const Statistics& out) {
        const index_t n = block_.n(), m = block_.m();
        Team team(threads_);
        Buffer<T> memory(forward_size());
        T *x_pack = memory.take(chunk_rows_ * d_), *y_pack = memory.take(chunk_cols_ * d_);
        T* logits = memory.take(threads_ * kGroup * kWidth);
        // A row's sums per panel of a chunk, a column's per block of rows.
        Sums<Isa, T> rows_sums(chunk_cols_ / kWidth, chunk_rows_);
        Sums<Isa, T> cols_sums(ceil_div(chunk_rows_, block_rows_), round_up(m, kWidth));
        std::fill(out.positive, out.positive + n, 0.0);
        for (index_t first = 0; first < n; first += chunk_rows_) {
            const index_t rows = std::min(chunk_rows_, n - first);
            pack_left(team, first, rows, x_pack);
            rows_sums.clear();
            for (index_t column = 0; column < m; column += chunk_cols_) {
                const index_t cols = std::min(chunk_cols_, m - column);
                pack_right(team, column, cols, y_pack);
                for_groups(team, first, rows, column, cols, [&](int worker, auto group, index_t row, index_t panel) {
                    group.s = logits + worker * kGroup * kWidth;
                    logits_.form(group, x_pack + row * d_, y_pack + panel * kWidth * d_);
                    group.for_positives([&](index_t i, T& logit) {
                        out.positive[first + row + i] = double(logit) * kLn2;
                    });
                    logits_.add_sums(group, rows_sums, panel, row, cols_sums, row / block_rows_,
                                     column + panel * kWidth);
                });
            }
            team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
                const index_t end = std::min(rows, (group + 1) * kGroup);
                rows_sums.log_merged(group * kGroup, end, out.row_lse + first);
            });
        }
        team.for_each(ceil_div(m, kBlockCols), [&](int, index_t task) {
            cols_sums.log_merged(task * kBlockCols, std::min(m, (task + 1) * kBlockCols), out.col_lse);
        });
    }

    // Returns dscale.
    double backward(const Weights& in, const Gradients& out) {
        const index_t n = block_.n(), m = block_.m(), width_d = round_up(d_, kWidth);
        Team team(threads_);
        Buffer<T> memory(backward_size());
        T *x_pack = memory.take(chunk_rows_ * d_), *y_pack = memory.take(chunk_cols_ * d_);
        T *x_rows = memory.take(chunk_rows_ * width_d), *y_rows = memory.take(chunk_cols_ * width_d);
        T* gradient = memory.take(chunk_rows_ * chunk_cols_);
        T* dx_apart = kApart ? memory.take(chunk_rows_ * d_) : nullptr;
        T* dy = kApart ? memory.take(m * d_) : static_cast<T*>(out.dy);
        const Side<T> rows_side = round_side(team, in.row_lse, in.row_weight, n, memory);
        const Side<T> cols_side = round_side(team, in.col_lse, in.col_weight, m, memory);
        clear(team, m, dy);
        std::vector<double> dots(ceil_div(n, kGroup));
        for (index_t first = 0; first < n; first += chunk_rows_) {
            const index_t rows = std::min(chunk_rows_, n - first);
            T* dx = kApart ? dx_apart : static_cast<T*>(out.dx) + first * d_;
            clear(team, rows, dx);
            pack_left(team, first, rows, x_pack);
            pack_rows(team, block_.x, first, rows, chunk_rows_, x_rows);
            for (index_t column = 0; column < m; column += chunk_cols_) {
                const index_t cols = std::min(chunk_cols_, m - column);
                pack_right(team, column, cols, y_pack);
                pack_rows(team, block_.y, column, cols, chunk_cols_, y_rows);
                for_groups(team, first, rows, column, cols, [&](int, auto group, index_t row, index_t panel) {
                    group.s = gradient + (panel * chunk_rows_ + row) * kWidth;
                    logits_.form(group, x_pack + row * d_, y_pack + panel * kWidth * d_);
                    logits_.to_gradient(group, rows_side, cols_side, in.positive_weight, first + row,
                                        column + panel * kWidth);
                });
                add_products(team, rows, cols, gradient, x_rows, y_rows, dx, dy + column * d_);
            }
            team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
                const index_t row = group * kGroup;
                dots[first / kGroup + group] = finish_rows(first + row, std::min(kGroup, rows - row), dx + row * d_,
                                                           static_cast<Element*>(out.dx));
            });
        }
        team.for_each(ceil_div(m, kGroup), [&](int, index_t group) {
            const index_t end = std::min(m, (group + 1) * kGroup) * d_;
            for (index_t i = group * kGroup * d_; i < end; ++i)
                static_cast<Element*>(out.dy)[i] = store<Element>(scale_ * dy[i]);
        });
        double dscale = 0;
        for (const double dot : dots) dscale += dot;
        return dscale;
    }

    // What a pass holds at most, apart from its outputs.
    index_t workspace_bytes() const { return index_t{sizeof(T)} * std::max(forward_size(), backward_size()); }

  private:
    // In numbers of type T, all buffers that grow with the block.
    index_t forward_size() const {
        return (chunk_rows_ + chunk_cols_) * d_ + threads_ * kGroup * kWidth + kBufferSlack<T>;
    }
    index_t backward_size() const {
        const index_t apart = kApart ? (chunk_rows_ + block_.m()) * d_ : 0;
        const index_t packs = (chunk_rows_ + chunk_cols_) * (d_ + round_up(d_, kWidth));
        const index_t sides = 2 * (block_.n() + block_.m());
        return chunk_rows_ * chunk_cols_ + packs + apart + sides + kBufferSlack<T>;
    }

    static Side<T> round_side(Team& team, const double* lse, const double* weight, index_t count, Buffer<T>& memory) {
        T *rounded_lse = memory.take(count), *rounded_weight = memory.take(count);
        team.for_each(ceil_div(count, kBlockRows), [&](int, index_t task) {
            const index_t begin = task * kBlockRows, end = std::min(count, begin + kBlockRows);
            Side<T>::round(lse, weight, begin, end, rounded_lse, rounded_weight);
        });
        return {rounded_lse, rounded_weight};
    }

    // Rows of x as the left operand of x y^T: [row / kRows][d][kRows].
    void pack_left(Team& team, index_t first, index_t rows, T* out) const {
        team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
            const index_t row = group * kGroup, count = std::min(kGroup, rows - row);
            Tiles::template pack_transposed<Element, kRows>(block_.x, first + row, count, out + row * d_);
        });
    }

    // Rows of y as its right operand: a panel after the other, [d][the panel's width].
    void pack_right(Team& team, index_t column, index_t cols, T* out) const {
        team.for_each(ceil_div(cols, kWidth), [&](int, index_t panel) {
            const index_t first = panel * kWidth, count = std::min(kWidth, cols - first);
            Tiles::with_vectors(count, [&](auto vectors) {
                Tiles::template pack_transposed<Element, vectors.value * W>(block_.y, column + first, count,
                                                                           out + first * d_);
            });
        });
    }

    // Rows of a as the right operand of G y and G^T x: [d / kWidth][capacity][the panel's width].
    void pack_rows(Team& team, const Matrix& a, index_t first, index_t rows, index_t capacity, T* out) const {
        const index_t blocks = ceil_div(rows, kBlockRows);
        team.for_each(blocks * ceil_div(d_, kWidth), [&](int, index_t task) {
            const index_t col = task / blocks * kWidth, row = task % blocks * kBlockRows;
            const index_t cols = std::min(kWidth, d_ - col), width = round_up(cols, W);
            Tiles::template pack_rows<Element>(a, first + row, std::min(kBlockRows, rows - row), col, cols, width,
                                               out + col * capacity + row * width);
        });
    }

    void clear(Team& team, index_t rows, T* gradient) const {
        team.for_each(ceil_div(rows, kBlockRows), [&](int, index_t task) {
            const index_t end = std::min(rows, (task + 1) * kBlockRows);
            std::fill(gradient + task * kBlockRows * d_, gradient + end * d_, T(0));
        });
    }

    // In how many parts to do what `blocks` tasks would do, so that there are tasks for all threads.
    index_t parts(index_t blocks, index_t panels) const {
        return std::clamp(ceil_div(kTasksPerThread * threads_, blocks), index_t{1}, panels);
    }

    // Calls visit(worker, group without its logits, row, panel) for all groups of a chunk.
    template <class Visit>
    void for_groups(Team& team, index_t first, index_t rows, index_t column, index_t cols, const Visit& visit) const {
        const index_t panels = ceil_div(cols, kWidth), blocks = ceil_div(rows, block_rows_);
        const index_t share = ceil_div(panels, parts(blocks, panels));
        team.for_each(blocks * ceil_div(panels, share), [&](int worker, index_t task) {
            const index_t row = task % blocks * block_rows_, begin = task / blocks * share;
            for (index_t panel = begin; panel < std::min(panels, begin + share); ++panel) {
                const index_t count = std::min(kWidth, cols - panel * kWidth);
                Tiles::with_vectors(count, [&](auto vectors) {
                    for (index_t r = row; r < std::min(rows, row + block_rows_); r += kGroup)
                        visit(worker,
                              Group<Isa, T, vectors.value>{nullptr, std::min(kGroup, rows - r), count,
                                                           first + r + block_.diag_offset - column - panel * kWidth},
                              r, panel);
                });
            }
        });
    }

    // dx += G y and dy += G^T x for a chunk. A task has a block of rows of dx or dy, and a part of the d columns.
    void add_products(Team& team, index_t rows, index_t cols, const T* gradient, const T* x_rows, const T* y_rows,
                      T* dx, T* dy) const {
        const index_t panels = ceil_div(d_, kWidth), panel_size = chunk_rows_ * kWidth;
        const index_t dx_blocks = ceil_div(rows, kBlockRows), dy_blocks = ceil_div(cols, kBlockCols);
        const index_t share = ceil_div(panels, parts(dx_blocks + dy_blocks, panels));
        const index_t dx_depth = Tiles::depth(block_.m()), dy_depth = Tiles::depth(block_.n());
        // The blocks of dy come first: they are larger.
        team.for_each((dx_blocks + dy_blocks) * ceil_div(panels, share), [&](int, index_t task) {
            const index_t block = task % (dx_blocks + dy_blocks), part = task / (dx_blocks + dy_blocks);
            const index_t begin = part * share, end = std::min(panels, begin + share);
            if (block < dy_blocks) {
                const index_t first = block * kBlockCols, last = std::min(cols, first + kBlockCols);
                for (index_t k = 0; k < rows; k += dy_depth)
                    for_panels(begin, end, [&](auto vectors, index_t c, index_t count) {
                        constexpr int NV = vectors.value;
                        for (index_t j = first; j < last; j += kRows)
                            Tiles::template add_product<NV, 1, kWidth>(
                                1, std::min(dy_depth, rows - k),
                                gradient + j / kWidth * panel_size + k * kWidth + j % kWidth, 0,
                                x_rows + c * chunk_rows_ + k * NV * W, dy + j * d_ + c, d_, last - j, count);
                    });
            } else {
                const index_t first = (block - dy_blocks) * kBlockRows, last = std::min(rows, first + kBlockRows);
                for (index_t k = 0; k < cols; k += dx_depth)
                    for_panels(begin, end, [&](auto vectors, index_t c, index_t count) {
                        constexpr int NV = vectors.value;
                        // Whole panels of G, then what is left.
                        const index_t terms = std::min(dx_depth, cols - k), whole = terms / kWidth * kWidth;
                        const T *g = gradient + k / kWidth * panel_size, *y = y_rows + c * chunk_cols_ + k * NV * W;
                        for (index_t i = first; i < last; i += kRows) {
                            if (whole)
                                Tiles::template add_product<NV, kWidth, 1>(whole / kWidth, kWidth, g + i * kWidth,
                                                                           panel_size, y, dx + i * d_ + c, d_,
                                                                           last - i, count);
                            if (whole < terms)
                                Tiles::template add_product<NV, kWidth, 1>(
                                    1, terms - whole, g + whole * chunk_rows_ + i * kWidth, 0, y + whole * NV * W,
                                    dx + i * d_ + c, d_, last - i, count);
                        }
                    });
            }
        });
    }

    // Calls visit(std::integral_constant<int, vectors>, first column, columns) for panels of the d columns.
    template <class Visit>
    void for_panels(index_t begin, index_t end, const Visit& visit) const {
        for (index_t panel = begin; panel < end; ++panel) {
            const index_t c = panel * kWidth, count = std::min(kWidth, d_ - c);
            Tiles::with_vectors(count, [&](auto vectors) { visit(vectors, c, count); });
        }
    }

    // Writes dx = scale G y of `count` rows and returns their part of dscale.
    double finish_rows(index_t first, index_t count, const T* gradient_y, Element* dx) const {
        using Double = Vector<double, W>;
        Double dot = {};
        for (index_t i = 0; i < count; ++i, gradient_y += d_) {
            for (index_t c = 0; c < d_; c += W) {
                const V product = Tiles::load_elements(gradient_y + c, 1, d_ - c);
                const V row = Tiles::load_elements(Tiles::template element<Element>(block_.x, first + i, c),
                                                   block_.x.col_stride, d_ - c);
                dot += __builtin_convertvector(product, Double) * __builtin_convertvector(row, Double);
                Tiles::store_elements(dx + (first + i) * d_ + c, scale_ * product, d_ - c);
            }
        }
        return reduce<double, W>(dot, [](auto a, auto b) { return a + b; });
    }

    Block block_;
    index_t d_;
    int threads_;
    T scale_;
    Logits<Isa, T> logits_;
    index_t chunk_rows_, chunk_cols_;
    index_t block_rows_;  // of a task that forms logits
};

}  // namespace
}  // namespace clipfast
