// A group of logits and what becomes of it while it is in the first-level cache: sums of exponentials, or G.
//
// Logits are in log2 units (log2(e) is folded into scale and bias once), so every exponential is an exp2. One exponential
// serves both directions: with a shift k common to a group, e_ij = exp2(L_ij - k) gives its row sums and its column sums.
// That is exact while the group's spread stays below kMaxSpread, for then the smallest e is a normal number; a wider
// group takes separate shifts. Positives are left out of all sums.
//
// Included once per instruction set.
#pragma once

#include <cmath>
#include <limits>

#include "buffer.h"
#include "tiles.h"

namespace clipfast {
namespace {

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// A side's logsumexps in log2 units and weights, rounded to T so that weight' exp2(L - lse') = weight exp(L - lse) up to
// one rounding of weight'. Where the weight is 0, lse' = inf makes every exponential 0, so that an infinite logit in a
// column that the loss does not use does no harm.
template <class T>
struct Side {
    const T *lse, *weight;

    static void round(const double* lse, const double* weight, index_t begin, index_t end, T* lse_out, T* weight_out) {
        for (index_t i = begin; i < end; ++i) {
            const T rounded = weight[i] == 0 ? std::numeric_limits<T>::infinity() : T(lse[i] * kLog2e);
            // Beyond any rounding of a meaningful logit it is float64's own rounding of a huge one.
            const double gap = double(rounded) / kLog2e - lse[i];
            lse_out[i] = rounded;
            weight_out[i] = weight[i] == 0 ? T(0) : T(weight[i] * (std::fabs(gap) > 64 ? 1.0 : std::exp(gap)));
        }
    }
};

template <class T>
constexpr T kMaxSpread = std::is_same_v<T, float> ? T(100) : T(900);

// Sums of exponentials, each as sum * exp2(shift), in `slots` rows of `length` numbers. Shifts are finite, so that no
// inf - inf arises from merging.
template <class T, int W>
struct Sums {
    using V = Vector<T, W>;

    index_t slots, length;
    Buffer memory;
    T *shift, *sum;

    Sums(index_t slots, index_t length)
        : slots(slots),
          length(length),
          memory(2 * slots * length * index_t{sizeof(T)} + kBufferSlack),
          shift(memory.take<T>(slots * length)),
          sum(memory.take<T>(slots * length)) {
        clear();
    }
    void clear() {
        std::fill(shift, shift + slots * length, std::numeric_limits<T>::lowest());
        std::fill(sum, sum + slots * length, T(0));
    }
    static CLIPFAST_INLINE V finite(V shift) {
        constexpr T largest = std::numeric_limits<T>::max();
        return clamped(shift, V{} - largest, V{} + largest);
    }
    CLIPFAST_INLINE void add(index_t slot, index_t at, V other_shift, V other_sum) {
        T *shifts = shift + slot * length + at, *sums = sum + slot * length + at;
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

// A group of logits in log2 units, [rows][kWidth] at s, of which `cols` columns count, and the column of row 0's
// positive. Rows up to a multiple of kRows may be written.
template <class Tiles, int NV>
struct Group {
    using T = typename Tiles::Compute;
    static constexpr int W = Tiles::W;
    static constexpr index_t kWidth = Tiles::kWidth;
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();

    T* s;
    index_t rows, cols, positive;
    T low = kInfinity, high = -kInfinity;  // of the negatives. A NaN passes through later sums by itself.

    T* row(index_t i) const { return s + i * kWidth; }
    bool narrow() const { return low <= high && high - low < kMaxSpread<T>; }
    bool is_plain() const { return cols == NV * W && (positive >= cols || positive + rows <= 0); }
    template <class Visit>
    void for_positives(const Visit& visit) const {
        const index_t end = std::min(rows, cols - positive);
        for (index_t i = std::max<index_t>(0, -positive); i < end; ++i) visit(i, row(i)[positive + i]);
    }
    // Put `value` where no negative is.
    void mask(T value) const {
        for_positives([&](index_t, T& logit) { logit = value; });
        for (index_t i = 0; i < rows; ++i) std::fill(row(i) + cols, row(i) + NV * W, value);
    }
};

// The block's logits: scale x y^T + bias in log2 units.
template <class Tiles>
class Logits {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    using Operand = typename Tiles::Operand;
    static constexpr int W = Tiles::W, kRows = Tiles::kRows;
    using RunningSums = Sums<T, W>;
    template <int NV>
    using LogitGroup = Group<Tiles, NV>;
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  public:
    explicit Logits(const Block& block)
        : d_(block.d()),
          scale2_(T(block.scale * kLog2e)),
          scale2_rest_(T(block.scale * kLog2e - double(scale2_))),
          bias2_(T(block.bias * kLog2e)) {}

    // The group's logits of packed rows of x and a packed panel of y, and their range.
    template <int NV>
    CLIPFAST_NOINLINE void form(LogitGroup<NV>& group, const Operand* x, const Operand* y) const {
        const index_t row_size = Tiles::operands(d_);
        const V scale = V{} + scale2_, rest = V{} + scale2_rest_, bias = V{} + bias2_;
        V low = V{} + kInfinity, high = V{} - kInfinity;
        for (index_t i = 0; i < group.rows; i += kRows) {
            Tiles::template multiply_rows<NV>(d_, x + i * row_size, y, [&](const V (&sum)[kRows][NV]) {
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    V row_low = V{} + kInfinity, row_high = V{} - kInfinity;
#pragma GCC unroll 4
                    for (int v = 0; v < NV; ++v) {
                        const V logit = sum[r][v] * scale + (sum[r][v] * rest + bias);
                        store_vector(group.row(i + r) + v * W, logit);
                        row_low = minimum(logit, row_low);
                        row_high = maximum(logit, row_high);
                    }
                    if (i + r < group.rows) low = minimum(row_low, low), high = maximum(row_high, high);
                }
            });
        }
        if (!group.is_plain()) find_range_of_negatives(group, low, high);
        group.low = reduce<T, W>(low, [](auto a, auto b) { return minimum(a, b); });
        group.high = reduce<T, W>(high, [](auto a, auto b) { return maximum(a, b); });
    }

    // Adds the group's exponentials to its rows' and its columns' sums.
    template <int NV>
    CLIPFAST_NOINLINE static void add_sums(const LogitGroup<NV>& group, RunningSums& rows_sums, index_t row_slot, index_t row, RunningSums& cols_sums,
                         index_t col_slot, index_t column) {
        if (!group.is_plain()) group.mask(-kInfinity);
        T row_shift[kGroup] = {}, row_sum[kGroup] = {};
        V col_shift[NV], col_sum[NV];
        if (group.narrow()) narrow_sums(group, row_shift, row_sum, col_shift, col_sum);
        else wide_sums(group, row_shift, row_sum, col_shift, col_sum);
        for (index_t i = 0; i < group.rows; i += W)
            rows_sums.add(row_slot, row + i, load_vector<V>(row_shift + i), load_vector<V>(row_sum + i));
        for (int v = 0; v < NV; ++v) cols_sums.add(col_slot, column + v * W, col_shift[v], col_sum[v]);
    }

    // Replaces the group's logits, the first of which is at (first, column), by G. Where the product rounds G, returns sum
    // G (logit - bias), of G before that; else 0.
    template <int NV>
    CLIPFAST_NOINLINE T to_gradient(const LogitGroup<NV>& group, const Side<T>& rows, const Side<T>& cols,
                                    const double* positive_weight, index_t first, index_t column) const {
        const T *row_lse = rows.lse + first, *row_weight = rows.weight + first;
        V col_lse[NV], col_weight[NV];
        for (int v = 0; v < NV; ++v) {
            const index_t count = group.cols - v * W;
            col_lse[v] = Tiles::load_elements(cols.lse + column + v * W, 1, count);
            col_weight[v] = Tiles::load_elements(cols.weight + column + v * W, 1, count);
        }
        if (group.narrow() && group.is_plain())
            return narrow_gradient(group, row_lse, row_weight, col_lse, col_weight);
        T logits[Tiles::kRounds ? kGroup * Tiles::kWidth : 1];
        if constexpr (Tiles::kRounds) std::memcpy(logits, group.s, group.rows * Tiles::kWidth * sizeof(T));
        if (group.narrow()) {
            narrow_gradient(group, row_lse, row_weight, col_lse, col_weight);
        } else {
            for (index_t i = 0; i < group.rows; ++i)
                for (int v = 0; v < NV; ++v) {
                    T* s = group.row(i) + v * W;
                    const V logit = load_vector<V>(s);
                    store_vector(s, row_weight[i] * exp2<T, W>(logit - row_lse[i]) +
                                        col_weight[v] * exp2<T, W>(logit - col_lse[v]));
                }
        }
        group.for_positives([&](index_t i, T& logit) { logit = T(positive_weight[first + i]); });
        V dot = {};
        if constexpr (Tiles::kRounds)
            for (index_t i = 0; i < group.rows; ++i)
                for (index_t j = 0; j < group.cols; j += W) {
                    const V logit = Tiles::load_elements(logits + i * Tiles::kWidth + j, 1, group.cols - j);
                    const V g = Tiles::load_elements(group.row(i) + j, 1, group.cols - j);
                    dot += g * (logit - bias2_);
                }
        return reduce<T, W>(dot, [](auto a, auto b) { return a + b; });
    }

    // x y^T of a sum of logit - bias.
    double product(double sum) const { return sum / double(scale2_); }

  private:
    template <int NV>
    static void find_range_of_negatives(const LogitGroup<NV>& group, V& low, V& high) {
        low = V{} + kInfinity, high = V{} - kInfinity;
        for (index_t i = 0; i < group.rows; ++i)
            for (index_t j = 0; j < group.cols; ++j) {
                if (j == group.positive + i) continue;
                low = minimum(V{} + group.row(i)[j], low);
                high = maximum(V{} + group.row(i)[j], high);
            }
    }

    template <int NV>
    static CLIPFAST_INLINE void narrow_sums(const LogitGroup<NV>& group, T* row_shift, T* row_sum, V (&col_shift)[NV],
                                            V (&col_sum)[NV]) {
        const V shift = V{} + group.high;
        for (int v = 0; v < NV; ++v) col_shift[v] = shift, col_sum[v] = V{};
        for (index_t i = 0; i < group.rows; ++i) {
            V sum = V{};
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const V e = exp2<T, W>(load_vector<V>(group.row(i) + v * W) - shift);
                sum += e;
                col_sum[v] += e;
            }
            row_shift[i] = group.high;
            row_sum[i] = reduce<T, W>(sum, [](auto a, auto b) { return a + b; });
        }
    }

    template <int NV>
    CLIPFAST_INLINE T narrow_gradient(const LogitGroup<NV>& group, const T* row_lse, const T* row_weight,
                                      const V (&col_lse)[NV], const V (&col_weight)[NV]) const {
        const V shift = V{} + group.high, bias = V{} + bias2_;
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
                T* s = group.row(i) + v * W;
                const V logit = load_vector<V>(s), g = exp2<T, W>(logit - shift) * (row_factor[i] + col_factor[v]);
                if constexpr (Tiles::kRounds) dot += g * (logit - bias);
                store_vector(s, g);
            }
        return reduce<T, W>(dot, [](auto a, auto b) { return a + b; });
    }

    // A shift is finite, so an infinite logit stays in the sum, and a NaN does too.
    template <int NV>
    static void wide_sums(const LogitGroup<NV>& group, T* row_shift, T* row_sum, V (&col_shift)[NV], V (&col_sum)[NV]) {
        for (int v = 0; v < NV; ++v) {
            col_shift[v] = V{} - kInfinity, col_sum[v] = V{};
            for (index_t i = 0; i < group.rows; ++i)
                col_shift[v] = maximum(load_vector<V>(group.row(i) + v * W), col_shift[v]);
            col_shift[v] = RunningSums::finite(col_shift[v]);
            for (index_t i = 0; i < group.rows; ++i)
                col_sum[v] += exp2<T, W>(load_vector<V>(group.row(i) + v * W) - col_shift[v]);
        }
        for (index_t i = 0; i < group.rows; ++i) {
            V shift = V{} - kInfinity, sum = V{};
            for (int v = 0; v < NV; ++v) shift = maximum(load_vector<V>(group.row(i) + v * W), shift);
            const T largest = reduce<T, W>(shift, [](auto a, auto b) { return maximum(a, b); });
            shift = RunningSums::finite(V{} + largest);
            for (int v = 0; v < NV; ++v) sum += exp2<T, W>(load_vector<V>(group.row(i) + v * W) - shift);
            row_shift[i] = shift[0];
            row_sum[i] = reduce<T, W>(sum, [](auto a, auto b) { return a + b; });
        }
    }

    index_t d_;
    T scale2_, scale2_rest_, bias2_;  // the rest keeps the rounding of scale2 from shifting every logit
};

}  // namespace
}  // namespace clipfast
