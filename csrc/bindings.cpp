// clipfast._cpu: addresses, strides and scalars in, nothing computed here. Arguments are checked by the Python side,
// but for what would end the process.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "cross_entropy.h"
#include "kernels.h"

namespace py = pybind11;
using namespace py::literals;
using namespace clipfast;

namespace {

using Address = std::uintptr_t;  // 0 where there is nothing

template <class T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

DType dtype_from(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "float64") return DType::float64;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float16") return DType::float16;
    throw std::invalid_argument("dtype: got " + name + "; accepted are float32, float64, bfloat16, float16");
}

Product product_from(const std::string& name) {
    if (name == "exact") return Product::exact;
    if (name == "bfloat16x3") return Product::bfloat16x3;
    if (name == "bfloat16") return Product::bfloat16;
    throw std::invalid_argument("product: got " + name + "; accepted are exact, bfloat16x3, bfloat16");
}

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels& kernels : instruction_sets())
        if (name == kernels.name && kernels.available()) return kernels;
    throw std::invalid_argument("isa: this processor has no " + name);
}

Matrix make_matrix(Address data, index_t rows, index_t cols, index_t row_stride, index_t col_stride, Address factors) {
    return {pointer<void>(data), rows, cols, row_stride, col_stride, pointer<void>(factors)};
}

// A 0-D tensor of the type that adds features of `dtype` up.
double get(Address address, DType dtype) {
    return dtype == DType::float64 ? *pointer<double>(address) : *pointer<float>(address);
}

void put(double value, Address address, DType dtype) {
    if (!address) return;
    if (dtype == DType::float64)
        *pointer<double>(address) = value;
    else
        *pointer<float>(address) = static_cast<float>(value);  // inf beyond its range, as IEEE 754 rounds
}

Block make_block(const std::string& dtype, const std::string& product, const Matrix& x, const Matrix& y, Address scale,
                 Address bias, index_t diag_offset, Address row_ids, Address col_ids, bool ignores_same_ids) {
    if (x.rows < 1 || y.rows < 1 || x.cols < 1 || x.cols != y.cols)
        throw std::invalid_argument("x, y: got [" + std::to_string(x.rows) + ", " + std::to_string(x.cols) + "] and [" +
                                    std::to_string(y.rows) + ", " + std::to_string(y.cols) +
                                    "]; accepted are [n, d] and [m, d], n, m and d at least 1");
    const DType of = dtype_from(dtype);
    const double scale_value = scale ? get(scale, of) : 1, bias_value = bias ? get(bias, of) : 0;
    return {of, product_from(product), x, y, scale_value, bias_value, diag_offset,
            pointer<std::int32_t>(row_ids), pointer<std::int32_t>(col_ids), ignores_same_ids};
}

Weights make_weights(Address row_lse, Address row_weight, Address col_lse, Address col_weight, Address positive_weight,
                     Address row_target, Address col_target, Address kept) {
    return {pointer<double>(row_lse),    pointer<double>(row_weight),      pointer<double>(col_lse),
            pointer<double>(col_weight), pointer<double>(positive_weight), pointer<double>(row_target),
            pointer<double>(col_target), pointer<void>(kept)};
}

// Whether a signal's handler has raised an exception: in the main thread, which is the only one that handlers run in.
bool signalled() {
    const py::gil_scoped_acquire locked;
    return PyErr_CheckSignals() != 0;
}

// Of the process, in which Python's signal handlers run unless another program has Python in it.
bool in_main_thread() { return syscall(SYS_gettid) == getpid(); }

// Where a pass puts its gradients; dscale and dbias are 0-D tensors of the type that adds features up.
struct Outputs {
    Gradients gradients;
    Address dscale, dbias;

    void put_scalars(const Scalars& scalars, DType dtype) const {
        put(scalars.dscale, dscale, dtype);
        put(scalars.dbias, dbias, dtype);
    }
};

// Runs a pass without Python's lock; its errors become Python's.
template <class Pass>
auto run(const Block& block, int threads, const Pass& pass) {
    const Execution execution{threads, in_main_thread() ? signalled : nullptr};
    try {
        const py::gil_scoped_release unlocked;
        return pass(execution);
    } catch (const Interrupted&) {
        throw py::error_already_set();
    } catch (const OutOfMemory& error) {
        const std::string text = "clipfast needs " + std::to_string(error.bytes) + " bytes of workspace for n = " +
                                 std::to_string(block.n()) + ", m = " + std::to_string(block.m()) +
                                 ", d = " + std::to_string(block.d()) + ", and the system has not so much";
        PyErr_SetString(PyExc_MemoryError, text.c_str());
        throw py::error_already_set();
    }
}

void bind_nouns(py::module_& module) {
    py::class_<Matrix>(module, "Matrix")
        .def(py::init(&make_matrix), "data"_a, "rows"_a, "cols"_a, "row_stride"_a, "col_stride"_a,
             "factors"_a = 0);
    py::class_<Block>(module, "Block")
        .def(py::init(&make_block), "dtype"_a, "product"_a, "x"_a, "y"_a, "scale"_a = 0,
             "bias"_a = 0, "diag_offset"_a = 0, "row_ids"_a = 0, "col_ids"_a = 0, "ignores_same_ids"_a = true);
    py::class_<Matches>(module, "Matches").def(py::init([](Address rows, Address cols) {
        return Matches{pointer<double>(rows), pointer<double>(cols)};
    }), "rows"_a = 0, "cols"_a = 0);
    py::class_<Statistics>(module, "Statistics")
        .def(py::init([](Address row_lse, Address col_lse, Address positive, Address row_above, Address col_above,
                         Address kept) {
                 return Statistics{pointer<double>(row_lse),        pointer<double>(col_lse),
                                   pointer<double>(positive),       pointer<std::int32_t>(row_above),
                                   pointer<std::int32_t>(col_above), pointer<void>(kept)};
             }),
             "row_lse"_a, "col_lse"_a, "positive"_a, "row_above"_a = 0, "col_above"_a = 0, "kept"_a = 0);
    py::class_<Weights>(module, "Weights")
        .def(py::init(&make_weights), "row_lse"_a, "row_weight"_a, "col_lse"_a, "col_weight"_a, "positive_weight"_a,
             "row_target"_a = 0, "col_target"_a = 0, "kept"_a = 0);
    module.attr("KEPT_HEAD") = kKeptHead;
    module.attr("KEPT_PADDING") = kKeptPadding;
    py::class_<Outputs>(module, "Gradients")
        .def(py::init([](Address dx, Address dy, const std::string& dtype, Address dscale, Address dbias) {
                 return Outputs{{pointer<void>(dx), pointer<void>(dy), dtype_from(dtype)}, dscale, dbias};
             }),
             "dx"_a, "dy"_a, "dtype"_a, "dscale"_a, "dbias"_a = 0);
    py::class_<Crosses>(module, "Crosses").def(py::init([](Address rows, Address cols) {
        return Crosses{pointer<double>(rows), pointer<double>(cols)};
    }), "rows"_a, "cols"_a);
}

void bind_passes(py::module_& module) {
    module.def("forward", [](const std::string& isa, const Block& block, const Matches& matches, const Statistics& out,
                             int threads) {
        const Kernels& kernels = kernels_named(isa);
        run(block, threads, [&](const Execution& with) { kernels.forward(block, with, matches, out); });
    });
    module.def("matches", [](const std::string& isa, const Block& block, const Matches& out, int threads) {
        const Kernels& kernels = kernels_named(isa);
        run(block, threads, [&](const Execution& with) { kernels.matches(block, with, out); });
    });
    module.def("backward", [](const std::string& isa, const Block& block, const Weights& weights, const Outputs& out,
                              int threads) {
        const Kernels& kernels = kernels_named(isa);
        const Scalars scalars = run(block, threads, [&](const Execution& with) {
            return kernels.backward(block, with, weights, out.gradients);
        });
        out.put_scalars(scalars, block.dtype);
    });
    module.def("sigmoid", [](const std::string& isa, const Block& block, double unit, Address row_loss,
                             const std::optional<Outputs>& given, int threads) {
        const Kernels& kernels = kernels_named(isa);
        const Outputs out = given.value_or(Outputs{});
        const Scalars scalars = run(block, threads, [&](const Execution& with) {
            return kernels.sigmoid(block, with, unit, pointer<double>(row_loss), out.gradients);
        });
        out.put_scalars(scalars, block.dtype);
        return scalars.dbias;
    });
    module.def("distillation", [](const std::string& isa, const Block& block, const Weights& weights,
                                  const Block& teacher, const Weights& teacher_weights, const Crosses& crosses,
                                  const std::optional<Outputs>& given, int threads) {
        const Kernels& kernels = kernels_named(isa);
        const Outputs out = given.value_or(Outputs{});
        if (teacher.dtype != block.dtype || teacher.n() != block.n() || teacher.m() != block.m())
            throw std::invalid_argument("teacher: has another dtype, n or m than the block");
        const Scalars scalars = run(block, threads, [&](const Execution& with) {
            return kernels.distillation(block, with, weights, teacher, teacher_weights, crosses, out.gradients);
        });
        out.put_scalars(scalars, block.dtype);
    });
    module.def(
        "workspace_bytes",
        [](const std::string& isa, const Block& block, bool ranks, bool symmetric, bool sigmoid, bool distillation,
           int threads) {
            return kernels_named(isa).workspace_bytes(block, {threads}, {ranks, symmetric, sigmoid, distillation});
        },
        "isa"_a, "block"_a, py::kw_only(), "ranks"_a = false, "symmetric"_a = false, "sigmoid"_a = false,
        "distillation"_a = false, "threads"_a);
}

void bind_cross_entropy(py::module_& module) {
    // The loss and its gradients at once.
    module.def("symmetric", [](const std::string& isa, const Block& block, Address loss, const Outputs& out,
                               int threads) {
        const Kernels& kernels = kernels_named(isa);
        const Scalars scalars =
            run(block, threads, [&](const Execution& with) { return kernels.symmetric(block, with, out.gradients); });
        put(scalars.loss, loss, block.dtype);
        out.put_scalars(scalars, block.dtype);
    });
    module.def("symmetric_cross_entropy", [](Address row_lse, Address col_lse, Address positive, index_t n, Address loss,
                                             const std::string& dtype) {
        const Statistics statistics{pointer<double>(row_lse), pointer<double>(col_lse), pointer<double>(positive)};
        put(symmetric_cross_entropy(statistics, n), loss, dtype_from(dtype));
    });
    // The gradients of the symmetric loss, times `gradient`, from the statistics that `forward` gave.
    module.def("symmetric_gradients", [](const std::string& isa, const Block& block, const Statistics& statistics,
                                         double gradient, const Outputs& out, int threads) {
        const Kernels& kernels = kernels_named(isa);
        SymmetricCrossEntropy loss(statistics, block.n(), block.m());
        const double dbias = loss.differentiate(gradient).dbias;
        Scalars scalars = run(block, threads, [&](const Execution& with) {
            return kernels.backward(block, with, loss.weights(), out.gradients);
        });
        scalars.dbias = dbias;
        out.put_scalars(scalars, block.dtype);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "clipfast's compiled CPU kernels";
    module.def("instruction_sets", [] {
        py::list names;
        for (const Kernels& kernels : instruction_sets())
            names.append(py::make_tuple(kernels.name, kernels.available()));
        return names;
    });
    bind_nouns(module);
    bind_passes(module);
    bind_cross_entropy(module);
    module.def("getenv", [](const char* name) -> const char* { return std::getenv(name); });
    module.def("release_workspace", &Buffer::release);
    module.def("multiply_adds", [](const std::string& isa, const std::string& dtype, index_t rounds) {
        const Kernels& kernels = kernels_named(isa);
        const py::gil_scoped_release unlocked;
        return kernels.multiply_adds(dtype_from(dtype), rounds);
    });
    module.def("exp2", [](const std::string& isa, const std::string& dtype, Address x, Address out, index_t count) {
        kernels_named(isa).exp2(dtype_from(dtype), pointer<void>(x), pointer<void>(out), count);
    });
    module.def("softplus_and_sigmoid", [](const std::string& isa, const std::string& dtype, Address x, Address softplus,
                                          Address sigmoid, index_t count) {
        kernels_named(isa).softplus_and_sigmoid(dtype_from(dtype), pointer<void>(x), pointer<void>(softplus),
                                                pointer<void>(sigmoid), count);
    });
}
