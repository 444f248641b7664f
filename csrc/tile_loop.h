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

    // A scan for the first objective, between(team), and the gradients of the second from the logits that the scan kept,
    // G in their place; returns dscale.
    template <class First, class Between, class Second>
    double scan_and_differentiate(First& first, const Between& between, Second& second, const Gradients& out) {
        T* logits = nullptr;
        const auto memory = Buffer::holding([&](Buffer& buffer) { place_both(buffer, first, second, logits); });
        double dscale = 0;
        team_.run([&] {
            const auto kept = Kept<Tiles>::begun(logits, round_up(chunks_.n, kGroup), chunks_.m);
            scan_chunks(first, kept);
            between(team_);
            dscale = differentiate_chunks(second, out, kept, Gradient::kInPlace);
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
            rows_.take_left(team_, first, rows);
            objective.begin_rows(team_, first, rows);
            for (index_t column = 0; column < chunks_.m; column += chunks_.cols) {
                const index_t cols = std::min(chunks_.cols, chunks_.m - column);
                rows_.pack_right(team_, column, cols);
                objective.begin_cols(team_, column, cols);
                chunks_.for_groups(team_, first, column, [&](auto& group, const Place& at) {
                    if (!objective.wants(group)) return;
                    // An objective leaves logits as they are that are all in the sums.
                    const bool in_place = kept.holds(group) && group.is_summed();
                    group.s = in_place ? kept.at(at) : scratch(at.worker);
                    rows_.form(group, at);
                    if (kept && !in_place) kept.keep(group, at);
                    objective.take(group, at);
                });
            }
            objective.end_rows(team_, first, rows);
        }
        objective.end(team_);
    }

    // The gradients of the rows of a chunk, or of its columns: the features they are of, where they are added up,
    // [rows][d], and where they go.
    struct Sums {
        const Matrix& features;
        index_t first, rows;  // in the block
        T* at;
        void* out;
        double* dots;       // for the sums' products with the features, or null
        bool fresh, whole;  // whether nothing is added up yet, and whether this chunk is the last
    };

    template <class Objective>
    double differentiate_chunks(Objective& objective, const Gradients& out, const Kept<Tiles>& kept,
                                bool in_place = false) {
        double dscale = 0;
        objective.begin(team_);
        // Where the gradients are wanted as they are added up, they need no place apart.
        const bool apart = kApart && out.dtype == block_.dtype;
        const index_t element = apart ? index_t{sizeof(Element)} : index_t{sizeof(T)};
        ask_for_huge_pages(out.dx, chunks_.n * d_ * element), ask_for_huge_pages(out.dy, chunks_.m * d_ * element);
        T* const dy_at = apart ? dy_apart_ : static_cast<T*>(out.dy);
        for (index_t first = 0; first < chunks_.n; first += chunks_.rows) {
            const index_t rows = std::min(chunks_.rows, chunks_.n - first);
            T* const dx_at = apart ? dx_apart_ : static_cast<T*>(out.dx) + first * d_;
            if (!kept) rows_.take_left(team_, first, rows);
            pack_rows(block_.x, first, rows, Tiles::kRowStep, row_capacity_, x_rows_);
            objective.begin_rows(team_, first, rows);
            for (index_t column = 0; column < chunks_.m; column += chunks_.cols) {
                const index_t cols = std::min(chunks_.cols, chunks_.m - column);
                if (!kept) rows_.pack_right(team_, column, cols);
                pack_rows(block_.y, column, cols, Tiles::kColStep, col_capacity_, y_rows_);
                objective.begin_cols(team_, column, cols);
                if (in_place) gradient_ = {reinterpret_cast<Operand*>(kept.at(first, column)), kept.rows()};
                dscale += form_gradient(objective, kept, first, column);
                const Sums dx{block_.x, first, rows, dx_at, out.dx, Tiles::kRounds ? nullptr : dots_,
                              column == 0, column + cols == chunks_.m};
                const Sums dy{block_.y, column, cols, dy_at ? dy_at + column * d_ : nullptr, out.dy, nullptr,
                              first == 0, first + rows == chunks_.n};
                dscale += apart ? add_products<Element>(dx, dy) : add_products<T>(dx, dy);
            }
            objective.end_rows(team_, first, rows);
        }
        objective.end(team_);
        return dscale;
    }

    void place(Buffer& buffer) { rows_.place(buffer, chunks_), place_scratch(buffer); }
    template <class Objective>
    void place_all(Buffer& buffer, Objective& objective) {
        place(buffer), place_products(buffer), place_gradient(buffer), objective.place(buffer);
    }
    template <class First, class Second>
    void place_both(Buffer& buffer, First& first, Second& second, T*& logits) {
        buffer.share([&] { rows_.place(buffer, chunks_); }, [&] { place_products(buffer); });
        place_scratch(buffer), first.place(buffer), second.place(buffer);
        logits = buffer.take<T>(kept_size(round_up(chunks_.n, kGroup), chunks_.m));
        if (!Gradient::kInPlace) place_gradient(buffer);
    }
    void place_scratch(Buffer& buffer) { scratch_ = buffer.take<T>(chunks_.threads * kGroup * kWidth); }
    void place_products(Buffer& buffer) {
        const index_t width_d = round_up(d_, W);
        row_capacity_ = round_up(chunks_.rows_held, Tiles::kRowStep);
        col_capacity_ = round_up(chunks_.cols_held, Tiles::kColStep);
        x_rows_ = buffer.take<Operand>(packed(row_capacity_, width_d));
        y_rows_ = buffer.take<Operand>(packed(col_capacity_, width_d));
        if constexpr (kApart) {
            if (block_.x.factors || chunks_.cols < chunks_.m) dx_apart_ = buffer.take<T>(chunks_.rows_held * d_);
            if (block_.y.factors || chunks_.rows < chunks_.n) dy_apart_ = buffer.take<T>(chunks_.m * d_);
        }
        dots_ = buffer.take<double>(dots());
    }
    void place_gradient(Buffer& buffer) {
        const index_t rows = round_up(row_capacity_, kRows), cols = round_up(col_capacity_, kWidth);
        gradient_ = {buffer.take<Operand>(Gradient::operands(rows, cols)), rows};
    }

    // Operands in which `rows` rows by `cols` columns are packed for G y or G^T x.
    static index_t packed(index_t rows, index_t cols) { return Tiles::kParts * rows * cols / Tiles::kTerms; }

    // A thread's, for a group of logits or for products.
    T* scratch(int worker) const { return scratch_ + worker * kGroup * kWidth; }

    // Parts of dscale = sum G x y^T: a group's where the product rounds G, before that; else x^T (G y), of a few rows
    // and a panel of their d columns.
    index_t dots() const {
        return chunks_.rows / kGroup * (Tiles::kRounds ? chunks_.panels : ceil_div(d_, kWidth));
    }

    // G of a chunk. Returns its part of dscale where the product rounds G, else 0.
    template <class Objective>
    double form_gradient(Objective& objective, const Kept<Tiles>& kept, index_t first, index_t column) {
        std::fill(dots_, dots_ + dots(), 0.0);
        chunks_.for_groups(team_, first, column, [&](auto& group, const Place& at) {
            group.s = gradient_.place(at.panel, at.row, scratch(at.worker));
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

    // G y is added to dx and G^T x to dy for a chunk, and scale times the sums goes out where they are whole; returns
    // x^T (G y) then. A task has a block of rows of dx or dy, and a part of the d columns.
    template <class Out>
    double add_products(const Sums& dx, const Sums& dy) {
        const index_t panels = ceil_div(d_, kWidth);
        const index_t dx_blocks = ceil_div(dx.rows, kBlockRows), dy_blocks = ceil_div(dy.rows, kBlockRows);
        const index_t share = ceil_div(panels, chunks_.parts(dx_blocks + dy_blocks, panels));
        std::fill(dots_, dots_ + dots(), 0.0);
        team_.for_each((dx_blocks + dy_blocks) * ceil_div(panels, share), [&](int worker, index_t task) {
            [[maybe_unused]] const typename Tiles::Session session;
            const index_t block = task % (dx_blocks + dy_blocks), part = task / (dx_blocks + dy_blocks);
            const bool is_dx = block >= dy_blocks;
            const Sums& sums = is_dx ? dx : dy;
            const index_t begin = (is_dx ? block - dy_blocks : block) * kBlockRows;
            T* const products = scratch(worker);
            for (index_t panel = part * share; panel < std::min(panels, (part + 1) * share); ++panel)
                for (index_t row = begin; row < std::min(sums.rows, begin + kBlockRows) && !team_.stopped();
                     row += kGroup) {
                    const index_t col = panel * kWidth, rows = std::min(kGroup, sums.rows - row);
                    Tiles::with_vectors(d_ - col, [&](auto vectors) {
                        multiply<vectors.value>(is_dx, row, rows, is_dx ? dy.rows : dx.rows, col, products);
                    });
                    add_up<Out>(sums, row, rows, col, products);
                }
        });
        finish<Out>(dx), finish<Out>(dy);
        return std::accumulate(dots_, dots_ + dots(), 0.0);
    }

    // G y (of dx) or G^T x, of a few rows and a panel of their columns, [kGroup][kWidth].
    template <int NV>
    void multiply(bool is_dx, index_t first, index_t rows, index_t terms, index_t col, T* products) const {
        const index_t depth = Tiles::depth(is_dx ? chunks_.m : chunks_.n);
        const index_t capacity = is_dx ? col_capacity_ : row_capacity_;
        const Operand* right = (is_dx ? y_rows_ : x_rows_) + packed(capacity, col);
        for (index_t k = 0; k < terms; k += depth)
            for (index_t i = 0; i < rows; i += kRows) {
                const index_t count = std::min(depth, terms - k);
                T* const to = products + i * kWidth;
                if (is_dx) gradient_.template add_rows<NV>(first + i, k, count, right, capacity, to, k == 0);
                else gradient_.template add_cols<NV>(first + i, k, count, right, capacity, to, k == 0);
            }
    }

    // Adds products, [kGroup][kWidth], to a gradient's rows and columns. Scale times whole sums goes out, but for rows
    // of length 1, whose gradients need whole rows (finish).
    template <class Out>
    void add_up(const Sums& to, index_t row, index_t rows, index_t col, const T* products) const {
        const bool goes_out = to.whole && !to.features.factors, dots = goes_out && to.dots;
        const bool in_memory = !to.fresh || !goes_out;
        Doubles dot[2] = {};
        for (index_t i = row; i < row + rows; ++i, products += kWidth) {
            T* const at = in_memory ? to.at + i * d_ + col : nullptr;
            Out* const out = static_cast<Out*>(to.out) + (to.first + i) * d_ + col;
            for (index_t c = 0; c < std::min(kWidth, d_ - col); c += W) {
                const index_t count = d_ - col - c;
                V sum = load_vector<V>(products + c);
                if (!to.fresh) sum += Tiles::load_elements(at + c, 1, count);
                if (goes_out) Tiles::store_elements(out + c, scale_ * sum, count);
                else Tiles::store_elements(at + c, sum, count);
                if (dots) add_dot(dot, sum, load_features(to, i, col + c));
            }
        }
        if (dots) to.dots[row / kGroup * ceil_div(d_, kWidth) + col / kWidth] = total(dot);
    }

    // The gradients of rows of length 1, of their whole sums.
    template <class Out>
    void finish(const Sums& of) {
        if (!of.whole || !of.features.factors) return;
        team_.for_each(ceil_div(of.rows, kGroup), [&](int, index_t group) {
            for (index_t i = group * kGroup; i < std::min(of.rows, (group + 1) * kGroup); ++i) {
                const double dot = finish_row<Out>(of, i);
                if (of.dots) of.dots[group] += dot;
            }
        });
    }

    // A row u = f a of length 1 has the gradient f (g - <g, u> u) by a, g = scale times its sums, where the norm is not
    // at its floor. Returns the products of the sums and the row.
    template <class Out>
    double finish_row(const Sums& of, index_t row) const {
        const T* const sums = of.at + row * d_;
        Out* const out = static_cast<Out*>(of.out) + (of.first + row) * d_;
        Doubles dots[2] = {};
        for (index_t c = 0; c < d_; c += W)
            add_dot(dots, Tiles::load_elements(sums + c, 1, d_ - c), load_features(of, row, c));
        const double dot = total(dots);
        const T factor = static_cast<const T*>(of.features.factors)[of.first + row];
        const T along = double(factor) * kMinNorm < 1 - 1e-6 ? T(dot) : T(0);
        for (index_t c = 0; c < d_; c += W) {
            const V sum = Tiles::load_elements(sums + c, 1, d_ - c);
            const V rest = sum - along * load_features(of, row, c);
            Tiles::store_elements(out + c, factor * (scale_ * rest), d_ - c);
        }
        return dot;
    }

    CLIPFAST_INLINE V load_features(const Sums& of, index_t row, index_t col) const {
        return Tiles::template load_row<Element>(of.features, of.first + row, col, d_ - col);
    }

    static CLIPFAST_INLINE void add_dot(Doubles (&dot)[2], V a, V b) {
        dot[0] += Tiles::template half<0>(a) * Tiles::template half<0>(b);
        dot[1] += Tiles::template half<1>(a) * Tiles::template half<1>(b);
    }
    static double total(const Doubles (&dot)[2]) {
        return reduce<double, W / 2>(dot[0] + dot[1], [](auto p, auto q) { return p + q; });
    }

    Block block_;
    index_t d_;
    T scale_;
    Chunks<Tiles> chunks_;
    PackedRows<Tiles, Element> rows_;
    Team team_;
    T* scratch_ = nullptr;
    Operand *x_rows_ = nullptr, *y_rows_ = nullptr;  // of a chunk, as operands of G^T x and G y
    index_t row_capacity_ = 0, col_capacity_ = 0;    // of them
    Gradient gradient_{nullptr, 0};
    T *dx_apart_ = nullptr, *dy_apart_ = nullptr;    // sums of more than one chunk, or of rows of length 1
    double* dots_ = nullptr;
};

}  // namespace
}  // namespace clipfast
