// Runs every instruction set over awkward shapes in exactly sized memory, for the sanitizers (make sanitize), and compares
// what they return with a plain float64 sum.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/dtypes.h"
#include "../csrc/kernels.h"

using namespace clipfast;

namespace {

struct Shape {
    index_t n, m, d, offset;
};

const Shape kShapes[] = {{1, 1, 1, 0},    {1, 3, 2, 0},     {2, 1, 5, 0},      {7, 7, 3, 0},       {16, 16, 16, 0},
                         {17, 33, 31, 0}, {63, 65, 48, -2}, {64, 64, 64, 0},   {65, 129, 100, 40}, {127, 128, 129, 0},
                         {5, 300, 8, 290}, {300, 5, 8, -7}, {257, 255, 513, 3}, {1000, 1001, 7, 0}, {50, 60, 17, 1000},
                         {7, 11, 384, 0}, {13, 13, 512, 0}, {11, 13, 640, 0}, {2, 2, 768, 0}, {31, 37, 1024, 0},
                         {5, 5, 1152, 0}, {37, 41, 1280, 0}, {521, 523, 33, 1}};

template <class T>
T rounded(double v) {
    if constexpr (std::is_floating_point_v<T>) return T(v);
    else return T::store(float(v));
}

// Inputs of one shape, and what a plain float64 sum makes of them.
template <class T>
struct Example {
    static constexpr double kScale = 14.3, kBias = -0.5;
    Shape shape;
    std::vector<T> x, y;
    std::vector<double> row_lse, col_lse, row_weight, col_weight, positive_weight, dx, dy;

    explicit Example(const Shape& of) : shape(of) {
        const auto [n, m, d, offset] = shape;
        std::mt19937 random(n + m + d);
        std::normal_distribution<double> normal(0, 1 / std::sqrt(double(d)));
        x.resize(n * d), y.resize(m * d);
        for (T& v : x) v = rounded<T>(normal(random));
        for (T& v : y) v = rounded<T>(normal(random));
        row_weight.assign(n, 0.5 / n), col_weight.assign(m, 0.5 / m), positive_weight.assign(n, -1.0 / n);
        std::vector<double> logits(n * m), row_sum(n), col_sum(m);
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j) {
                double dot = 0;
                for (index_t k = 0; k < d; ++k) dot += double(load(x[i * d + k])) * double(load(y[j * d + k]));
                logits[i * m + j] = kScale * dot + kBias;
                if (j == i + offset) continue;
                row_sum[i] += std::exp(logits[i * m + j]);
                col_sum[j] += std::exp(logits[i * m + j]);
            }
        for (const double sum : row_sum) row_lse.push_back(std::log(sum));
        for (const double sum : col_sum) col_lse.push_back(std::log(sum));
        dx.resize(n * d), dy.resize(m * d);
        for (index_t i = 0; i < n; ++i)
            for (index_t j = 0; j < m; ++j) {
                const double logit = logits[i * m + j];
                const double g = j == i + offset ? positive_weight[i]
                                                 : row_weight[i] * std::exp(logit - row_lse[i]) +
                                                       col_weight[j] * std::exp(logit - col_lse[j]);
                for (index_t k = 0; k < d; ++k) {
                    dx[i * d + k] += kScale * g * double(load(y[j * d + k]));
                    dy[j * d + k] += kScale * g * double(load(x[i * d + k]));
                }
            }
    }

    double largest_error(const Kernels& kernels, DType dtype, Product product, int threads) const {
        const auto [n, m, d, offset] = shape;
        std::vector<T> got_dx(n * d), got_dy(m * d);
        std::vector<double> rows(n), cols(m), positive(n);
        const Block block{dtype, product, {x.data(), n, d, d, 1}, {y.data(), m, d, d, 1}, kScale, kBias, offset};
        kernels.forward(block, {rows.data(), cols.data(), positive.data()}, threads);
        kernels.backward(block, {rows.data(), row_weight.data(), cols.data(), col_weight.data(), positive_weight.data()},
                         {got_dx.data(), got_dy.data()}, threads);
        double error = 0;
        const auto compare = [&](double got, double exact) {
            if (got == exact) return;
            const double difference = std::fabs(got - exact);
            error = std::isfinite(difference) ? std::max(error, difference) : INFINITY;  // max would pass over a NaN
        };
        for (index_t i = 0; i < n; ++i) compare(rows[i], row_lse[i]);
        for (index_t j = 0; j < m; ++j) compare(cols[j], col_lse[j]);
        for (index_t i = 0; i < n * d; ++i) compare(load(got_dx[i]), dx[i]);
        for (index_t i = 0; i < m * d; ++i) compare(load(got_dy[i]), dy[i]);
        return error;
    }
};

// Whether every instruction set that this processor has stays within `bound` of the plain sum.
template <class T>
bool passes(const Example<T>& example, DType dtype, Product product, double bound) {
    bool good = true;
    for (const Kernels& kernels : instruction_sets())
        for (const int threads : {1, 3}) {
            if (!kernels.available()) continue;
            const double error = example.largest_error(kernels, dtype, product, threads);
            if (error < bound) continue;
            const auto [n, m, d, offset] = example.shape;
            std::printf("%s, %d threads: n=%ld m=%ld d=%ld, dtype %d, product %d: error %g, not below %g\n", kernels.name,
                        threads, long(n), long(m), long(d), int(dtype), int(product), error, bound);
            good = false;
        }
    return good;
}

}  // namespace

int main() {
    bool good = true;
    for (const Shape& shape : kShapes) {
        // Gradients are at most scale, 14.3, of which bfloat16 keeps 8 bits and float16 11; logits reach 50.
        const Example<float> single(shape);
        good &= passes(single, DType::float32, Product::exact, 1e-4);
        good &= passes(single, DType::float32, Product::bfloat16x3, 1e-3);
        good &= passes(single, DType::float32, Product::bfloat16, 0.2);
        good &= passes(Example<double>(shape), DType::float64, Product::exact, 1e-12);
        good &= passes(Example<bfloat16>(shape), DType::bfloat16, Product::bfloat16, 0.03);
        good &= passes(Example<float16>(shape), DType::float16, Product::exact, 0.004);
    }
    for (const Kernels& kernels : instruction_sets())
        std::printf("%s: %s\n", kernels.name, !kernels.available() ? "not here" : good ? "passed" : "see above");
    return !good;
}
