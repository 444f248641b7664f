// Inputs of the sanitizers' passes (sanitize.cpp), and what plain float64 sums make of them.
//
// Every number has a bound of its own, made of roundings that no kernel can avoid, as in oracle.py. A compute type of
// eps moves a logit by eps |L|, an exponential by eps (2 |L| + 8) of itself, where |L| is the largest logit that
// features of such lengths can have, and a sum of n terms by eps sqrt(n) of their absolute sum. Units that multiply
// bfloat16 round features, which moves a logit by up to Roundings::of_logits() times scale sum |x_k y_k|, and G.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/dtypes.h"
#include "../csrc/kernels.h"

namespace clipfast {

enum class Ids { none, ignore, positive };

struct Shape {
    index_t n, m, d, offset;
    Ids ids = Ids::none;
    bool transposed = false;  // features lie column by column
};

template <class T>
T rounded(double v) {
    if constexpr (std::is_floating_point_v<T>) return T(v);
    else return T::store(float(v));
}

using Doubles = std::vector<double>;

constexpr double kScale = 14.3, kBias = -0.5;

// A number, and how far another computation of it may be off before it is rounded to its own dtype.
struct Bounded {
    double value = 0, bound = 0;
};
using Numbers = std::vector<Bounded>;

// How far the numbers of a product move, relative to themselves.
struct Roundings {
    double feature = 0, gradient = 0;  // as operands
    double dropped = 0;                // of a product, the part that is not computed

    double of_logits() const { return (1 + feature) * (1 + feature) - 1 + dropped; }
    double of_gradients() const { return (1 + feature) * (1 + gradient) - 1 + dropped; }

    // bfloat16 keeps 8 bits; two of them hold a float32 up to 2^-17 and leave out low low, 2^-16 (csrc/pairs.h).
    static Roundings of(DType dtype, Product product) {
        if (product == Product::bfloat16x3) return {0x1p-17, 0x1p-17, 0x1p-16};
        return {dtype == DType::bfloat16 ? 0 : 0x1p-8, 0x1p-8, 0};
    }
};

// The largest error of a pass's numbers, and the largest of an error over its bound; infinite for a NaN.
struct Error {
    double largest = 0, over_bound = 0;

    void compare(double got, const Bounded& exact, double rounding, double smallest) {
        if (got == exact.value) return;
        const auto worsen = [](double& worst, double by) {
            if (!(by <= worst)) worst = by < INFINITY ? by : INFINITY;
        };
        const double difference = std::fabs(got - exact.value);
        worsen(largest, difference);
        worsen(over_bound, difference / (exact.bound + rounding * std::fabs(exact.value) + smallest));
    }
    template <class N>
    void compare(const std::vector<N>& got, const Numbers& exact) {
        for (std::size_t i = 0; i < exact.size(); ++i) {
            if constexpr (std::is_same_v<N, bfloat16>) compare(load(got[i]), exact[i], 0x1p-8, 0x1p-126);
            else if constexpr (std::is_same_v<N, float16>) compare(load(got[i]), exact[i], 0x1p-11, 0x1p-24);
            else if constexpr (std::is_same_v<N, float>) compare(got[i], exact[i], 0x1p-24, 0x1p-126);
            else compare(got[i], exact[i], 0x1p-53, 0x1p-1022);
        }
    }
};

template <class T>
struct Features {
    index_t rows, cols;
    bool transposed;
    std::vector<T> data;
    Doubles exact;  // [rows][cols]
    double longest = 0;

    Features(index_t rows, index_t cols, bool transposed, std::mt19937& random)
        : rows(rows), cols(cols), transposed(transposed), data(rows * cols), exact(rows * cols) {
        std::normal_distribution<double> normal(0, 1 / std::sqrt(double(cols)));
        for (index_t i = 0; i < rows; ++i) {
            double square = 0;
            for (index_t k = 0; k < cols; ++k) {
                T& feature = data[transposed ? k * rows + i : i * cols + k];
                feature = rounded<T>(normal(random));
                exact[i * cols + k] = double(load(feature));
                square += exact[i * cols + k] * exact[i * cols + k];
            }
            longest = std::max(longest, std::sqrt(square));
        }
    }
    Matrix matrix() const { return {data.data(), rows, cols, transposed ? 1 : cols, transposed ? rows : 1}; }
    const double* row(index_t i) const { return exact.data() + i * cols; }
};

// scale x y^T + bias, and scale |x| |y|^T, which its roundings are relative to.
struct Logits {
    index_t n, m;
    Doubles value, size;  // [n][m]
    double largest;       // logit that features of the longest rows' length could have

    template <class T>
    Logits(const Features<T>& x, const Features<T>& y)
        : n(x.rows), m(y.rows), value(n * m), size(n * m), largest(kScale * x.longest * y.longest + std::fabs(kBias)) {
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j) {
                double dot = 0, absolute = 0;
                for (index_t k = 0; k < x.cols; ++k) {
                    const double term = x.row(i)[k] * y.row(j)[k];
                    dot += term, absolute += std::fabs(term);
                }
                value[i * m + j] = kScale * dot + kBias, size[i * m + j] = kScale * absolute;
            }
    }

    // The logarithms of the sums of exponentials of the pairs that `which` says.
    template <class Which>
    void logsumexps(const Which& which, Doubles& rows, Doubles& cols) const {
        rows.assign(n, 0), cols.assign(m, 0);
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j)
                if (which(i, j)) rows[i] += std::exp(value[i * m + j]), cols[j] += std::exp(value[i * m + j]);
        for (double& sum : rows) sum = std::log(sum);
        for (double& sum : cols) sum = std::log(sum);
    }
};

// Inputs of one shape.
template <class T>
struct Example {
    const Shape shape;
    const index_t n, m, d;
    std::mt19937 random;
    const Features<T> x, y, teacher_x, teacher_y;
    const Logits logits, teacher;
    std::vector<std::int32_t> row_ids, col_ids;
    Doubles row_lse, col_lse, row_weight, col_weight, positive_weight, row_target, col_target;
    Doubles all_row_lse, all_col_lse, teacher_row_lse, teacher_col_lse;  // of all pairs
    const double unit;  // of the sigmoid's gradient

    explicit Example(const Shape& of)
        : shape(of), n(of.n), m(of.m), d(of.d), random(n + m + d), x(n, d, of.transposed, random),
          y(m, d, of.transposed, random), teacher_x(n, d / 2 + 1, of.transposed, random),
          teacher_y(m, d / 2 + 1, of.transposed, random), logits(x, y), teacher(teacher_x, teacher_y),
          row_weight(n, 0.5 / n), col_weight(m, 0.5 / m), positive_weight(n, -1.0 / n), row_target(n, -0.9 / (n * m)),
          col_target(m, -1.1 / (n * m)), unit(0.5 / n) {
        if (shape.ids != Ids::none) {
            for (index_t i = 0; i < n; ++i) row_ids.push_back(random() % 9);
            for (index_t j = 0; j < m; ++j) col_ids.push_back(random() % 9);
        }
        logits.logsumexps([&](index_t i, index_t j) { return summed(i, j); }, row_lse, col_lse);
        for (index_t i = 0; i < n; ++i) row_weight[i] = std::isinf(row_lse[i]) ? 0 : row_weight[i];
        for (index_t j = 0; j < m; ++j) col_weight[j] = std::isinf(col_lse[j]) ? 0 : col_weight[j];
        const auto all = [](index_t, index_t) { return true; };
        logits.logsumexps(all, all_row_lse, all_col_lse);
        teacher.logsumexps(all, teacher_row_lse, teacher_col_lse);
    }

    bool own(index_t i, index_t j) const { return j == i + shape.offset; }
    bool same(index_t i, index_t j) const {
        return shape.ids != Ids::none && row_ids[i] == col_ids[j] && !own(i, j);
    }
    bool summed(index_t i, index_t j) const { return !own(i, j) && !(same(i, j) && shape.ids == Ids::ignore); }
    // What the sigmoid's logit is multiplied by in its softplus; 0 if it is left out.
    int label(index_t i, index_t j) const {
        if (same(i, j)) return shape.ids == Ids::ignore ? 0 : -1;
        return own(i, j) ? -1 : 1;
    }

    Block block(DType dtype, Product product) const {
        const bool ids = shape.ids != Ids::none;
        return {dtype, product, x.matrix(), y.matrix(), kScale, kBias, shape.offset, ids ? row_ids.data() : nullptr,
                ids ? col_ids.data() : nullptr, shape.ids == Ids::ignore};
    }
};

struct Derivatives {
    Numbers dx, dy;                  // [n][d], [m][d]
    Numbers scalars = Numbers(2);    // dscale, dbias
};

// What plain float64 sums make of an example, and what roundings may.
template <class T>
struct Answers {
    const Example<T>& of;
    const Roundings roundings;
    const double unit;  // the relative rounding of an exponential and of a sum
    Numbers row_lse, col_lse, positive, row_best, col_best, row_above, col_above, loss, row_cross, col_cross;
    Derivatives softmax, sigmoid, distillation;

    Answers(const Example<T>& of, const Roundings& roundings)
        : of(of), roundings(roundings), unit(unit_of(of)), row_lse(of.n), col_lse(of.m), positive(of.n),
          row_best(of.n, {-INFINITY, 0}), col_best(of.m, {-INFINITY, 0}), row_above(of.n), col_above(of.m), loss(of.n),
          row_cross(of.n), col_cross(of.m) {
        find_statistics(), find_counts(), find_sums();
        softmax = derivatives([&](index_t i, index_t j) { return softmax_gradient(i, j); });
        sigmoid = derivatives([&](index_t i, index_t j) {
            const int label = of.label(i, j);
            const double g = label ? of.unit * label / (1 + std::exp(-label * logit(i, j))) : 0;
            return Bounded{g, std::fabs(g) * (unit + growth(of.logits, i, j))};
        });
        distillation = derivatives([&](index_t i, index_t j) {
            const double by_student = 0.5 / of.n * std::exp(logit(i, j) - of.all_row_lse[i]) +
                                      0.5 / of.m * std::exp(logit(i, j) - of.all_col_lse[j]);
            const double by_teacher = 0.5 / of.n * teacher_in_row(i, j) + 0.5 / of.m * teacher_in_col(i, j);
            return Bounded{by_student - by_teacher, by_student * (unit + growth(of.logits, i, j)) +
                                                        by_teacher * (unit + growth(of.teacher, i, j))};
        });
    }

  private:
    using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
    static constexpr double kEps = std::numeric_limits<Compute>::epsilon();

    static double unit_of(const Example<T>& of) {
        const double largest = std::max(of.logits.largest, of.teacher.largest);
        // In float64 the plain sums round as much.
        return kEps * (2 * largest + std::sqrt(double(std::max(of.n, of.m))) + 8) * (std::is_same_v<T, double> ? 2 : 1);
    }

    double logit(index_t i, index_t j) const { return of.logits.value[i * of.m + j]; }
    double teacher_in_row(index_t i, index_t j) const {
        return std::exp(of.teacher.value[i * of.m + j] - of.teacher_row_lse[i]);
    }
    double teacher_in_col(index_t i, index_t j) const {
        return std::exp(of.teacher.value[i * of.m + j] - of.teacher_col_lse[j]);
    }
    // How far rounded features move a logit, and its exponential relative to itself.
    double shift(const Logits& logits, index_t i, index_t j) const {
        return roundings.of_logits() * logits.size[i * of.m + j];
    }
    double growth(const Logits& logits, index_t i, index_t j) const { return std::expm1(shift(logits, i, j)); }

    template <class Visit>
    void for_pairs(const Visit& visit) const {
        for (index_t i = 0; i < of.n; ++i)
            for (index_t j = 0; j < of.m; ++j) visit(i, j);
    }

    void find_statistics() {
        for (index_t i = 0; i < of.n; ++i) row_lse[i] = {of.row_lse[i], unit};
        for (index_t j = 0; j < of.m; ++j) col_lse[j] = {of.col_lse[j], unit};
        for_pairs([&](index_t i, index_t j) {
            const double bound = unit + shift(of.logits, i, j);
            if (of.own(i, j)) positive[i] = {logit(i, j), bound};
            if (of.summed(i, j))
                for (Bounded* lse : {&row_lse[i], &col_lse[j]}) lse->bound = std::max(lse->bound, bound);
            if (of.own(i, j) || of.same(i, j))
                for (Bounded* best : {&row_best[i], &col_best[j]})
                    *best = {std::max(best->value, logit(i, j)), std::max(best->bound, bound)};
        });
    }

    // Between the counts that logits and matches as far off as they may be would give.
    void find_counts() {
        for_pairs([&](index_t i, index_t j) {
            if (of.own(i, j) || of.same(i, j)) return;
            const auto count = [&](Bounded& above, const Bounded& best) {
                const double off = best.bound + unit + shift(of.logits, i, j);
                const int most = logit(i, j) >= best.value - off, least = logit(i, j) >= best.value + off;
                above.value += 0.5 * (most + least), above.bound += 0.5 * (most - least);
            };
            count(row_above[i], row_best[i]), count(col_above[j], col_best[j]);
        });
    }

    // The sigmoid's loss and the distillation's crosses.
    void find_sums() {
        for_pairs([&](index_t i, index_t j) {
            if (const int label = of.label(i, j)) {
                const double power = std::exp(label * logit(i, j)), softplus = std::log1p(power);
                loss[i].value += softplus;
                loss[i].bound += unit * softplus + power / (1 + power) * growth(of.logits, i, j);
            }
            const double size = std::fabs(logit(i, j)), relative = unit + growth(of.teacher, i, j);
            const auto add = [&](Bounded& cross, double weight) {
                cross.value += weight * logit(i, j);
                cross.bound += weight * (size * relative + (unit + shift(of.logits, i, j)) * (1 + relative));
            };
            add(row_cross[i], teacher_in_row(i, j)), add(col_cross[j], teacher_in_col(i, j));
        });
    }

    Bounded softmax_gradient(index_t i, index_t j) const {
        if (of.own(i, j)) return {of.positive_weight[i], unit * std::fabs(of.positive_weight[i])};
        if (!of.summed(i, j)) return {};
        const auto term = [&](double weight, double lse) { return weight ? weight * std::exp(logit(i, j) - lse) : 0; };
        const double sum = term(of.row_weight[i], of.row_lse[i]) + term(of.col_weight[j], of.col_lse[j]);
        const double target = of.same(i, j) ? of.row_target[i] + of.col_target[j] : 0;
        return {sum + target, unit * (sum + std::fabs(target)) + sum * growth(of.logits, i, j)};
    }

    // The derivatives of a pass with this G.
    template <class G>
    Derivatives derivatives(const G& gradient) const {
        Derivatives out{Numbers(of.n * of.d), Numbers(of.m * of.d)};
        const double moved = roundings.of_gradients();
        long double dscale = 0, dbias = 0;  // of n m terms one after the other, more roundings than a kernel's sums have
        for_pairs([&](index_t i, index_t j) {
            const Bounded g = gradient(i, j);
            const double bound = g.bound * (1 + moved) + std::fabs(g.value) * moved;
            const auto add = [&](Bounded* to, const double* row) {
                for (index_t k = 0; k < of.d; ++k) {
                    to[k].value += kScale * g.value * row[k];
                    to[k].bound += kScale * bound * std::fabs(row[k]);
                }
            };
            add(&out.dx[i * of.d], of.y.row(j)), add(&out.dy[j * of.d], of.x.row(i));
            const double size = of.logits.size[i * of.m + j] + std::fabs(kBias);
            dscale += g.value * (logit(i, j) - kBias) / kScale, dbias += g.value;
            out.scalars[0].bound += (g.bound + std::fabs(g.value) * roundings.of_logits()) * size / kScale;
            out.scalars[1].bound += g.bound;
        });
        out.scalars[0].value = double(dscale), out.scalars[1].value = double(dbias);
        return out;
    }
};

}  // namespace clipfast
