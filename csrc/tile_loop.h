// The blockwise symmetric cross-entropy statistics and their gradient, forward and backward: the algorithm, once, for
// any instruction set and compute type T. What is computed: clipfast/backends/__init__.py.
//
// The logits go in chunks, a chunk in panels of kWidth columns, a panel in groups of up to kGroup rows. A thread forms a
// group by a register-blocked product (tiles.h), and the epilogue runs on it while it is in the first-level cache
// (logits.h). Forward costs one product. Backward forms G of a chunk, all panels in memory, then adds G y to dx and
// G^T x to dy: three products. Every number is written by one task and added up in one order, whatever the threads do.
#pragma once

#include "kernels.h"
#include "logits.h"
#include "parallel.h"

namespace clipfast {
namespace {

constexpr index_t kChunkRows = 4096;       // at most
constexpr index_t kChunkBytes = 16 << 20;  // of G, about
constexpr index_t kTaskRows = 512;         // rows (or columns, for dy) of one task

template <class Isa, class T, class Element>
class Kernel {
    using Tiles = Tile<Isa, T>;
    using V = typename Tiles::V;
    static constexpr int W = Tiles::W, kRows = Tiles::kRows;
    static constexpr index_t kWidth = Tiles::kWidth;
    static_assert(kTaskRows % kGroup == 0 && kWidth % kRows == 0);

  public:
    Kernel(const Block& block, int threads)
        : block_(block),
          threads_(std::clamp<index_t>(2 * block.n() * block.m() * block.d() / kFlopsPerThread, 1, threads)),
          scale_(T(block.scale)),
          logits_(block),
          chunk_rows_(round_up(std::min(block.n(), kChunkRows), kGroup)),
          chunk_cols_(std::min(round_up(block.m(), kWidth),
                               round_up(kChunkBytes / (chunk_rows_ * index_t{sizeof(T)}), kWidth))) {}

    void forward(const Statistics& out) {
        const index_t n = block_.n(), m = block_.m(), d = block_.d();
        Team team(threads_);
        Buffer<T> x_pack(chunk_rows_ * d), y_pack(threads_ * kWidth * d), s(threads_ * kGroup * kWidth);
        const index_t slots = chunk_cols_ / kWidth, row_blocks = ceil_div(chunk_rows_, kTaskRows);
        // A row's sums per panel of a chunk, a column's per block of rows.
        Sums<Isa, T> rows_sums(slots, chunk_rows_), cols_sums(row_blocks, round_up(m, kWidth));
        std::fill(out.positive, out.positive + n, 0.0);
        for (index_t first = 0; first < n; first += chunk_rows_) {
            const index_t rows = std::min(chunk_rows_, n - first);
            pack_x(team, first, rows, x_pack.get());
            rows_sums.clear();
            for (index_t column = 0; column < m; column += chunk_cols_) {
                const index_t panels = ceil_div(std::min(chunk_cols_, m - column), kWidth);
                const index_t blocks = ceil_div(rows, kTaskRows);
                team.for_each(blocks * panels, [&](int worker, index_t task) {
                    const index_t panel = task / blocks, block = task % blocks, row = block * kTaskRows;
                    const index_t panel_column = column + panel * kWidth, cols = std::min(kWidth, m - panel_column);
                    T* y = y_pack.get() + worker * kWidth * d;
                    T* buffer = s.get() + worker * kGroup * kWidth;
                    Tiles::with_vectors(cols, [&](auto vectors) {
                        constexpr int NV = vectors.value;
                        Tiles::template pack_transposed<Element>(block_.y, panel_column, cols, NV * W, y);
                        for (index_t r = row; r < std::min(rows, row + kTaskRows); r += kGroup) {
                            Group<Isa, T, NV> group{buffer, std::min(kGroup, rows - r), cols,
                                            first + r + block_.diag_offset - panel_column};
                            logits_.form(group, x_pack.get() + r * d, y);
                            group.for_positives([&](index_t i, T& logit) {
                                out.positive[first + r + i] = double(logit) * kLn2;
                            });
                            logits_.add_sums(group, rows_sums, panel, r, cols_sums, block, panel_column);
                        }
                    });
                });
            }
            team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
                const index_t end = std::min(rows, (group + 1) * kGroup);
                rows_sums.log_merged(group * kGroup, end, out.row_lse + first);
            });
        }
        team.for_each(ceil_div(m, kTaskRows), [&](int, index_t task) {
            cols_sums.log_merged(task * kTaskRows, std::min(m, (task + 1) * kTaskRows), out.col_lse);
        });
    }

    // Returns dscale.
    double backward(const Weights& in, const Gradients& out) {
        const index_t n = block_.n(), m = block_.m(), d = block_.d();
        Team team(threads_);
        Buffer<T> x_pack(chunk_rows_ * d), y_pack(threads_ * kWidth * std::max(d, Tiles::kDepth));
        Buffer<T> gradient(chunk_rows_ * chunk_cols_);
        Buffer<T> dx_apart(kApart ? chunk_rows_ * d : 0), dy_apart(kApart ? m * d : 0);
        T* dy = kApart ? dy_apart.get() : static_cast<T*>(out.dy);
        team.for_each(ceil_div(m, kTaskRows), [&](int, index_t task) {
            std::fill(dy + task * kTaskRows * d, dy + std::min(m, (task + 1) * kTaskRows) * d, T(0));
        });
        std::vector<double> dots(ceil_div(n, kGroup));
        for (index_t first = 0; first < n; first += chunk_rows_) {
            const index_t rows = std::min(chunk_rows_, n - first);
            T* dx = kApart ? dx_apart.get() : static_cast<T*>(out.dx) + first * d;
            pack_x(team, first, rows, x_pack.get());
            team.for_each(ceil_div(rows, kTaskRows), [&](int, index_t task) {
                std::fill(dx + task * kTaskRows * d, dx + std::min(rows, (task + 1) * kTaskRows) * d, T(0));
            });
            for (index_t column = 0; column < m; column += chunk_cols_) {
                const index_t cols = std::min(chunk_cols_, m - column);
                form_gradient(team, in, first, rows, column, cols, x_pack.get(), y_pack.get(), gradient.get());
                add_products(team, first, rows, column, cols, gradient.get(), y_pack.get(), dx, dy + column * d);
            }
            team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
                const index_t row = group * kGroup;
                dots[first / kGroup + group] = finish_rows(
                    first + row, std::min(kGroup, rows - row), dx + row * d, static_cast<Element*>(out.dx));
            });
        }
        team.for_each(ceil_div(m, kGroup), [&](int, index_t group) {
            const index_t end = std::min(m, (group + 1) * kGroup) * d;
            for (index_t i = group * kGroup * d; i < end; ++i)
                static_cast<Element*>(out.dy)[i] = store<Element>(scale_ * dy[i]);
        });
        double dscale = 0;
        for (const double dot : dots) dscale += dot;
        return dscale;
    }

    // What a backward pass holds at most, apart from its outputs.
    index_t workspace_bytes() const {
        const index_t d = block_.d();
        const index_t apart = kApart ? (chunk_rows_ + block_.m()) * d : 0;
        const index_t packs = chunk_rows_ * d + threads_ * kWidth * std::max(d, Tiles::kDepth);
        return index_t{sizeof(T)} * (chunk_rows_ * chunk_cols_ + packs + apart);
    }

  private:
    static constexpr bool kApart = !std::is_same_v<T, Element>;  // gradients are added up in T and rounded once
    static constexpr index_t kFlopsPerThread = 4'000'000;        // below it a thread costs more than it brings

    void pack_x(Team& team, index_t first, index_t rows, T* x_pack) const {
        team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
            const index_t row = group * kGroup;
            Tiles::template pack_transposed<Element>(block_.x, first + row, std::min(kGroup, rows - row), kRows,
                                                     x_pack + row * block_.d());
        });
    }

    // G of a chunk, [panel][chunk_rows_][kWidth]; columns beyond the last are zero.
    void form_gradient(Team& team, const Weights& in, index_t first, index_t rows, index_t column, index_t cols,
                       const T* x_pack, T* y_pack, T* gradient) const {
        const index_t d = block_.d(), blocks = ceil_div(rows, kTaskRows);
        team.for_each(blocks * ceil_div(cols, kWidth), [&](int worker, index_t task) {
            const index_t panel = task / blocks, row = task % blocks * kTaskRows;
            const index_t panel_column = column + panel * kWidth, count = std::min(kWidth, cols - panel * kWidth);
            T* y = y_pack + worker * kWidth * std::max(d, Tiles::kDepth);
            Tiles::with_vectors(count, [&](auto vectors) {
                constexpr int NV = vectors.value;
                Tiles::template pack_transposed<Element>(block_.y, panel_column, count, NV * W, y);
                for (index_t r = row; r < std::min(rows, row + kTaskRows); r += kGroup) {
                    Group<Isa, T, NV> group{gradient + (panel * chunk_rows_ + r) * kWidth, std::min(kGroup, rows - r), count,
                                    first + r + block_.diag_offset - panel_column};
                    logits_.form(group, x_pack + r * d, y);
                    logits_.to_gradient(group, in, first + r, panel_column);
                }
            });
        });
    }

    // dx += G y and dy += G^T x for a chunk. A task adds to kTaskRows rows and one panel of the d columns.
    void add_products(Team& team, index_t first, index_t rows, index_t column, index_t cols, const T* gradient,
                      T* packs, T* dx, T* dy) const {
        const index_t d = block_.d(), panels_d = ceil_div(d, kWidth), panel_size = chunk_rows_ * kWidth;
        const index_t dx_tasks = ceil_div(rows, kTaskRows) * panels_d, dy_rows = round_up(kTaskRows, kWidth);
        const index_t dy_tasks = ceil_div(cols, dy_rows) * panels_d;
        const index_t dx_depth = Tiles::depth(block_.m()), dy_depth = Tiles::depth(block_.n());
        team.for_each(dx_tasks + dy_tasks, [&](int worker, index_t task) {
            T* pack = packs + worker * kWidth * std::max(d, Tiles::kDepth);
            const bool for_dx = task < dx_tasks;
            const index_t block = (for_dx ? task : task - dx_tasks) / panels_d, c = task % panels_d * kWidth;
            const index_t count = std::min(kWidth, d - c);
            Tiles::with_vectors(count, [&](auto vectors) {
                constexpr int NV = vectors.value;
                if (for_dx) {
                    const index_t end = std::min(rows, (block + 1) * kTaskRows);
                    for (index_t k = 0; k < cols; k += dx_depth) {
                        const index_t terms = std::min(dx_depth, cols - k), runs = ceil_div(terms, kWidth);
                        Tiles::template pack_rows<Element>(block_.y, column + k, terms, c, count, NV * W, pack);
                        std::fill(pack + terms * NV * W, pack + runs * kWidth * NV * W, T(0));
                        for (index_t i = block * kTaskRows; i < end; i += kRows)
                            Tiles::template add_product<NV, kWidth, 1>(
                                runs, kWidth, gradient + k / kWidth * panel_size + i * kWidth, panel_size, pack,
                                dx + i * d + c, d, end - i, count);
                    }
                } else {
                    const index_t end = std::min(cols, (block + 1) * dy_rows);
                    for (index_t k = 0; k < rows; k += dy_depth) {
                        const index_t terms = std::min(dy_depth, rows - k);
                        Tiles::template pack_rows<Element>(block_.x, first + k, terms, c, count, NV * W, pack);
                        for (index_t j = block * dy_rows; j < end; j += kRows)
                            Tiles::template add_product<NV, 1, kWidth>(
                                1, terms, gradient + j / kWidth * panel_size + k * kWidth + j % kWidth, 0, pack,
                                dy + j * d + c, d, end - j, count);
                    }
                }
            });
        });
    }

    // Writes dx = scale G y of `count` rows and returns their part of dscale.
    double finish_rows(index_t first, index_t count, const T* gradient_y, Element* dx) const {
        using Double = Vector<double, W>;
        const index_t d = block_.d();
        Double dot = {};
        for (index_t i = 0; i < count; ++i, gradient_y += d) {
            const Element* x = static_cast<const Element*>(block_.x.data) + (first + i) * block_.x.row_stride;
            for (index_t c = 0; c < d; c += W) {
                const V product = Tiles::load_elements(gradient_y + c, 1, d - c);
                const V row = Tiles::load_elements(x + c * block_.x.col_stride, block_.x.col_stride, d - c);
                dot += __builtin_convertvector(product, Double) * __builtin_convertvector(row, Double);
                const V scaled = scale_ * product;
                for (index_t l = 0; l < std::min<index_t>(W, d - c); ++l)
                    dx[(first + i) * d + c + l] = store<Element>(T(scaled[l]));
            }
        }
        return reduce<double, W>(dot, [](auto a, auto b) { return a + b; });
    }

    Block block_;
    int threads_;
    T scale_;
    Logits<Isa, T> logits_;
    index_t chunk_rows_, chunk_cols_;
};

}  // namespace
}  // namespace clipfast
