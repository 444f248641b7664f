// The passes over a block's logits, once for every objective and any kind of product (tiles.h): form a group of logits,
// hand it to the objective while it is in the first-level cache, and where gradients are wanted take the products with
// the G that the objective made of it. What is computed: clipfast/backends/__init__.py.
//
// A scan costs one product. Gradients cost three, two where a scan has kept the logits: G of a chunk is formed whole,
// all panels in memory, then G y is added to dx and G^T x to dy. Every number is written by one task and added up in one
// order, whatever the threads do.
//
// An objective (softmax.h, sigmoid.h, ...) says which memory it needs (place), hears where the pass is (Objective), and
// takes a group (take) or replaces its logits by G (to_gradient). Where the product rounds G, to_gradient returns
// sum G (logit - bias), of G before that, in log2 units.
#pragma once

#include "chunks.h"
#include "kernels.h"

namespace clipfast {
namespace {

template <class Tiles, class Element>
class Kernel {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    using Operand = typename Tiles::Operand;
    using Gradient = typename Tiles::Gradient;
    using Doubles = typename Tiles::Doubles;
    static constexpr int W = Tiles::W, kRows = Tiles::kRows;
    static constexpr index_t kWidth = Tiles::kWidth;
    static constexpr bool kApart = !std::is_same_v<T, Element>;  // gradients are added up in T and rounded once

  public:
    Kernel(const Block& block, const Execution& execution)
        : block_(block),
          d_(block.d()),
          scale_(T(block.scale)),
          chunks_(block, execution.threads),
          rows_(block),
          team_({chunks_.threads, execution.interrupted}) {}

    const Chunks<Tiles>& chunks() const { return chunks_; }
    const Logits<Tiles>& logits() const { return rows_.logits(); }

    // Hands every group of logits to the objective, and keeps them where `keep` is memory for them.
    template <class Objective>
    void scan(Objective& objective, void* keep = nullptr) {
        const auto kept = Kept<Tiles>::begun(keep, chunks_.n, chunks_.m);
        const auto memory = Buffer::holding([&](Buffer& buffer) { place(buffer), objective.place(buffer); });
        team_.run([&] { scan_chunks(objective, kept); });
    }

    // The gradients of the objective, from the logits that a scan kept, if any; returns dscale.
    template <class Objective>
    double differentiate(Objective& objective, const Gradients& out, const void* keep = nullptr) {
        const auto kept = Kept<Tiles>::found(keep, chunks_.n);
        const auto memory = Buffer::holding([&](Buffer& buffer) { place_all(buffer, objective); });
        double dscale = 0;
        team_.run([&] { dscale = differentiate_chunks(objective, out, kept); });
        return dscale;
    }

    // A scan for the first objective, between(team), and the gradients of the second from the logits that the scan kept;
    // returns dscale.
    template <class First, class Between, class Second>
    double scan_and_differentiate(First& first, const Between& between, Second& second, const Gradients& out) {
        T* logits = nullptr;
        const auto memory = Buffer::holding([&](Buffer& buffer) { place_both(buffer, first, second, logits); });
        double dscale = 0;
        team_.run([&] {
            scan_chunks(first, Kept<Tiles>::begun(logits, chunks_.n, chunks_.m));
            between(team_);
            dscale = differentiate_chunks(second, out, Kept<Tiles>::found(logits, chunks_.n));
        });
        return dscale;
    }

    // Either, as gradients are wanted or not; returns dscale.
    template <class Objective>
    double run(Objective& objective, const Gradients& out) {
        if (out.dx) return differentiate(objective, out);
        scan(objective);
        return 0;
    }

    // What the passes hold, apart from their outputs.
    template <class Objective>
    index_t scan_bytes(Objective& objective) {
        return Buffer::bytes([&](Buffer& buffer) { place(buffer), objective.place(buffer); });
    }
    template <class Objective>
    index_t differentiate_bytes(Objective& objective) {
        return Buffer::bytes([&](Buffer& buffer) { place_all(buffer, objective); });
    }
    template <class First, class Second>
    index_t scan_and_differentiate_bytes(First& first, Second& second) {
        T* logits = nullptr;
        return Buffer::bytes([&](Buffer& buffer) { place_both(buffer, first, second, logits); });
    }

  private:
    template <class Objective>
    void scan_chunks(Objective& objective, const Kept<Tiles>& kept) {
        objective.begin(team_);
        for (index_t first = 0; first < chunks_.n; first += chunks_.rows) {
            const index_t rows = std::min(chunks_.rows, chunks_.n - first);
            rows_.pack_left(team_, first, rows);
            objective.begin_rows(team_, first, rows);
            for (index_t column = 0; column < chunks_.m; column += chunks_.cols) {
                const index_t cols = std::min(chunks_.cols, chunks_.m - column);
                rows_.pack_right(team_, column, cols);
                objective.begin_cols(team_, column, cols);
                chunks_.for_groups(team_, first, column, [&](auto& group, const Place& at) {
                    if (!objective.wants(group)) return;
                    group.s = scratch(at);
                    rows_.form(group, at);
                    if (kept) kept.keep(group, at);
                    objective.take(group, at);
                });
            }
            objective.end_rows(team_, first, rows);
        }
        objective.end(team_);
    }

    template <class Objective>
    double differentiate_chunks(Objective& objective, const Gradients& out, const Kept<Tiles>& kept) {
        double dscale = 0;
        objective.begin(team_);
        // Where the gradients are wanted as they are added up, they need no place apart.
        const bool apart = kApart && out.dtype == block_.dtype;
        const index_t element = apart ? index_t{sizeof(Element)} : index_t{sizeof(T)};
        ask_for_huge_pages(out.dx, chunks_.n * d_ * element), ask_for_huge_pages(out.dy, chunks_.m * d_ * element);
        T* const dy = apart ? dy_apart_ : static_cast<T*>(out.dy);
        for (index_t first = 0; first < chunks_.n; first += chunks_.rows) {
            const index_t rows = std::min(chunks_.rows, chunks_.n - first);
            T* const dx = apart ? dx_apart_ : static_cast<T*>(out.dx) + first * d_;
            if (!kept) rows_.pack_left(team_, first, rows);
            pack_rows(block_.x, first, rows, Tiles::kRowStep, row_capacity_, x_rows_);
            objective.begin_rows(team_, first, rows);
            for (index_t column = 0; column < chunks_.m; column += chunks_.cols) {
                const index_t cols = std::min(chunks_.cols, chunks_.m - column);
                if (!kept) rows_.pack_right(team_, column, cols);
                pack_rows(block_.y, column, cols, Tiles::kColStep, col_capacity_, y_rows_);
                objective.begin_cols(team_, column, cols);
                dscale += form_gradient(objective, kept, first, column);
                add_products({dx, d_, rows, d_, column == 0}, {dy + column * d_, d_, cols, d_, first == 0});
            }
            objective.end_rows(team_, first, rows);
            if (apart) dscale += finish_dx(first, rows, dx, static_cast<Element*>(out.dx));
            else dscale += finish_dx(first, rows, dx, static_cast<T*>(out.dx));
        }
        objective.end(team_);
        if (apart) finish_dy(dy, static_cast<Element*>(out.dy));
        else finish_dy(dy, static_cast<T*>(out.dy));
        return dscale;
    }

    void place(Buffer& buffer) {
        rows_.place(buffer, chunks_);
        scratch_ = buffer.take<T>(chunks_.threads * kGroup * kWidth);
    }
    template <class Objective>
    void place_all(Buffer& buffer, Objective& objective) {
        place(buffer), objective.place(buffer), place_products(buffer);
    }
    template <class First, class Second>
    void place_both(Buffer& buffer, First& first, Second& second, T*& logits) {
        place_all(buffer, second), first.place(buffer);
        logits = buffer.take<T>(kept_size(chunks_.n, chunks_.m));
    }
    void place_products(Buffer& buffer) {
        const index_t width_d = round_up(d_, W);
        row_capacity_ = round_up(chunks_.rows_held, Tiles::kRowStep);
        col_capacity_ = round_up(chunks_.cols_held, Tiles::kColStep);
        x_rows_ = buffer.take<Operand>(packed(row_capacity_, width_d));
        y_rows_ = buffer.take<Operand>(packed(col_capacity_, width_d));
        const index_t rows = round_up(row_capacity_, kRows), cols = round_up(col_capacity_, kWidth);
        gradient_ = Gradient(buffer.take<Operand>(Gradient::operands(rows, cols)), rows, cols);
        if constexpr (kApart) {
            dx_apart_ = buffer.take<T>(chunks_.rows_held * d_);
            dy_apart_ = buffer.take<T>(chunks_.m * d_);
        }
        dots_ = buffer.take<double>(dots());
    }

    // Operands in which `rows` rows by `cols` columns are packed for G y or G^T x.
    static index_t packed(index_t rows, index_t cols) { return Tiles::kParts * rows * cols / Tiles::kTerms; }

    T* scratch(const Place& at) const { return scratch_ + at.worker * kGroup * kWidth; }

    // Parts of dscale = sum G x y^T: a group's where the product rounds G, before that; else x^T (G y) of its rows.
    index_t dots() const { return chunks_.rows / kGroup * (Tiles::kRounds ? chunks_.panels : 1); }

    // G of a chunk. Returns its part of dscale where the product rounds G, else 0.
    template <class Objective>
    double form_gradient(Objective& objective, const Kept<Tiles>& kept, index_t first, index_t column) {
        std::fill(dots_, dots_ + dots(), 0.0);
        chunks_.for_groups(team_, first, column, [&](auto& group, const Place& at) {
            group.s = gradient_.place(at.panel, at.row, scratch(at));
            if (kept) rows_.logits().copy(group, kept.at(at));
            else rows_.form(group, at);
            const T dot = objective.to_gradient(group, at);
            if constexpr (Tiles::kRounds)
                dots_[at.row / kGroup * chunks_.panels + at.panel] = rows_.logits().product(dot);
            gradient_.keep(group, at.panel, at.row);
        });
        return std::accumulate(dots_, dots_ + dots(), 0.0);
    }

    // A panel of up to kWidth of the d columns after the other, zeros up to a multiple of `step` rows.
    void pack_rows(const Matrix& a, index_t first, index_t rows, index_t step, index_t capacity, Operand* out) {
        const index_t blocks = ceil_div(rows, kBlockRows);
        team_.for_each(blocks * ceil_div(d_, kWidth), [&](int, index_t task) {
            const index_t col = task / blocks * kWidth, row = task % blocks * kBlockRows;
            const index_t cols = std::min(kWidth, d_ - col), count = std::min(kBlockRows, rows - row);
            const index_t padded = row + count < rows ? count : round_up(rows, step) - row;
            Tiles::with_vectors(cols, [&](auto vectors) {
                Tiles::template pack_rows<Element, vectors.value>(a, first + row, count, padded, col, cols, row,
                                                                  capacity, out + packed(capacity, col));
            });
        });
    }

    // G y is added to dx and G^T x to dy for a chunk. A task has a block of rows of dx or dy, and a part of the d
    // columns.
    void add_products(const TileSums<T>& dx, const TileSums<T>& dy) {
        const index_t panels = ceil_div(d_, kWidth);
        const index_t dx_blocks = ceil_div(dx.rows, kBlockRows), dy_blocks = ceil_div(dy.rows, kBlockRows);
        const index_t share = ceil_div(panels, chunks_.parts(dx_blocks + dy_blocks, panels));
        team_.for_each((dx_blocks + dy_blocks) * ceil_div(panels, share), [&](int, index_t task) {
            [[maybe_unused]] const typename Tiles::Session session;
            const index_t block = task % (dx_blocks + dy_blocks), part = task / (dx_blocks + dy_blocks);
            const index_t begin = part * share, end = std::min(panels, begin + share);
            if (block < dy_blocks) add_to_dy(block * kBlockRows, dx.rows, begin, end, dy);
            else add_to_dx((block - dy_blocks) * kBlockRows, dy.rows, begin, end, dx);
        });
    }

    // Rows of dx from `first` on, panels [begin, end) of their columns.
    void add_to_dx(index_t first, index_t cols, index_t begin, index_t end, const TileSums<T>& dx) {
        const index_t last = std::min(dx.rows, first + kBlockRows), depth = Tiles::depth(chunks_.m);
        for_terms(cols, depth, begin, end, [&](auto vectors, index_t k, index_t terms, index_t c, index_t count) {
            const Operand* y = y_rows_ + packed(col_capacity_, c);
            for (index_t i = first; i < last; i += kRows) {
                const TileSums<T> to{dx.at + i * d_ + c, d_, last - i, count, dx.fresh && k == 0};
                gradient_.template add_rows<vectors.value>(i, k, terms, y, col_capacity_, to);
            }
        });
    }

    // The same of dy.
    void add_to_dy(index_t first, index_t rows, index_t begin, index_t end, const TileSums<T>& dy) {
        const index_t last = std::min(dy.rows, first + kBlockRows), depth = Tiles::depth(chunks_.n);
        for_terms(rows, depth, begin, end, [&](auto vectors, index_t k, index_t terms, index_t c, index_t count) {
            const Operand* x = x_rows_ + packed(row_capacity_, c);
            for (index_t j = first; j < last; j += kRows) {
                const TileSums<T> to{dy.at + j * d_ + c, d_, last - j, count, dy.fresh && k == 0};
                gradient_.template add_cols<vectors.value>(j, k, terms, x, row_capacity_, to);
            }
        });
    }

    // Calls visit(std::integral_constant<int, vectors>, k, terms, c, columns) for up to `depth` terms of the sums, from
    // k on, and panels of the d columns, from c on.
    template <class Visit>
    void for_terms(index_t all, index_t depth, index_t begin, index_t end, const Visit& visit) {
        for (index_t k = 0; k < all; k += depth)
            for (index_t panel = begin; panel < end && !team_.stopped(); ++panel) {
                const index_t c = panel * kWidth, count = std::min(kWidth, d_ - c);
                Tiles::with_vectors(count,
                                    [&](auto vectors) { visit(vectors, k, std::min(depth, all - k), c, count); });
            }
    }

    // Writes dx = scale G y of a chunk. Returns x^T (G y), dscale's part where the product does not round G; else 0.
    template <class Out>
    double finish_dx(index_t first, index_t rows, const T* gradient_y, Out* dx) {
        std::fill(dots_, dots_ + dots(), 0.0);
        team_.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
            const index_t row = group * kGroup;
            const double dot = finish_rows(first + row, std::min(kGroup, rows - row), gradient_y + row * d_, dx);
            if constexpr (!Tiles::kRounds) dots_[group] = dot;
        });
        return std::accumulate(dots_, dots_ + dots(), 0.0);
    }

    template <class Out>
    double finish_rows(index_t first, index_t count, const T* gradient_y, Out* dx) const {
        double dot = 0;
        for (index_t i = 0; i < count; ++i, gradient_y += d_)
            dot += finish_row(block_.x, first + i, gradient_y, dx + (first + i) * d_);
        return dot;
    }

    template <class Out>
    void finish_dy(const T* gradient_x, Out* dy) {
        team_.for_each(ceil_div(chunks_.m, kGroup), [&](int, index_t group) {
            const index_t begin = group * kGroup, end = std::min(chunks_.m, begin + kGroup);
            if (block_.y.factors)
                for (index_t j = begin; j < end; ++j) finish_row(block_.y, j, gradient_x + j * d_, dy + j * d_);
            else
                for (index_t i = begin * d_; i < end * d_; ++i) dy[i] = store<Out>(scale_ * gradient_x[i]);
        });
    }

    // Row `row` of a gradient, scale times `products`, written to `out`; returns the products of it and the row itself.
    // A row u = f a of length 1 has the gradient f (g - <g, u> u) by a, where the norm is not at its floor.
    template <class Out>
    double finish_row(const Matrix& a, index_t row, const T* products, Out* out) const {
        Doubles sum[2] = {};
        for (index_t c = 0; c < d_; c += W) {
            const V product = Tiles::load_elements(products + c, 1, d_ - c);
            const V of_row = Tiles::template load_row<Element>(a, row, c, d_ - c);
            sum[0] += Tiles::template half<0>(product) * Tiles::template half<0>(of_row);
            sum[1] += Tiles::template half<1>(product) * Tiles::template half<1>(of_row);
            if (!a.factors) Tiles::store_elements(out + c, scale_ * product, d_ - c);
        }
        const double dot = reduce<double, W / 2>(sum[0] + sum[1], [](auto p, auto q) { return p + q; });
        if (!a.factors) return dot;
        const T factor = static_cast<const T*>(a.factors)[row];
        const T along = double(factor) * kMinNorm < 1 - 1e-6 ? T(dot) : T(0);
        for (index_t c = 0; c < d_; c += W) {
            const V product = Tiles::load_elements(products + c, 1, d_ - c);
            const V of_row = Tiles::template load_row<Element>(a, row, c, d_ - c);
            Tiles::store_elements(out + c, factor * (scale_ * (product - along * of_row)), d_ - c);
        }
        return dot;
    }

    Block block_;
    index_t d_;
    T scale_;
    Chunks<Tiles> chunks_;
    PackedRows<Tiles, Element> rows_;
    Team team_;
    T* scratch_ = nullptr;  // a group of logits for each thread
    Operand *x_rows_ = nullptr, *y_rows_ = nullptr;  // of a chunk, as operands of G^T x and G y
    index_t row_capacity_ = 0, col_capacity_ = 0;    // of them
    Gradient gradient_{nullptr, 0, 0};
    T *dx_apart_ = nullptr, *dy_apart_ = nullptr;
    double* dots_ = nullptr;
};

}  // namespace
}  // namespace clipfast
