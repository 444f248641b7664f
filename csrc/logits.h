// A group of logits, scale x y^T + bias, and which of its pairs are what.
//
// Logits are in log2 units (log2(e) is folded into scale and bias once), so that every exponential is an exp2. A logit
// is the same number to the last bit wherever in a group its pair lies, so that equal features tie.
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

// The largest spread, in log2 units, of logits whose exponentials take one shift: they are normal numbers, and 2^20 that
// are none any more are together below the rounding of the smallest.
template <class T>
constexpr T kMaxSpread = std::is_same_v<T, float> ? T(80) : T(900);

// A group of logits in log2 units, [rows][kWidth] at s, of which `cols` columns count. Rows up to a multiple of kRows
// may be written.
template <class Tiles, int NV>
struct Group {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    using Lane = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    using Mask = Vector<Lane, Tiles::W>;  // lanes of -1 or 0
    static constexpr int W = Tiles::W;
    static constexpr index_t kWidth = Tiles::kWidth;
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();

    Group(index_t rows, index_t cols, index_t positive)
        : rows(rows), cols(cols), positive(std::clamp(positive, -kGroup, kWidth)) {}

    T* s = nullptr;
    index_t rows, cols;
    index_t positive;  // the column of row 0's
    T low = kInfinity, high = -kInfinity;  // of those in the sums. A NaN passes through later sums by itself.
    const std::int32_t* row_ids = nullptr;
    Lane col_ids[NV * W];
    bool ignores = false;  // whether pairs of one id are left out
    bool same = false;     // false if no two ids are equal

    T* row(index_t i) const { return s + i * kWidth; }
    V logits(index_t i, int v) const { return load_vector<V>(row(i) + v * W); }
    bool narrow() const { return low <= high && high - low < kMaxSpread<T>; }
    bool has_positives() const { return positive < cols && positive + rows > 0; }
    // Whether all are in the sums of exponentials, and whether all are negatives.
    bool is_summed() const { return cols == NV * W && !has_positives() && !(same && ignores); }
    bool is_plain() const { return is_summed() && !same; }
    template <class Visit>
    void for_positives(const Visit& visit) const {
        const index_t end = std::min(rows, cols - positive);
        for (index_t i = std::max<index_t>(0, -positive); i < end; ++i) visit(i, row(i)[positive + i]);
    }

    void set_ids(const std::int32_t* of_rows, const std::int32_t* of_cols, bool ignore) {
        row_ids = of_rows, ignores = ignore;
        for (index_t j = 0; j < NV * W; ++j) col_ids[j] = of_cols[std::min(j, cols - 1)];
        Mask equal = {};
        for (index_t i = 0; i < rows; ++i)
            for (int v = 0; v < NV; ++v) equal |= load_vector<Mask>(col_ids + v * W) == Lane(row_ids[i]);
        same = reduce<Lane, W>(equal, [](auto a, auto b) { return a | b; }) != 0;
    }

    // Vector v of row i: which of its lanes are columns of the block,
    CLIPFAST_INLINE Mask within(int v) const { return iota() < Lane(cols - v * W); }
    // which is the positive,
    CLIPFAST_INLINE Mask own(index_t i, int v) const { return within(v) & (iota() == Lane(positive + i - v * W)); }
    // which others have the row's id,
    CLIPFAST_INLINE Mask duplicates(index_t i, int v) const {
        if (!same) return Mask{};
        return within(v) & ~own(i, v) & (load_vector<Mask>(col_ids + v * W) == Lane(row_ids[i]));
    }
    // which are negatives,
    CLIPFAST_INLINE Mask negatives(index_t i, int v) const { return within(v) & ~own(i, v) & ~duplicates(i, v); }
    // and which are in the sums of exponentials.
    CLIPFAST_INLINE Mask summed(index_t i, int v) const {
        return ignores ? negatives(i, v) : within(v) & ~own(i, v);
    }

    // Put `value` at what is in no sum of exponentials.
    void mask(T value) const {
        for (index_t i = 0; i < rows; ++i)
            for (int v = 0; v < NV; ++v)
                store_vector(row(i) + v * W, summed(i, v) ? logits(i, v) : V{} + value);
    }

    // sum G (logit - bias), G in the logits' place; whatever the logits of what G leaves out.
    CLIPFAST_NOINLINE T dot(const T* of_logits, T bias) const {
        V sum = {};
        for (index_t i = 0; i < rows; ++i)
            for (index_t j = 0; j < cols; j += W) {
                const V logit = Tiles::load_elements(of_logits + i * kWidth + j, 1, cols - j);
                const V g = Tiles::load_elements(row(i) + j, 1, cols - j);
                sum += g == 0 ? V{} : g * (logit - bias);
            }
        return reduce<T, W>(sum, [](auto a, auto b) { return a + b; });
    }

  private:
    static CLIPFAST_INLINE Mask iota() {
        constexpr Lane lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return load_vector<Mask>(lanes);
    }
};

// The block's logits: scale x y^T + bias in log2 units.
template <class Tiles>
class Logits {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    using Operand = typename Tiles::Operand;
    static constexpr int W = Tiles::W, kRows = Tiles::kRows;
    static constexpr T kInfinity = std::numeric_limits<T>::infinity(), kLargest = std::numeric_limits<T>::max();

  public:
    explicit Logits(const Block& block)
        : d_(block.d()),
          exact_scale2_(std::clamp(block.scale * kLog2e, -double(kLargest), double(kLargest))),
          scale2_(T(exact_scale2_)),
          bias2_(T(block.bias * kLog2e)) {
        // Both parts have one sign and the rest is not 0, or an infinite product would become NaN.
        if (std::fabs(double(scale2_)) > std::fabs(exact_scale2_)) scale2_ = std::nextafter(scale2_, T(0));
        scale2_rest_ = T(block.scale * kLog2e - double(scale2_));
        if (scale2_rest_ == 0 && scale2_ != 0) scale2_rest_ = std::copysign(std::numeric_limits<T>::min(), scale2_);
    }

    // The group's logits of rows of x, `stride` operands apart, and a packed panel of y, and their range.
    template <int NV>
    CLIPFAST_NOINLINE void form(Group<Tiles, NV>& group, const Operand* x, index_t stride, const Operand* y) const {
        const V scale = V{} + scale2_, rest = V{} + scale2_rest_, bias = V{} + bias2_;
        V low = V{} + kInfinity, high = V{} - kInfinity;
        for (index_t i = 0; i < group.rows; i += kRows) {
            Tiles::template multiply_rows<NV>(d_, x + i * stride, stride, y, [&](const V (&sum)[kRows][NV]) {
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
        set_range(group, low, high);
    }

    // The same of logits that were formed before, [rows][kWidth], maybe in this very place.
    template <int NV>
    CLIPFAST_NOINLINE void copy(Group<Tiles, NV>& group, const T* formed) const {
        V low = V{} + kInfinity, high = V{} - kInfinity;
        for (index_t i = 0; i < group.rows; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const V logit = load_vector<V>(formed + i * Tiles::kWidth + v * W);
                if (group.s != formed) store_vector(group.row(i) + v * W, logit);
                low = minimum(logit, low);
                high = maximum(logit, high);
            }
        set_range(group, low, high);
    }

    T bias() const { return bias2_; }

    // x y^T of a sum of logit - bias.
    double product(double sum) const { return sum / exact_scale2_; }

  private:
    // Of all the group's logits, or of those in the sums where these are fewer.
    template <int NV>
    static CLIPFAST_INLINE void set_range(Group<Tiles, NV>& group, V low, V high) {
        if (!group.is_summed()) find_range(group, low, high);
        group.low = reduce<T, W>(low, [](auto a, auto b) { return minimum(a, b); });
        group.high = reduce<T, W>(high, [](auto a, auto b) { return maximum(a, b); });
    }

    template <int NV>
    static void find_range(const Group<Tiles, NV>& group, V& low, V& high) {
        low = V{} + kInfinity, high = V{} - kInfinity;
        for (index_t i = 0; i < group.rows; ++i)
            for (int v = 0; v < NV; ++v) {
                const auto summed = group.summed(i, v);
                const V logit = group.logits(i, v);
                low = minimum(summed ? logit : V{} + kInfinity, low);
                high = maximum(summed ? logit : V{} - kInfinity, high);
            }
    }

    index_t d_;
    double exact_scale2_;
    T scale2_, scale2_rest_, bias2_;  // the rest keeps the rounding of scale2 from shifting every logit
};

}  // namespace
}  // namespace clipfast
