// The softmax objectives: logsumexps of rows and columns, and the gradient of a loss that is made of them.
//
// One exponential serves both directions: with a shift k common to a group, e_ij = exp2(L_ij - k) gives its row sums
// and its column sums. That is exact while the group's spread stays below kMaxSpread, for then the smallest e is a
// normal number, and what else a sum loses where the shift is larger than its own is below its rounding; a wider group
// takes separate shifts. Positives are left out of all sums.
//
// Included once per instruction set.
#pragma once

#include "chunks.h"

namespace clipfast {
namespace {

// Sums of exponentials, each as sum * exp2(shift), in `slots` rows of `length` numbers. Shifts are finite, so that no
// inf - inf arises from merging.
template <class T, int W>
struct Sums {
    using V = Vector<T, W>;

    index_t slots, length;
    T *shift = nullptr, *sum = nullptr;

    void place(Buffer& memory) {
        shift = memory.take<T>(slots * length);
        sum = memory.take<T>(slots * length);
    }
    void clear() {
        std::fill(shift, shift + slots * length, std::numeric_limits<T>::lowest());
        std::fill(sum, sum + slots * length, T(0));
    }
    static CLIPFAST_INLINE V finite(V shift) {
        constexpr T largest = std::numeric_limits<T>::max();
        return clamped(shift, V{} - largest, V{} + largest);
    }
    // A sum of no terms comes with a shift that others have, maybe far above its own.
    CLIPFAST_INLINE void add(index_t slot, index_t at, V other_shift, V other_sum) {
        T *shifts = shift + slot * length + at, *sums = sum + slot * length + at;
        other_shift = other_sum == 0 ? V{} + std::numeric_limits<T>::lowest() : other_shift;
        const V old = load_vector<V>(shifts), larger = maximum(old, other_shift);
        store_vector(sums, load_vector<V>(sums) * exp2<T, W>(old - larger) +
                               other_sum * exp2<T, W>(other_shift - larger));
        store_vector(shifts, larger);
    }
    // The natural logarithm of the slots' sums together, added up in float64: there may be thousands.
    void log_merged(index_t begin, index_t end, double* out) const {
        using Doubles = Vector<double, W>;
        for (index_t i = begin; i < end; i += W) {
            V largest = load_vector<V>(shift + i);
            for (index_t slot = 1; slot < slots; ++slot)
                largest = maximum(load_vector<V>(shift + slot * length + i), largest);
            Doubles total = {};
            for (index_t slot = 0; slot < slots; ++slot) {
                const V factor = exp2<T, W>(load_vector<V>(shift + slot * length + i) - largest);
                total += __builtin_convertvector(load_vector<V>(sum + slot * length + i), Doubles) *
                         __builtin_convertvector(factor, Doubles);
            }
            for (index_t j = i; j < std::min(end, i + W); ++j)
                out[j] = (double(largest[j - i]) + std::log2(total[j - i])) * kLn2;
        }
    }
};

// For Kernel::scan: the block's statistics, and where there are matches, how many negatives are not below them.
template <class Tiles>
class SoftmaxStatistics : public Objective {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    static constexpr int W = Tiles::W;
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  public:
    SoftmaxStatistics(const Chunks<Tiles>& chunks, const Matches& matches, const Statistics& out)
        : chunks_(chunks),
          matches_(matches),
          out_(out),
          rows_{chunks.panels, chunks.rows},
          cols_{chunks.blocks(), chunks.padded_m()},
          rows_above_{rows_.slots, rows_.length},
          cols_above_{cols_.slots, cols_.length} {}

    // A row's sums per panel of a chunk, a column's per block of rows.
    void place(Buffer& memory) {
        rows_.place(memory), cols_.place(memory);
        if (matches_.rows) rows_above_.place(memory), cols_above_.place(memory);
    }

    void begin(Team&) {
        std::fill(out_.positive, out_.positive + chunks_.n, 0.0);
        cols_.clear();
        if (matches_.rows) cols_above_.fill(0);
    }
    void begin_rows(Team&, index_t, index_t) {
        rows_.clear();
        if (matches_.rows) rows_above_.fill(0);
    }

    template <class Group>
    bool wants(const Group&) const { return true; }

    template <int NV>
    CLIPFAST_NOINLINE void take(const Group<Tiles, NV>& group, const Place& at) {
        if (matches_.rows) count_above(group, at);
        group.for_positives(
            [&](index_t i, T& logit) { out_.positive[at.first + at.row + i] = double(logit) * kLn2; });
        if (!group.is_summed()) group.mask(-kInfinity);
        T row_shift[kGroup] = {}, row_sum[kGroup] = {};
        V col_shift[NV], col_sum[NV];
        if (group.narrow()) narrow_sums(group, row_shift, row_sum, col_shift, col_sum);
        else wide_sums(group, row_shift, row_sum, col_shift, col_sum);
        for (index_t i = 0; i < group.rows; i += W)
            rows_.add(at.panel, at.row + i, load_vector<V>(row_shift + i), load_vector<V>(row_sum + i));
        for (int v = 0; v < NV; ++v)
            cols_.add(at.row / chunks_.block_rows, at.column + v * W, col_shift[v], col_sum[v]);
    }

    void end_rows(Team& team, index_t first, index_t rows) {
        team.for_each(ceil_div(rows, kGroup), [&](int, index_t group) {
            const index_t begin = group * kGroup, end = std::min(rows, begin + kGroup);
            rows_.log_merged(begin, end, out_.row_lse + first);
            if (matches_.rows)
                for (index_t i = begin; i < end; ++i)
                    out_.row_above[first + i] = rows_above_.merged(i, sum_of<std::int32_t>);
        });
    }
    void end(Team& team) {
        team.for_each(ceil_div(chunks_.m, kBlockRows), [&](int, index_t task) {
            const index_t begin = task * kBlockRows, end = std::min(chunks_.m, begin + kBlockRows);
            cols_.log_merged(begin, end, out_.col_lse);
            if (matches_.rows)
                for (index_t j = begin; j < end; ++j)
                    out_.col_above[j] = cols_above_.merged(j, sum_of<std::int32_t>);
        });
    }

  private:
    // NaN is not below anything.
    template <int NV>
    CLIPFAST_NOINLINE void count_above(const Group<Tiles, NV>& group, const Place& at) {
        using Lane = typename Group<Tiles, NV>::Lane;
        using Mask = typename Group<Tiles, NV>::Mask;
        T col_match[NV * W] = {};
        for (index_t j = 0; j < group.cols; ++j) col_match[j] = T(matches_.cols[at.column + j]);
        const bool plain = group.is_plain();
        Mask col_count[NV] = {};
        for (index_t i = 0; i < group.rows; ++i) {
            const V row_match = V{} + T(matches_.rows[at.first + at.row + i]);
            Mask row_count = {};
            for (int v = 0; v < NV; ++v) {
                const V logit = group.logits(i, v);
                const Mask counted = plain ? ~Mask{} : group.negatives(i, v);
                row_count -= counted & ~(logit < row_match);
                col_count[v] -= counted & ~(logit < load_vector<V>(col_match + v * W));
            }
            *rows_above_.at(at.panel, at.row + i) +=
                std::int32_t(reduce<Lane, W>(row_count, [](auto a, auto b) { return a + b; }));
        }
        std::int32_t* above = cols_above_.at(at.row / chunks_.block_rows, at.column);
        for (index_t j = 0; j < group.cols; ++j) above[j] += std::int32_t(col_count[j / W][j % W]);
    }

    template <int NV>
    static CLIPFAST_INLINE void narrow_sums(const Group<Tiles, NV>& group, T* row_shift, T* row_sum,
                                            V (&col_shift)[NV], V (&col_sum)[NV]) {
        const V shift = V{} + group.high;
        for (int v = 0; v < NV; ++v) col_shift[v] = shift, col_sum[v] = V{};
        for (index_t i = 0; i < group.rows; ++i) {
            V sum = V{};
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const V e = exp2<T, W>(group.logits(i, v) - shift);
                sum += e;
                col_sum[v] += e;
            }
            row_shift[i] = group.high;
            row_sum[i] = reduce<T, W>(sum, [](auto a, auto b) { return a + b; });
        }
    }

    // A shift is finite, so an infinite logit stays in the sum, and a NaN does too.
    template <int NV>
    static void wide_sums(const Group<Tiles, NV>& group, T* row_shift, T* row_sum, V (&col_shift)[NV],
                          V (&col_sum)[NV]) {
        using RunningSums = Sums<T, W>;
        for (int v = 0; v < NV; ++v) {
            col_shift[v] = V{} - kInfinity, col_sum[v] = V{};
            for (index_t i = 0; i < group.rows; ++i) col_shift[v] = maximum(group.logits(i, v), col_shift[v]);
            col_shift[v] = RunningSums::finite(col_shift[v]);
            for (index_t i = 0; i < group.rows; ++i) col_sum[v] += exp2<T, W>(group.logits(i, v) - col_shift[v]);
        }
        for (index_t i = 0; i < group.rows; ++i) {
            V shift = V{} - kInfinity, sum = V{};
            for (int v = 0; v < NV; ++v) shift = maximum(group.logits(i, v), shift);
            const T largest = reduce<T, W>(shift, [](auto a, auto b) { return maximum(a, b); });
            shift = RunningSums::finite(V{} + largest);
            for (int v = 0; v < NV; ++v) sum += exp2<T, W>(group.logits(i, v) - shift);
            row_shift[i] = shift[0];
            row_sum[i] = reduce<T, W>(sum, [](auto a, auto b) { return a + b; });
        }
    }

    Chunks<Tiles> chunks_;
    Matches matches_;
    Statistics out_;
    Sums<T, W> rows_, cols_;
    Slots<std::int32_t> rows_above_, cols_above_;
};

// A side's logsumexps in log2 units and weights, rounded to T so that weight' exp2(L - lse') = weight exp(L - lse) up
// to one rounding of weight'. Where the weight is 0, lse' = inf makes every exponential 0, so that an infinite logit in
// a column that the loss does not use does no harm.
template <class T>
struct Side {
    T *lse = nullptr, *weight = nullptr;

    void place(Buffer& memory, index_t count) { lse = memory.take<T>(count), weight = memory.take<T>(count); }
    // Without `weighted` all weights but 0 are 1.
    void round(Team& team, const double* exact_lse, const double* exact_weight, index_t count, bool weighted = true) {
        team.for_each(ceil_div(count, kBlockRows), [&](int, index_t task) {
            for (index_t i = task * kBlockRows; i < std::min(count, (task + 1) * kBlockRows); ++i) {
                const double w = weighted || exact_weight[i] == 0 ? exact_weight[i] : 1;
                lse[i] = w == 0 ? std::numeric_limits<T>::infinity() : T(exact_lse[i] * kLog2e);
                // Beyond any rounding of a meaningful logit it is float64's own rounding of a huge one.
                const double gap = double(lse[i]) / kLog2e - exact_lse[i];
                weight[i] = w == 0 ? T(0) : T(w * (std::fabs(gap) > 64 ? 1.0 : std::exp(gap)));
            }
        });
    }
};

// For Kernel::differentiate: G_ij = row_weight_i exp(L_ij - row_lse_i) + col_weight_j exp(L_ij - col_lse_j).
template <class Tiles>
class SoftmaxGradient : public Objective {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    static constexpr int W = Tiles::W;

  public:
    SoftmaxGradient(const Chunks<Tiles>& chunks, const Logits<Tiles>& logits, const Weights& in)
        : n_(chunks.n), m_(chunks.m), bias_(logits.bias()), in_(in) {}

    void place(Buffer& memory) { rows_.place(memory, n_), cols_.place(memory, m_); }
    void begin(Team& team) {
        rows_.round(team, in_.row_lse, in_.row_weight, n_);
        cols_.round(team, in_.col_lse, in_.col_weight, m_);
    }

    template <int NV>
    CLIPFAST_NOINLINE T to_gradient(const Group<Tiles, NV>& group, const Place& at) const {
        const index_t first = at.first + at.row;
        const T *row_lse = rows_.lse + first, *row_weight = rows_.weight + first;
        V col_lse[NV], col_weight[NV];
        for (int v = 0; v < NV; ++v) {
            const index_t count = group.cols - v * W;
            col_lse[v] = Tiles::load_elements(cols_.lse + at.column + v * W, 1, count);
            col_weight[v] = Tiles::load_elements(cols_.weight + at.column + v * W, 1, count);
        }
        if (group.is_plain() && group.narrow())
            return narrow_gradient(group, row_lse, row_weight, col_lse, col_weight);
        T logits[Tiles::kRounds ? kGroup * Tiles::kWidth : 1];
        if constexpr (Tiles::kRounds) std::memcpy(logits, group.s, group.rows * Tiles::kWidth * sizeof(T));
        if (group.narrow()) {
            narrow_gradient(group, row_lse, row_weight, col_lse, col_weight);
        } else {
            for (index_t i = 0; i < group.rows; ++i)
                for (int v = 0; v < NV; ++v) {
                    const V logit = group.logits(i, v);
                    store_vector(group.row(i) + v * W, row_weight[i] * exp2<T, W>(logit - row_lse[i]) +
                                                           col_weight[v] * exp2<T, W>(logit - col_lse[v]));
                }
        }
        if (group.same) set_same(group, at);
        group.for_positives([&](index_t i, T& logit) { logit = T(in_.positive_weight[first + i]); });
        if constexpr (Tiles::kRounds) return group.dot(logits, bias_);
        return 0;
    }

  private:
    // G of pairs of one id off the diagonal.
    template <int NV>
    CLIPFAST_NOINLINE void set_same(const Group<Tiles, NV>& group, const Place& at) const {
        const bool targets = !group.ignores && in_.row_target;
        if (!group.ignores && !targets) return;
        T col_target[NV * W] = {};
        for (index_t j = 0; targets && j < group.cols; ++j) col_target[j] = T(in_.col_target[at.column + j]);
        for (index_t i = 0; i < group.rows; ++i)
            for (int v = 0; v < NV; ++v) {
                V g = group.logits(i, v), added = {};
                if (targets)
                    added = g + (T(in_.row_target[at.first + at.row + i]) + load_vector<V>(col_target + v * W));
                store_vector(group.row(i) + v * W, group.duplicates(i, v) ? added : g);
            }
    }

    template <int NV>
    CLIPFAST_INLINE T narrow_gradient(const Group<Tiles, NV>& group, const T* row_lse, const T* row_weight,
                                      const V (&col_lse)[NV], const V (&col_weight)[NV]) const {
        const V shift = V{} + group.high, bias = V{} + bias_;
        V col_factor[NV], dot = {};
        T row_factor[kGroup];
        for (int v = 0; v < NV; ++v) col_factor[v] = col_weight[v] * exp2<T, W>(shift - col_lse[v]);
        for (index_t i = 0; i < group.rows; i += W) {
            const V lse = Tiles::load_elements(row_lse + i, 1, group.rows - i);
            const V weight = Tiles::load_elements(row_weight + i, 1, group.rows - i);
            store_vector(row_factor + i, weight * exp2<T, W>(shift - lse));
        }
        for (index_t i = 0; i < group.rows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const V logit = group.logits(i, v), g = exp2<T, W>(logit - shift) * (row_factor[i] + col_factor[v]);
                if constexpr (Tiles::kRounds) dot += g * (logit - bias);
                store_vector(group.row(i) + v * W, g);
            }
        return reduce<T, W>(dot, [](auto a, auto b) { return a + b; });
    }

    index_t n_, m_;
    T bias_;
    Weights in_;
    Side<T> rows_, cols_;
};

}  // namespace
}  // namespace clipfast
