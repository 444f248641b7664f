// The distillation objective: the student's logits under its teacher's softmaxes, and the gradient that draws the
// student's softmaxes to them. The teacher's logits are formed beside the student's.
//
// Included once per instruction set.
#pragma once

#include "softmax.h"

namespace clipfast {
namespace {

// For Kernel::scan, and Kernel::differentiate where gradients are wanted.
template <class Tiles, class Element>
class Distillation : public Objective {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    static constexpr int W = Tiles::W;

  public:
    Distillation(const Chunks<Tiles>& chunks, const Logits<Tiles>& logits, const Weights& in, const Block& teacher,
                 const Weights& teacher_in, const Crosses& out)
        : chunks_(chunks),
          bias_(logits.bias()),
          in_(in),
          teacher_in_(teacher_in),
          out_(out),
          teacher_(teacher),
          row_cross_{chunks.panels, chunks.rows},
          col_cross_{chunks.blocks(), chunks.padded_m()} {}

    void place(Buffer& memory) {
        teacher_.place(memory, chunks_);
        scratch_ = memory.take<T>(chunks_.threads * kGroup * Tiles::kWidth);
        rows_.place(memory, chunks_.n), cols_.place(memory, chunks_.m);
        teacher_rows_.place(memory, chunks_.n), teacher_cols_.place(memory, chunks_.m);
        row_cross_.place(memory), col_cross_.place(memory);
    }
    void begin(Team& team) {
        rows_.round(team, in_.row_lse, in_.row_weight, chunks_.n);
        cols_.round(team, in_.col_lse, in_.col_weight, chunks_.m);
        teacher_rows_.round(team, teacher_in_.row_lse, teacher_in_.row_weight, chunks_.n, false);
        teacher_cols_.round(team, teacher_in_.col_lse, teacher_in_.col_weight, chunks_.m, false);
        col_cross_.fill(0);
    }
    void begin_rows(Team& team, index_t first, index_t rows) {
        teacher_.take_left(team, first, rows);
        row_cross_.fill(0);
    }
    void begin_cols(Team& team, index_t column, index_t cols) { teacher_.pack_right(team, column, cols); }

    template <class Group>
    bool wants(const Group&) const { return true; }
    template <int NV>
    CLIPFAST_NOINLINE void take(const Group<Tiles, NV>& group, const Place& at) { replace<false>(group, at); }
    template <int NV>
    CLIPFAST_NOINLINE T to_gradient(const Group<Tiles, NV>& group, const Place& at) {
        return replace<true>(group, at);
    }

    void end_rows(Team&, index_t first, index_t rows) {
        for (index_t i = 0; i < rows; ++i) out_.rows[first + i] = kLn2 * row_cross_.merged(i, sum_of<double>);
    }
    void end(Team&) {
        for (index_t j = 0; j < chunks_.m; ++j) out_.cols[j] = kLn2 * col_cross_.merged(j, sum_of<double>);
    }

  private:
    // The sides' numbers at a group: logsumexps in log2 units and weights.
    template <int NV>
    struct Columns {
        V lse[NV], weight[NV];
        Columns(const Side<T>& side, index_t column, index_t cols) {
            for (int v = 0; v < NV; ++v) {
                lse[v] = Tiles::load_elements(side.lse + column + v * W, 1, cols - v * W);
                weight[v] = Tiles::load_elements(side.weight + column + v * W, 1, cols - v * W);
            }
        }
        V exponential(V logit, int v) const { return weight[v] * exp2<T, W>(logit - lse[v]); }
    };

    template <bool gradient, int NV>
    CLIPFAST_INLINE T replace(const Group<Tiles, NV>& group, const Place& at) {
        Group<Tiles, NV> teacher(group.rows, group.cols, group.positive);
        teacher.s = scratch_ + at.worker * kGroup * Tiles::kWidth;
        teacher_.form(teacher, at);
        const index_t first = at.first + at.row;
        const Columns<NV> student_cols(cols_, at.column, group.cols);
        const Columns<NV> teacher_cols(teacher_cols_, at.column, group.cols);
        V teacher_weight[NV], col_cross[NV] = {}, dot = {};
        T teacher_weights[NV * W] = {};
        for (index_t j = 0; j < group.cols; ++j) teacher_weights[j] = T(teacher_in_.col_weight[at.column + j]);
        for (int v = 0; v < NV; ++v) teacher_weight[v] = load_vector<V>(teacher_weights + v * W);
        for (index_t i = 0; i < group.rows; ++i) {
            const T row_lse = rows_.lse[first + i], row_weight = rows_.weight[first + i];
            const T teacher_lse = teacher_rows_.lse[first + i], rounding = teacher_rows_.weight[first + i];
            const T teacher_row_weight = T(teacher_in_.row_weight[first + i]);
            V cross = {};
            for (int v = 0; v < NV; ++v) {
                const V logit = group.logits(i, v), of_teacher = teacher.logits(i, v);
                const V by_row = rounding * exp2<T, W>(of_teacher - teacher_lse);
                const V by_col = teacher_cols.exponential(of_teacher, v);
                cross += group.within(v) ? by_row * logit : V{};
                col_cross[v] += by_col * logit;
                if constexpr (!gradient) continue;
                const V g = row_weight * exp2<T, W>(logit - row_lse) - teacher_row_weight * by_row +
                            (student_cols.exponential(logit, v) - teacher_weight[v] * by_col);
                if constexpr (Tiles::kRounds) dot += group.within(v) ? g * (logit - bias_) : V{};
                store_vector(group.row(i) + v * W, g);
            }
            *row_cross_.at(at.panel, at.row + i) += reduce<T, W>(cross, [](auto a, auto b) { return a + b; });
        }
        double* total = col_cross_.at(at.row / chunks_.block_rows, at.column);
        for (index_t j = 0; j < group.cols; ++j) total[j] += col_cross[j / W][j % W];
        return reduce<T, W>(dot, [](auto a, auto b) { return a + b; });
    }

    Chunks<Tiles> chunks_;
    T bias_;
    Weights in_, teacher_in_;
    Crosses out_;
    PackedRows<Tiles, Element> teacher_;
    T* scratch_ = nullptr;
    Side<T> rows_, cols_;
    Side<T> teacher_rows_, teacher_cols_;  // of weight 1: what makes up for the rounding of the logsumexp
    Slots<double> row_cross_, col_cross_;  // a row's per panel of a chunk, a column's per block of rows
};

}  // namespace
}  // namespace clipfast
