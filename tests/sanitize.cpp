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

template <class T>
double largest_error(const Kernels& kernels, const Shape& shape, DType dtype, int threads) {
    const auto [n, m, d, offset] = shape;
    std::mt19937 random(n + m + d);
    std::normal_distribution<double> normal(0, 1 / std::sqrt(double(d)));
    const double scale = 14.3, bias = -0.5;
    std::vector<T> x(n * d), y(m * d), dx(n * d), dy(m * d);
    for (T& v : x) v = rounded<T>(normal(random));
    for (T& v : y) v = rounded<T>(normal(random));
    std::vector<double> row_lse(n), col_lse(m), positive(n), row_weight(n, 0.5 / n), col_weight(m, 0.5 / m);
    std::vector<double> positive_weight(n, -1.0 / n), row_sum(n), col_sum(m), exact_dx(n * d), exact_dy(m * d);
    const Block block{dtype, {x.data(), n, d, d, 1}, {y.data(), m, d, d, 1}, scale, bias, offset};
    kernels.forward(block, {row_lse.data(), col_lse.data(), positive.data()}, threads);

    double error = 0;
    const auto logit = [&](index_t i, index_t j) {
        double dot = 0;
        for (index_t k = 0; k < d; ++k) dot += double(load(x[i * d + k])) * double(load(y[j * d + k]));
        return scale * dot + bias;
    };
    for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < m; ++j) {
            if (j == i + offset) continue;
            row_sum[i] += std::exp(logit(i, j));
            col_sum[j] += std::exp(logit(i, j));
        }
    const auto compare = [&](double got, double sum) {
        if (sum > 0) error = std::max(error, std::fabs(got - std::log(sum)));
        else if (got != -INFINITY) error = INFINITY;
    };
    for (index_t i = 0; i < n; ++i) compare(row_lse[i], row_sum[i]);
    for (index_t j = 0; j < m; ++j) compare(col_lse[j], col_sum[j]);
    for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < m; ++j) {
            const double g = j == i + offset ? positive_weight[i]
                                             : row_weight[i] * std::exp(logit(i, j) - row_lse[i]) +
                                                   col_weight[j] * std::exp(logit(i, j) - col_lse[j]);
            for (index_t k = 0; k < d; ++k) {
                exact_dx[i * d + k] += scale * g * double(load(y[j * d + k]));
                exact_dy[j * d + k] += scale * g * double(load(x[i * d + k]));
            }
        }
    kernels.backward(block,
                     {row_lse.data(), row_weight.data(), col_lse.data(), col_weight.data(), positive_weight.data()},
                     {dx.data(), dy.data()}, threads);
    for (index_t i = 0; i < n * d; ++i) error = std::max(error, std::fabs(double(load(dx[i])) - exact_dx[i]));
    for (index_t i = 0; i < m * d; ++i) error = std::max(error, std::fabs(double(load(dy[i])) - exact_dy[i]));
    return error;
}

}  // namespace

int main() {
    int failures = 0;
    for (const Kernels& kernels : instruction_sets()) {
        if (!kernels.available()) continue;
        double worst = 0;
        for (const Shape& shape : kShapes)
            for (const int threads : {1, 3}) {
                const double single = largest_error<float>(kernels, shape, DType::float32, threads);
                const double twice = largest_error<double>(kernels, shape, DType::float64, threads);
                // Gradients are at most scale, 14.3, of which bfloat16 keeps 8 bits and float16 11.
                const double brain = largest_error<bfloat16>(kernels, shape, DType::bfloat16, threads);
                const double half = largest_error<float16>(kernels, shape, DType::float16, threads);
                worst = std::max(worst, single);
                if (single < 1e-4 && twice < 1e-12 && brain < 0.03 && half < 0.004) continue;
                std::printf("%s: n=%ld m=%ld d=%ld: errors %g (float32), %g (float64), %g (bfloat16), %g (float16)\n",
                            kernels.name, long(shape.n), long(shape.m), long(shape.d), single, twice, brain, half);
                ++failures;
            }
        std::printf("%s: largest float32 error %g\n", kernels.name, worst);
    }
    return failures != 0;
}
