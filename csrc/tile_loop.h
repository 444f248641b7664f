// The blockwise symmetric cross-entropy statistics and their gradient, forward and backward: the algorithm, once, for
// any kind of product (tiles.h). What is computed: clipfast/backends/__init__.py.
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

template <class Tiles, class Element>
class Kernel {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    using Operand = typename Tiles::Operand;
    using Gradient = typename Tiles::Gradient;
    static constexpr int W = Tiles::W, kRows = Tiles::kRows;
    static constexpr index_t kWidth = Tiles::kWidth;
    static constexpr index_t kBlockCols = kBlockRows / kWidth * kWidth;
    static constexpr bool kApart = !std::is_same_v<T, Element>;  // gradients are added up in T and rounded once
    static_assert(kBlockRows % kGroup == 0);

  public:
    Kernel(const Block& block, int threads)
        : block_(block),
          d_(block.d()),
          row_size_(Tiles::operands(d_)),
          threads_(std::clamp<index_t>(2 * block.n() * block.m() * d_ / kFlopsPerThread, 1, threads)),
          scale_(T(block.scale)),
          logits_(block),
          chunk_rows_(round_up(std::min(block.n(), kChunkRows), kGroup)),
          chunk_cols_(std::min(round_up(block.m(), kWidth),
                               round_up(kChunkBytes / (chunk_rows_ * index_t{sizeof(T)}), kWidth))),
          block_rows_(std::clamp(kBlockBytes / (row_size_ * index_t{sizeof(Operand)}) / kGroup * kGroup, kGroup, kBlockRows)) {}

    void forward(const Statistics& out) {
        const index_t n = block_.n(), m = block_.m();
        Team team(threads_);
        Buffer memory(forward_bytes());
        Operand *x_pack = memory.take<Operand>(chunk_rows_ * row_size_), *y_pack = memory.take<Operand>(chunk_cols_ * row_size_);
        T* logits = memory.take<T>(threads_ * kGroup * kWidth);
        // A row's sums per panel of a chunk, a column's per block of rows.
        Sums<T, W> rows_sums(chunk_cols_ / kWidth, chunk_rows_);
        Sums<T, W> cols_sums(ceil_div(chunk_rows_, block_rows_), round_up(m, kWidth));
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
                    logits_.form(group, x_pack + row * row_size_, y_pack + panel * kWidth * row_size_);
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
        const index_t n = block_.n(), m = block_.m(), width_d = round_up(d_, W);
        Team team(threads_);
        Buffer memory(backward_bytes());
        Operand *x_pack = memory.take<Operand>(chunk_rows_ * row_size_), *y_pack = memory.take<Operand>(chunk_cols_ * row_size_);
        Operand *x_rows = memory.take<Operand>(packed(chunk_rows_, width_d)), *y_rows = memory.take<Operand>(packed(chunk_cols_, width_d));
        const Gradient gradient(memory.take<Operand>(Gradient::operands(chunk_rows_, chunk_cols_)), chunk_rows_, chunk_cols_);
        T* logits = memory.take<T>(threads_ * kGroup * kWidth);
        T* dx_apart = kApart ? memory.take<T>(chunk_rows_ * d_) : nullptr;
        T* dy = kApart ? memory.take<T>(m * d_) : static_cast<T*>(out.dy);
        const Side<T> rows_side = round_side(team, in.row_lse, in.row_weight, n, memory);
        const Side<T> cols_side = round_side(team, in.col_lse, in.col_weight, m, memory);
        clear(team, m, dy);
        // The groups' parts of dscale = sum G x y^T: x^T (G y), or where the product rounds G, in float32 before that.
        double dscale = 0;
        const index_t panels = ceil_div(chunk_cols_, kWidth);
        std::vector<double> dots(chunk_rows_ / kGroup * (Tiles::kRounds ? panels : 1));
        for (index_t first = 0; first < n; first += chunk_rows_) {
            const index_t rows = std::min(chunk_rows_, n - first);
            T* dx = kApart ? dx_apart : static_cast<T*>(out.dx) + first * d_;
            clear(team, rows, dx);
            pack_left(team, first, rows, x_pack);
            pack_rows(team, block_.x, first, rows, Tiles::kRowStep, chunk_rows_, x_rows);
            for (index_t column = 0; column < m; column += chunk_cols_) {
                const index_t cols = std::min(chunk_cols_, m - column);
                pack_right(team, column, cols, y_pack);
                pack_rows(team, block_.y, column, cols, Tiles::kColStep, chunk_cols_, y_rows);
                for_groups(team, first, rows, column, cols, [&](int worker, auto group, index_t row, index_t panel) {
                    group.s = gradient.place(panel, row, logits + worker * kGroup * kWidth);
                    logits_.form(group, x_pack + row * row_size_, y_pack + panel * kWidth * row_size_);
                    const T dot = logits_.to_gradient(group, rows_side, cols_side, in.positive_weight, first + row,
                                                      column + panel * kWidth);
                    if constexpr (Tiles::kRounds) dots[row / kGroup * panels + panel] = logits_.product(dot);
                    gradient.keep(group, panel, row);
                });
                if constexpr (Tiles::kRounds) dscale += take_sum(dots);
                add_products(team, rows, cols, gradient, x_rows, y_rows, dx, dy + column * d_);
            }
            team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
                const index_t row = group * kGroup;
                const double dot = finish_rows(first + row, std::min(kGroup, rows - row), dx + row * d_,
                                               static_cast<Element*>(out.dx));
                if constexpr (!Tiles::kRounds) dots[group] = dot;
            });
            if constexpr (!Tiles::kRounds) dscale += take_sum(dots);
        }
        team.for_each(ceil_div(m, kGroup), [&](int, index_t group) {
            const index_t end = std::min(m, (group + 1) * kGroup) * d_;
            for (index_t i = group * kGroup * d_; i < end; ++i)
                static_cast<Element*>(out.dy)[i] = store<Element>(scale_ * dy[i]);
        });
        return dscale;
    }

    // What a pass holds at most, apart from its outputs.
    index_t workspace_bytes() const { return std::max(forward_bytes(), backward_bytes()); }

  private:
    // All buffers that grow with the block.
    index_t forward_bytes() const {
        return index_t{sizeof(Operand)} * (chunk_rows_ + chunk_cols_) * row_size_ +
               index_t{sizeof(T)} * threads_ * kGroup * kWidth + kBufferSlack;
    }
    index_t backward_bytes() const {
        const index_t gradient = Gradient::operands(chunk_rows_, chunk_cols_);
        const index_t width_d = round_up(d_, W), rows = packed(chunk_rows_, width_d) + packed(chunk_cols_, width_d);
        const index_t apart = kApart ? (chunk_rows_ + block_.m()) * d_ : 0;
        const index_t sides = 2 * (block_.n() + block_.m());
        return forward_bytes() + index_t{sizeof(Operand)} * (gradient + rows) + index_t{sizeof(T)} * (apart + sides);
    }
    // Operands in which `rows` rows by `cols` columns are packed for G y or G^T x.
    static index_t packed(index_t rows, index_t cols) { return Tiles::kParts * rows * cols / Tiles::kTerms; }

    // The sum of the parts that there were, and zeros in their place: the next chunk may have fewer.
    static double take_sum(std::vector<double>& parts) {
        const double sum = std::accumulate(parts.begin(), parts.end(), 0.0);
        std::fill(parts.begin(), parts.end(), 0.0);
        return sum;
    }

    static Side<T> round_side(Team& team, const double* lse, const double* weight, index_t count, Buffer& memory) {
        T *rounded_lse = memory.take<T>(count), *rounded_weight = memory.take<T>(count);
        team.for_each(ceil_div(count, kBlockRows), [&](int, index_t task) {
            const index_t begin = task * kBlockRows, end = std::min(count, begin + kBlockRows);
            Side<T>::round(lse, weight, begin, end, rounded_lse, rounded_weight);
        });
        return {rounded_lse, rounded_weight};
    }

    void pack_left(Team& team, index_t first, index_t rows, Operand* out) const {
        team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
            const index_t row = group * kGroup, count = std::min(kGroup, rows - row);
            Tiles::template pack_left<Element>(block_.x, first + row, count, out + row * row_size_);
        });
    }

    // A panel after the other.
    void pack_right(Team& team, index_t column, index_t cols, Operand* out) const {
        team.for_each(ceil_div(cols, kWidth), [&](int, index_t panel) {
            const index_t first = panel * kWidth, count = std::min(kWidth, cols - first);
            Tiles::with_vectors(count, [&](auto vectors) {
                Tiles::template pack_right<Element, vectors.value>(block_.y, column + first, count,
                                                                   out + first * row_size_);
            });
        });
    }

    // A panel of up to kWidth of the d columns after the other, zeros up to a multiple of `step` rows.
    void pack_rows(Team& team, const Matrix& a, index_t first, index_t rows, index_t step, index_t capacity,
                   Operand* out) const {
        const index_t blocks = ceil_div(rows, kBlockRows);
        team.for_each(blocks * ceil_div(d_, kWidth), [&](int, index_t task) {
            const index_t col = task / blocks * kWidth, row = task % blocks * kBlockRows;
            const index_t cols = std::min(kWidth, d_ - col), count = std::min(kBlockRows, rows - row);
            const index_t padded = row + count < rows ? count : round_up(rows, step) - row;
            Tiles::with_vectors(cols, [&](auto vectors) {
                Tiles::template pack_rows<Element, vectors.value>(a, first + row, count, padded, col, cols, row, capacity,
                                                                  out + packed(capacity, col));
            });
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
            [[maybe_unused]] const typename Tiles::Session session;
            const index_t row = task % blocks * block_rows_, begin = task / blocks * share;
            for (index_t panel = begin; panel < std::min(panels, begin + share); ++panel) {
                const index_t count = std::min(kWidth, cols - panel * kWidth);
                Tiles::with_vectors(count, [&](auto vectors) {
                    for (index_t r = row; r < std::min(rows, row + block_rows_); r += kGroup)
                        visit(worker,
                              Group<Tiles, vectors.value>{nullptr, std::min(kGroup, rows - r), count,
                                                           first + r + block_.diag_offset - column - panel * kWidth},
                              r, panel);
                });
            }
        });
    }

    // dx += G y and dy += G^T x for a chunk. A task has a block of rows of dx or dy, and a part of the d columns.
    void add_products(Team& team, index_t rows, index_t cols, const Gradient& gradient, const Operand* x_rows,
                      const Operand* y_rows, T* dx, T* dy) const {
        const index_t panels = ceil_div(d_, kWidth);
        const index_t dx_blocks = ceil_div(rows, kBlockRows), dy_blocks = ceil_div(cols, kBlockCols);
        const index_t share = ceil_div(panels, parts(dx_blocks + dy_blocks, panels));
        const index_t dx_depth = Tiles::depth(block_.m()), dy_depth = Tiles::depth(block_.n());
        // The blocks of dy come first: they are larger.
        team.for_each((dx_blocks + dy_blocks) * ceil_div(panels, share), [&](int, index_t task) {
            [[maybe_unused]] const typename Tiles::Session session;
            const index_t block = task % (dx_blocks + dy_blocks), part = task / (dx_blocks + dy_blocks);
            const index_t begin = part * share, end = std::min(panels, begin + share);
            if (block < dy_blocks) {
                const index_t first = block * kBlockCols, last = std::min(cols, first + kBlockCols);
                for (index_t k = 0; k < rows; k += dy_depth)
                    for_panels(begin, end, [&](auto vectors, index_t c, index_t count) {
                        const Operand* x = x_rows + packed(chunk_rows_, c);
                        for (index_t j = first; j < last; j += kRows)
                            gradient.template add_cols<vectors.value>(j, k, std::min(dy_depth, rows - k), x, chunk_rows_,
                                                                      dy + j * d_ + c, d_, last - j, count);
                    });
            } else {
                const index_t first = (block - dy_blocks) * kBlockRows, last = std::min(rows, first + kBlockRows);
                for (index_t k = 0; k < cols; k += dx_depth)
                    for_panels(begin, end, [&](auto vectors, index_t c, index_t count) {
                        const Operand* y = y_rows + packed(chunk_cols_, c);
                        for (index_t i = first; i < last; i += kRows)
                            gradient.template add_rows<vectors.value>(i, k, std::min(dx_depth, cols - k), y, chunk_cols_,
                                                                      dx + i * d_ + c, d_, last - i, count);
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
                const V row = Tiles::load_elements(element<Element>(block_.x, first + i, c),
                                                   block_.x.col_stride, d_ - c);
                dot += __builtin_convertvector(product, Double) * __builtin_convertvector(row, Double);
                Tiles::store_elements(dx + (first + i) * d_ + c, scale_ * product, d_ - c);
            }
        }
        return reduce<double, W>(dot, [](auto a, auto b) { return a + b; });
    }

    Block block_;
    index_t d_;
    index_t row_size_;  // operands per row of x or y in their product
    int threads_;
    T scale_;
    Logits<Tiles> logits_;
    index_t chunk_rows_, chunk_cols_;
    index_t block_rows_;  // of a task that forms logits
};

}  // namespace
}  // namespace clipfast
