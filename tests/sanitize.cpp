// Runs every pass of every instruction set over awkward and random shapes in exactly sized memory, for the sanitizers (make
// sanitize), and compares what they return with plain float64 sums.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/dtypes.h"
#include "../csrc/kernels.h"

using namespace clipfast;

namespace {

enum class Ids { none, ignore, positive };

struct Shape {
    index_t n, m, d, offset;
    Ids ids = Ids::none;
    bool transposed = false;  // features lie column by column
    double longest = INFINITY;  // row of features
};

const std::vector<Shape> kAwkward = {
    {1, 1, 1, 0},     {1, 3, 2, 0},     {2, 1, 5, 0},      {7, 7, 3, 0},       {16, 16, 16, 0},   {17, 33, 31, 0},
    {63, 65, 48, -2}, {64, 64, 64, 0},  {65, 129, 100, 40}, {127, 128, 129, 0}, {5, 300, 8, 290},  {300, 5, 8, -7},
    {257, 255, 513, 3}, {1000, 1001, 7, 0}, {50, 60, 17, 1000}, {7, 11, 384, 0}, {13, 13, 512, 0}, {11, 13, 640, 0},
    {2, 2, 768, 0},   {31, 37, 1024, 0}, {5, 5, 1152, 0},  {37, 41, 1280, 0},  {521, 523, 33, 1}};

std::vector<Shape> random_shapes(int count) {
    std::mt19937 random(0);
    const auto up_to = [&](double most) {
        return index_t(std::exp2(std::uniform_real_distribution<double>(0, std::log2(most))(random)));
    };
    std::vector<Shape> shapes;
    for (int i = 0; i < count; ++i) {
        Shape shape{up_to(150), up_to(150), up_to(100), 0, Ids(i % 3), i % 2 == 1, 0.8};
        if (random() % 2) shape.offset = std::uniform_int_distribution<index_t>(-shape.n - 1, shape.m + 1)(random);
        shapes.push_back(shape);
    }
    return shapes;
}

template <class T>
T rounded(double v) {
    if constexpr (std::is_floating_point_v<T>) return T(v);
    else return T::store(float(v));
}

using Doubles = std::vector<double>;

constexpr double kScale = 14.3, kBias = -0.5;

// The largest error of a pass's numbers, infinite for a NaN; of numbers above the scale, relative to how far above.
struct Error {
    double largest = 0;

    void compare(double got, double exact) {
        if (got == exact) return;
        const double difference = std::fabs(got - exact) / std::max(1.0, std::fabs(exact) / kScale);
        largest = std::isfinite(difference) ? std::max(largest, difference) : INFINITY;  // max would pass over a NaN
    }
    template <class T>
    void compare(const std::vector<T>& got, const Doubles& exact) {
        for (std::size_t i = 0; i < exact.size(); ++i) compare(double(load(got[i])), exact[i]);
    }
    // A count between those that a small error of the logits would give.
    void between(int got, int least, int most) {
        if (got < least || got > most) largest = INFINITY;
    }
};

template <class T>
struct Features {
    index_t rows, cols;
    bool transposed;
    std::vector<T> data;

    Features(index_t rows, index_t cols, const Shape& shape, std::mt19937& random)
        : rows(rows), cols(cols), transposed(shape.transposed), data(rows * cols) {
        std::normal_distribution<double> normal(0, 1 / std::sqrt(double(cols)));
        Doubles row(cols);
        for (index_t i = 0; i < rows; ++i) {
            double square = 0;
            for (double& v : row) v = normal(random), square += v * v;
            const double factor = std::min(1.0, shape.longest / std::sqrt(square));
            for (index_t k = 0; k < cols; ++k) data[place(i, k)] = rounded<T>(row[k] * factor);
        }
    }
    index_t place(index_t row, index_t col) const { return transposed ? col * rows + row : row * cols + col; }
    Matrix matrix() const { return {data.data(), rows, cols, transposed ? 1 : cols, transposed ? rows : 1}; }
    double at(index_t row, index_t col) const {
        return double(load(data[place(row, col)]));
    }
};

// Inputs of one shape, and what plain float64 sums make of them.
template <class T>
struct Example {
    const Shape shape;
    const index_t n, m, d;
    std::mt19937 random;
    Features<T> x, y, teacher_x, teacher_y;
    std::vector<std::int32_t> row_ids, col_ids;
    Doubles logits, teacher;                                       // [n][m]
    Doubles row_lse, col_lse, row_weight, col_weight, positive_weight, row_target, col_target;
    const double unit;  // of the sigmoid's gradient
    Doubles all_row_lse, all_col_lse, teacher_row_lse, teacher_col_lse;  // of all pairs

    struct Exact {
        Doubles dx, dy;
    } of_softmax, of_sigmoid, of_distillation;

    explicit Example(const Shape& of)
        : shape(of), n(of.n), m(of.m), d(of.d), random(n + m + d),
          x(n, d, of, random), y(m, d, of, random),
          teacher_x(n, d / 2 + 1, of, random), teacher_y(m, d / 2 + 1, of, random),
          row_weight(n, 0.5 / n), col_weight(m, 0.5 / m), positive_weight(n, -1.0 / n), row_target(n, -0.9 / (n * m)),
          col_target(m, -1.1 / (n * m)), unit(0.5 / n) {
        if (shape.ids != Ids::none) {
            for (index_t i = 0; i < n; ++i) row_ids.push_back(random() % 9);
            for (index_t j = 0; j < m; ++j) col_ids.push_back(random() % 9);
        }
        logits = logits_of(x, y), teacher = logits_of(teacher_x, teacher_y);
        const auto summed = [&](index_t i, index_t j) { return !own(i, j) && !(same(i, j) && shape.ids == Ids::ignore); };
        logsumexps(logits, summed, row_lse, col_lse);
        for (index_t i = 0; i < n; ++i) row_weight[i] = std::isinf(row_lse[i]) ? 0 : row_weight[i];
        for (index_t j = 0; j < m; ++j) col_weight[j] = std::isinf(col_lse[j]) ? 0 : col_weight[j];
        const auto all = [](index_t, index_t) { return true; };
        logsumexps(logits, all, all_row_lse, all_col_lse);
        logsumexps(teacher, all, teacher_row_lse, teacher_col_lse);
        of_softmax = exact_gradients([&](index_t i, index_t j) { return softmax_gradient(i, j); });
        of_sigmoid = exact_gradients([&](index_t i, index_t j) {
            return label(i, j) ? unit * label(i, j) / (1 + std::exp(-label(i, j) * logits[i * m + j])) : 0.0;
        });
        of_distillation = exact_gradients([&](index_t i, index_t j) {
            const double logit = logits[i * m + j], of_teacher = teacher[i * m + j];
            return 0.5 / n * (std::exp(logit - all_row_lse[i]) - std::exp(of_teacher - teacher_row_lse[i])) +
                   0.5 / m * (std::exp(logit - all_col_lse[j]) - std::exp(of_teacher - teacher_col_lse[j]));
        });
    }

    bool own(index_t i, index_t j) const { return j == i + shape.offset; }
    bool same(index_t i, index_t j) const {
        return shape.ids != Ids::none && row_ids[i] == col_ids[j] && !own(i, j);
    }

    // What the sigmoid's logit is multiplied by in its softplus; 0 if it is left out.
    int label(index_t i, index_t j) const {
        if (same(i, j)) return shape.ids == Ids::ignore ? 0 : -1;
        return own(i, j) ? -1 : 1;
    }
    double softmax_gradient(index_t i, index_t j) const {
        if (own(i, j)) return positive_weight[i];
        if (same(i, j) && shape.ids == Ids::ignore) return 0.0;
        return (row_weight[i] ? row_weight[i] * std::exp(logits[i * m + j] - row_lse[i]) : 0) +
               (col_weight[j] ? col_weight[j] * std::exp(logits[i * m + j] - col_lse[j]) : 0) +
               (same(i, j) ? row_target[i] + col_target[j] : 0);
    }

    Doubles logits_of(const Features<T>& a, const Features<T>& b) const {
        Doubles out(n * m);
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j) {
                double dot = 0;
                for (index_t k = 0; k < a.cols; ++k) dot += a.at(i, k) * b.at(j, k);
                out[i * m + j] = kScale * dot + kBias;
            }
        return out;
    }

    template <class Which>
    void logsumexps(const Doubles& of, const Which& which, Doubles& rows, Doubles& cols) const {
        rows.assign(n, 0), cols.assign(m, 0);
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j)
                if (which(i, j)) rows[i] += std::exp(of[i * m + j]), cols[j] += std::exp(of[i * m + j]);
        for (double& sum : rows) sum = std::log(sum);
        for (double& sum : cols) sum = std::log(sum);
    }

    // dx and dy of a pass's G.
    template <class G>
    Exact exact_gradients(const G& g) const {
        Exact exact{Doubles(n * d), Doubles(m * d)};
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j) {
                const double of_pair = kScale * g(i, j);
                for (index_t k = 0; k < d; ++k) {
                    exact.dx[i * d + k] += of_pair * y.at(j, k);
                    exact.dy[j * d + k] += of_pair * x.at(i, k);
                }
            }
        return exact;
    }

    // Compares them with what `run` puts in their places, in both dtypes.
    template <class Run>
    void compare_gradients(Error& error, DType dtype, const Exact& exact, const Run& run) const {
        const auto& [dx, dy] = exact;
        std::vector<T> got_dx(n * d), got_dy(m * d);
        run(Gradients{got_dx.data(), got_dy.data(), dtype});
        error.compare(got_dx, dx), error.compare(got_dy, dy);
        if constexpr (!std::is_floating_point_v<T>) {
            std::vector<float> sums_dx(n * d), sums_dy(m * d);
            run(Gradients{sums_dx.data(), sums_dy.data(), DType::float32});
            error.compare(sums_dx, dx), error.compare(sums_dy, dy);
        }
    }

    Block block(DType dtype, Product product) const {
        const bool ids = shape.ids != Ids::none;
        return {dtype, product, x.matrix(), y.matrix(), kScale, kBias, shape.offset, ids ? row_ids.data() : nullptr,
                ids ? col_ids.data() : nullptr, shape.ids == Ids::ignore};
    }

    double softmax_error(const Kernels& kernels, const Block& block, const Execution& execution, double bound) const {
        Error error;
        Doubles rows(n), cols(m), positive(n), row_best(n), col_best(m);
        std::vector<std::int32_t> row_above(n), col_above(m);
        kernels.forward(block, execution, {}, {rows.data(), cols.data(), positive.data()});
        error.compare(rows, row_lse), error.compare(cols, col_lse);
        kernels.matches(block, execution, {row_best.data(), col_best.data()});
        kernels.forward(block, execution, {row_best.data(), col_best.data()},
                        {rows.data(), cols.data(), positive.data(), row_above.data(), col_above.data()});
        error.compare(rows, row_lse), error.compare(cols, col_lse);
        const auto count = [&](bool of_row, index_t at) {
            double best = -INFINITY;
            int least = 0, most = 0;
            const auto visit = [&](const auto& pair) {
                for (index_t k = 0; k < (of_row ? m : n); ++k) of_row ? pair(at, k) : pair(k, at);
            };
            visit([&](index_t i, index_t j) { if (own(i, j) || same(i, j)) best = std::max(best, logits[i * m + j]); });
            visit([&](index_t i, index_t j) {
                if (own(i, j) || same(i, j)) return;
                least += logits[i * m + j] >= best + bound, most += logits[i * m + j] >= best - bound;
            });
            error.between(of_row ? row_above[at] : col_above[at], least, most);
        };
        for (index_t i = 0; i < n; ++i) count(true, i);
        for (index_t j = 0; j < m; ++j) count(false, j);
        compare_gradients(error, block.dtype, of_softmax, [&](const Gradients& out) {
            kernels.backward(block, execution,
                             {row_lse.data(), row_weight.data(), col_lse.data(), col_weight.data(), positive_weight.data(),
                              row_target.data(), col_target.data()}, out);
        });
        return error.largest;
    }

    double sigmoid_error(const Kernels& kernels, const Block& block, const Execution& execution) const {
        Error error;
        Doubles loss(n), got(n);
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j)
                if (label(i, j)) loss[i] += std::log1p(std::exp(label(i, j) * logits[i * m + j])) * unit;
        const auto compare = [&] {
            for (double& of_row : got) of_row *= unit;
            error.compare(got, loss);
        };
        kernels.sigmoid(block, execution, unit, got.data(), {});
        compare();
        compare_gradients(error, block.dtype, of_sigmoid, [&](const Gradients& out) {
            kernels.sigmoid(block, execution, unit, got.data(), out);
            compare();
        });
        return error.largest / std::max(1.0, double(m) / n);
    }

    double distillation_error(const Kernels& kernels, Block block, const Execution& execution) const {
        Error error;
        block.row_ids = block.col_ids = nullptr, block.diag_offset = n + m;
        Block of_teacher = block;
        of_teacher.x = teacher_x.matrix(), of_teacher.y = teacher_y.matrix();
        const Doubles rows(n, 0.5 / n), cols(m, 0.5 / m);
        Doubles row_cross(n), col_cross(m), got_rows(n), got_cols(m);
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j) {
                row_cross[i] += std::exp(teacher[i * m + j] - teacher_row_lse[i]) * logits[i * m + j];
                col_cross[j] += std::exp(teacher[i * m + j] - teacher_col_lse[j]) * logits[i * m + j];
            }
        const auto run = [&](const Gradients& out) {
            kernels.distillation(block, execution,
                                 {all_row_lse.data(), rows.data(), all_col_lse.data(), cols.data(), nullptr}, of_teacher,
                                 {teacher_row_lse.data(), rows.data(), teacher_col_lse.data(), cols.data(), nullptr},
                                 {got_rows.data(), got_cols.data()}, out);
            error.compare(got_rows, row_cross), error.compare(got_cols, col_cross);
        };
        run({});
        compare_gradients(error, block.dtype, of_distillation, run);
        return error.largest;
    }
};

// Whether every instruction set that this processor has stays within `bound` of the plain sums.
template <class T>
bool passes(const Example<T>& example, DType dtype, Product product, double bound) {
    bool good = true;
    const Block block = example.block(dtype, product);
    for (const Kernels& kernels : instruction_sets())
        for (const int threads : {1, 3}) {
            if (!kernels.available()) continue;
            const double errors[] = {example.softmax_error(kernels, block, {threads}, bound),
                                     example.sigmoid_error(kernels, block, {threads}),
                                     example.distillation_error(kernels, block, {threads})};
            // Distillation gives means of logits by the teacher's rounded exponentials: their errors, times the logits' spread.
            const double bounds[] = {bound, bound, 5 * bound};
            for (int pass = 0; pass < 3; ++pass) {
                if (errors[pass] < bounds[pass]) continue;
                const char* const names[] = {"softmax", "sigmoid", "distillation"};
                std::printf("%s, %s, %d threads: n=%ld m=%ld d=%ld offset=%ld ids=%d, dtype %d, product %d: "
                            "error %g, not below %g\n",
                            names[pass], kernels.name, threads, long(example.n), long(example.m), long(example.d),
                            long(example.shape.offset), int(example.shape.ids), int(dtype), int(product), errors[pass],
                            bounds[pass]);
                good = false;
            }
        }
    return good;
}

// The dtypes, in turn or all.
bool passes(const Shape& shape, int which, bool all) {
    bool good = true;
    const auto wanted = [&](int kind) { return all || which % 6 == kind; };
    // Gradients are about the scale, 14.3, of which bfloat16 keeps 8 bits and float16 11; logits reach 50.
    if (wanted(0)) good &= passes(Example<float>(shape), DType::float32, Product::exact, 1e-4);
    if (wanted(1)) good &= passes(Example<float>(shape), DType::float32, Product::bfloat16x3, 1e-3);
    if (wanted(2)) good &= passes(Example<float>(shape), DType::float32, Product::bfloat16, 0.2);
    if (wanted(3)) good &= passes(Example<double>(shape), DType::float64, Product::exact, 1e-12);
    if (wanted(4)) good &= passes(Example<bfloat16>(shape), DType::bfloat16, Product::bfloat16, 0.03);
    if (wanted(5)) good &= passes(Example<float16>(shape), DType::float16, Product::exact, 0.004);
    return good;
}

}  // namespace

int main() {
    bool good = true;
    for (const Shape& shape : kAwkward) good &= passes(shape, 0, true);
    int which = 0;
    for (const Shape& shape : random_shapes(300)) good &= passes(shape, which++ / 6, false);
    for (const Kernels& kernels : instruction_sets())
        std::printf("%s: %s\n", kernels.name, !kernels.available() ? "not here" : good ? "passed" : "see above");
    return !good;
}
