// Runs every pass of every instruction set in exactly sized memory, for the sanitizers (make sanitize), and compares what
// they return with plain float64 sums (sanitize.h).
//
// The address sanitizer and the one for undefined behavior must see every remainder of the divisions into tiles, panels,
// blocks and chunks, in one thread and in three: awkward and random shapes. The thread sanitizer must see every loop of a
// pass while three threads take its tasks, which one thread or a small shape does not show, and its instrumented code is
// the slowest: a few shapes, each with another kind of loop. Emulated AMX costs most, by the 32 x 32 x 32 products.
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>

#include "../csrc/cross_entropy.h"
#include "sanitize.h"

using namespace clipfast;

namespace {

const std::vector<Shape> kAwkward = {
    {1, 1, 1, 0},     {1, 3, 2, 0},     {2, 1, 5, 0},       {7, 7, 3, 0},        {16, 16, 16, 0},
    {17, 33, 31, 0},  {63, 65, 48, -2}, {64, 64, 64, 0},    {65, 129, 100, 40},  {127, 128, 129, 0},
    {5, 900, 8, 890}, {900, 5, 8, -7},  {257, 67, 513, 3},  {50, 60, 17, 1000},
    {7, 11, 384, 0},  {13, 13, 512, 0}, {11, 13, 640, 0},   {2, 2, 768, 0},      {31, 37, 1024, 0},
    {5, 5, 1152, 0},  {37, 41, 1280, 0}, {389, 391, 33, 1}};

// Where the passes have work for three threads (kFlopsPerThread).
const std::vector<Shape> kParallel = {
    {257, 65, 129, 3},                        // several blocks of rows, several panels of columns and of d
    {67, 523, 45, 400, Ids::positive, true},  // several blocks of columns, more terms than a sum takes at a time
    {5, 900, 8, 890, Ids::ignore, true},      // many more columns than rows
    {521, 33, 97, -30, Ids::ignore},
    {4100, 31, 12, 5}};                       // several chunks of rows
// Several chunks of rows and of columns, in float64.
const Shape kChunks = {4100, 519, 1, -5, Ids::positive, true};

std::vector<Shape> random_shapes(int count) {
    std::mt19937 random(0);
    const auto up_to = [&](double most) {
        return index_t(std::exp2(std::uniform_real_distribution<double>(0, std::log2(most))(random)));
    };
    std::vector<Shape> shapes;
    for (int i = 0; i < count; ++i) {
        Shape shape{up_to(150), up_to(150), up_to(100), 0, Ids(i % 3), i % 2 == 1};
        if (random() % 2) shape.offset = std::uniform_int_distribution<index_t>(-shape.n - 1, shape.m + 1)(random);
        shapes.push_back(shape);
    }
    return shapes;
}

// One instruction set's passes over an example, against the answers.
template <class T>
struct Trial {
    const Example<T>& of;
    const Answers<T>& answers;
    const Kernels& kernels;
    const Block block;
    const Execution execution;

    // Compares them with what `run` puts in their places, in both dtypes.
    template <class Run>
    void compare_gradients(Error& error, const Derivatives& exact, bool has_dbias, const Run& run) const {
        const auto compare = [&](auto type, DType dtype) {
            std::vector<decltype(type)> dx(of.n * of.d), dy(of.m * of.d);
            const Scalars scalars = run(Gradients{dx.data(), dy.data(), dtype});
            error.compare(dx, exact.dx), error.compare(dy, exact.dy);
            error.compare(Doubles{scalars.dscale, has_dbias ? scalars.dbias : exact.scalars[1].value}, exact.scalars);
        };
        compare(T(), block.dtype);
        if constexpr (!std::is_floating_point_v<T>) compare(float(), DType::float32);
    }

    Error softmax() const {
        Error error;
        Doubles rows(of.n), cols(of.m), positive(of.n);
        // The logits are kept in memory that holds NaN before, and taken up again.
        using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
        std::vector<Compute> kept(kept_size(of.n, of.m), std::numeric_limits<Compute>::quiet_NaN());
        kernels.forward(block, execution, {}, {rows.data(), cols.data(), positive.data(), nullptr, nullptr, kept.data()});
        error.compare(rows, answers.row_lse), error.compare(cols, answers.col_lse);
        error.compare(positive, answers.positive);
        for (const void* logits : {static_cast<const void*>(nullptr), static_cast<const void*>(kept.data())})
            compare_gradients(error, answers.softmax, false, [&](const Gradients& out) {
                return kernels.backward(block, execution,
                                        {of.row_lse.data(), of.row_weight.data(), of.col_lse.data(),
                                         of.col_weight.data(), of.positive_weight.data(), of.row_target.data(),
                                         of.col_target.data(), logits}, out);
            });
        return error;
    }

    // Bit for bit what the passes give one by one.
    Error symmetric() const {
        Error error;
        if (of.m < of.n) return error;
        Doubles rows(of.n), cols(of.m), positive(of.n);
        kernels.forward(block, execution, {}, {rows.data(), cols.data(), positive.data()});
        SymmetricCrossEntropy loss({rows.data(), cols.data(), positive.data()}, of.n, of.m);
        const Scalars alone = loss.differentiate(1);
        std::vector<T> dx(of.n * of.d), dy(of.m * of.d), dx_together(dx.size()), dy_together(dy.size());
        const double dscale =
            kernels.backward(block, execution, loss.weights(), {dx.data(), dy.data(), block.dtype}).dscale;
        const Scalars together =
            kernels.symmetric(block, execution, {dx_together.data(), dy_together.data(), block.dtype});
        const auto differ = [](const std::vector<T>& a, const std::vector<T>& b) {
            return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) != 0;
        };
        if (differ(dx, dx_together) || differ(dy, dy_together) || together.dscale != dscale ||
            together.loss != alone.loss || together.dbias != alone.dbias)
            error.over_bound = INFINITY;
        return error;
    }

    Error ranks() const {
        Error error;
        Doubles rows(of.n), cols(of.m), positive(of.n), row_best(of.n), col_best(of.m);
        std::vector<std::int32_t> row_above(of.n), col_above(of.m);
        kernels.matches(block, execution, {row_best.data(), col_best.data()});
        kernels.forward(block, execution, {row_best.data(), col_best.data()},
                        {rows.data(), cols.data(), positive.data(), row_above.data(), col_above.data()});
        error.compare(rows, answers.row_lse), error.compare(cols, answers.col_lse);
        error.compare(positive, answers.positive);
        for (Doubles* best : {&row_best, &col_best})
            for (double& logit : *best) logit *= std::log(2.0);
        error.compare(row_best, answers.row_best), error.compare(col_best, answers.col_best);
        error.compare(row_above, answers.row_above), error.compare(col_above, answers.col_above);
        return error;
    }

    Error sigmoid() const {
        Error error;
        Doubles loss(of.n);
        const auto run = [&](const Gradients& out) {
            const Scalars scalars = kernels.sigmoid(block, execution, of.unit, loss.data(), out);
            error.compare(loss, answers.loss);
            return scalars;
        };
        run({});
        compare_gradients(error, answers.sigmoid, true, run);
        return error;
    }

    Error distillation() const {
        Error error;
        Block student = block;
        student.row_ids = student.col_ids = nullptr, student.diag_offset = of.n + of.m;
        Block teacher = student;
        teacher.x = of.teacher_x.matrix(), teacher.y = of.teacher_y.matrix();
        const Doubles rows(of.n, 0.5 / of.n), cols(of.m, 0.5 / of.m);
        Doubles row_cross(of.n), col_cross(of.m);
        const auto run = [&](const Gradients& out) {
            const Scalars scalars = kernels.distillation(
                student, execution, {of.all_row_lse.data(), rows.data(), of.all_col_lse.data(), cols.data(), nullptr},
                teacher, {of.teacher_row_lse.data(), rows.data(), of.teacher_col_lse.data(), cols.data(), nullptr},
                {row_cross.data(), col_cross.data()}, out);
            error.compare(row_cross, answers.row_cross), error.compare(col_cross, answers.col_cross);
            return scalars;
        };
        run({});
        compare_gradients(error, answers.distillation, false, run);
        return error;
    }
};

#ifdef __SANITIZE_THREAD__
constexpr bool kOnlyThreads = true;
#else
constexpr bool kOnlyThreads = false;
#endif

// Whether every instruction set that this processor has keeps every number within its bound, and the softmax's numbers
// also within `flat`.
template <class T>
bool passes(const Example<T>& example, const Answers<T>& exact, DType dtype, Product product, double flat) {
    bool good = true;
    std::optional<Answers<T>> rounded;
    for (const Kernels& kernels : instruction_sets()) {
        if (!kernels.available()) continue;
        const std::string name = kernels.name;
        const bool rounds = (name == "amx" && product != Product::exact) ||
                            (name == "avx512_bf16" && product == Product::bfloat16);
        if (rounds && !rounded) rounded.emplace(example, Roundings::of(dtype, product));
        for (const int threads : {1, 3}) {
            if (kOnlyThreads && threads == 1) continue;
            const Trial<T> trial{example, rounds ? *rounded : exact, kernels, example.block(dtype, product), {threads}};
            const Error errors[] = {trial.softmax(), trial.symmetric(), trial.ranks(), trial.sigmoid(),
                                    trial.distillation()};
            for (int pass = 0; pass < 5; ++pass) {
                const double most = pass ? INFINITY : flat;
                if (errors[pass].over_bound <= 1 && errors[pass].largest < most) continue;
                const char* const names[] = {"softmax", "symmetric", "ranks", "sigmoid", "distillation"};
                std::printf("%s, %s, %d threads: n=%ld m=%ld d=%ld offset=%ld ids=%d, dtype %d, product %d: "
                            "error %g, not below %g, or %g of its bound\n",
                            names[pass], kernels.name, threads, long(example.n), long(example.m), long(example.d),
                            long(example.shape.offset), int(example.shape.ids), int(dtype), int(product),
                            errors[pass].largest, most, errors[pass].over_bound);
                good = false;
            }
        }
    }
    return good;
}

template <class T>
bool passes(const Shape& shape, DType dtype, const std::vector<std::pair<Product, double>>& products) {
    const Example<T> example(shape);
    const Answers<T> exact(example, {});
    bool good = true;
    for (const auto& [product, flat] : products) good &= passes(example, exact, dtype, product, flat);
    return good;
}

bool passes_awkward(const Shape& shape) {
    // Gradients are at most scale, 14.3, of which bfloat16 keeps 8 bits and float16 11; logits reach 50.
    bool good = passes<float>(shape, DType::float32,
                              {{Product::exact, 1e-4}, {Product::bfloat16x3, 1e-3}, {Product::bfloat16, 0.2}});
    good &= passes<double>(shape, DType::float64, {{Product::exact, 1e-12}});
    good &= passes<bfloat16>(shape, DType::bfloat16, {{Product::bfloat16, 0.03}});
    good &= passes<float16>(shape, DType::float16, {{Product::exact, 0.004}});
    return good;
}

// A dtype and product, in turn.
bool passes_random(const Shape& shape, int which) {
    switch (which % 6) {
        case 0: return passes<float>(shape, DType::float32, {{Product::exact, INFINITY}});
        case 1: return passes<float>(shape, DType::float32, {{Product::bfloat16x3, INFINITY}});
        case 2: return passes<float>(shape, DType::float32, {{Product::bfloat16, INFINITY}});
        case 3: return passes<double>(shape, DType::float64, {{Product::exact, INFINITY}});
        case 4: return passes<bfloat16>(shape, DType::bfloat16, {{Product::bfloat16, INFINITY}});
        default: return passes<float16>(shape, DType::float16, {{Product::exact, INFINITY}});
    }
}

}  // namespace

int main() {
    bool good = true;
    for (const Shape& shape : kParallel) good &= passes_awkward(shape);
    good &= passes<double>(kChunks, DType::float64, {{Product::exact, 1e-12}});
    if (!kOnlyThreads) {
        for (const Shape& shape : kAwkward) good &= passes_awkward(shape);
        int which = 0;
        for (const Shape& shape : random_shapes(300)) good &= passes_random(shape, which++ / 6);
    }
    for (const Kernels& kernels : instruction_sets())
        std::printf("%s: %s\n", kernels.name, !kernels.available() ? "not here" : good ? "passed" : "see above");
    return !good;
}
