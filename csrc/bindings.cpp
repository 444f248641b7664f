// clipfast._cpu: tensors and the nouns of clipfast/block.py in, nothing computed here. Arguments are checked by the
// Python side, but for what would end the process.

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
#include "tensors.h"

namespace py = pybind11;
using namespace py::literals;
using namespace clipfast;

namespace {

template <class T>
T* pointer(std::uintptr_t address) { return reinterpret_cast<T*>(address); }

DType dtype_from(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "float64") return DType::float64;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float16") return DType::float16;
    throw std::invalid_argument("dtype: got " + name + "; accepted are float32, float64, bfloat16, float16");
}

// `precision` is what torch.get_float32_matmul_precision says, of float32; the kernels know which of the kinds pay on the instruction
// set in use, and take a more exact one where they do not.
Product product_of(DType dtype, const std::string& precision) {
    if (dtype == DType::bfloat16) return Product::bfloat16;
    if (dtype != DType::float32 || precision == "highest") return Product::exact;
    if (precision == "high") return Product::bfloat16x3;
    if (precision == "medium") return Product::bfloat16;
    throw std::invalid_argument("precision: got " + precision + "; accepted are highest, high, medium");
}

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels& kernels : instruction_sets())
        if (name == kernels.name && kernels.available()) return kernels;
    throw std::invalid_argument("isa: this processor has no " + name);
}

const Kernels& best_kernels() {
    for (const Kernels& kernels : instruction_sets())
        if (kernels.available()) return kernels;
    throw std::runtime_error("this processor has none of the instruction sets");
}

// The instruction set that the environment names, or the best that this processor has.
const Kernels& kernels_in_use() {
    static const Kernels& best = best_kernels();
    const char* name = std::getenv("CLIPFAST_CPU_ISA");
    return name && *name ? kernels_named(name) : best;
}

// The nouns, from NamedTuples of tensors in the order of clipfast/block.py.

template <class T>
T* data(py::handle tensor) { return Tensor(tensor).data<T>(); }

Block block_of(const py::tuple& block, const std::string& precision) {
    const Tensor x(block[0]), y(block[1]), scale(block[2]), bias(block[3]), x_factor(block[5]), y_factor(block[6]);
    const Matrix rows = x.matrix(x_factor), cols = y.matrix(y_factor);
    if (x.dtype() != y.dtype()) throw std::invalid_argument("x, y: have two dtypes; accepted is one");
    if (rows.rows < 1 || cols.rows < 1 || rows.cols < 1 || rows.cols != cols.cols)
        throw std::invalid_argument("x, y: got [" + std::to_string(rows.rows) + ", " + std::to_string(rows.cols) +
                                    "] and [" + std::to_string(cols.rows) + ", " + std::to_string(cols.cols) +
                                    "]; accepted are [n, d] and [m, d], n, m and d at least 1");
    return {x.dtype(), product_of(x.dtype(), precision), rows, cols, scale.get(1), bias.get(0),
            block[4].cast<index_t>(), data<std::int32_t>(block[7]), data<std::int32_t>(block[8]),
            block[9].cast<std::string>() == "ignore"};
}

Matches matches_of(const py::tuple& of) { return {data<double>(of[0]), data<double>(of[1])}; }

Statistics statistics_of(const py::tuple& of) {
    return {data<double>(of[0]),       data<double>(of[1]),       data<double>(of[2]),
            data<std::int32_t>(of[3]), data<std::int32_t>(of[4]), data<void>(of[5])};
}

Weights weights_of(const py::tuple& of) {
    return {data<double>(of[0]), data<double>(of[1]), data<double>(of[2]), data<double>(of[3]),
            data<double>(of[4]), data<double>(of[5]), data<double>(of[6]), data<void>(of[7])};
}

// Where a pass puts its gradients.
struct Outputs {
    Gradients gradients;
    Tensor dscale, dbias;

    // None where no gradients are wanted.
    explicit Outputs(const std::optional<py::tuple>& of, py::handle dbias = py::none())
        : dscale(of ? py::handle((*of)[2]) : py::none()), dbias(dbias) {
        if (!of) return;
        const Tensor dx((*of)[0]), dy((*of)[1]);
        gradients = {dx.data<void>(), dy.data<void>(), dx.dtype()};
    }

    void put(const Scalars& scalars) const {
        dscale.put(scalars.dscale);
        dbias.put(scalars.dbias);
    }
};

// Whether a signal's handler has raised an exception: in the main thread, which is the only one that handlers run in.
bool signalled() {
    const py::gil_scoped_acquire locked;
    return PyErr_CheckSignals() != 0;
}

// Of the process, in which Python's signal handlers run unless another program has Python in it.
bool in_main_thread() { return syscall(SYS_gettid) == getpid(); }

// Runs a pass without Python's lock; its errors become Python's.
template <class Pass>
auto run(const Block& block, int threads, const Pass& pass) {
    const Kernels& kernels = kernels_in_use();
    const Execution execution{threads, in_main_thread() ? signalled : nullptr};
    try {
        const py::gil_scoped_release unlocked;
        return pass(kernels, execution);
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

void bind_passes(py::module_& module) {
    module.def("forward", [](const py::tuple& of, const std::string& precision, int threads,
                             const std::optional<py::tuple>& given, const py::tuple& out) {
        const Block block = block_of(of, precision);
        const Matches matches = given ? matches_of(*given) : Matches{};
        const Statistics statistics = statistics_of(out);
        run(block, threads, [&](const Kernels& kernels, const Execution& with) {
            kernels.forward(block, with, matches, statistics);
        });
    });
    module.def("matches", [](const py::tuple& of, const std::string& precision, int threads, const py::tuple& out) {
        const Block block = block_of(of, precision);
        const Matches matches = matches_of(out);
        run(block, threads, [&](const Kernels& kernels, const Execution& with) {
            kernels.matches(block, with, matches);
        });
    });
    module.def("backward", [](const py::tuple& of, const std::string& precision, int threads, const py::tuple& given,
                              const py::tuple& gradients) {
        const Block block = block_of(of, precision);
        const Weights weights = weights_of(given);
        const Outputs out(gradients);
        out.put(run(block, threads, [&](const Kernels& kernels, const Execution& with) {
            return kernels.backward(block, with, weights, out.gradients);
        }));
    });
    module.def("sigmoid", [](const py::tuple& of, const std::string& precision, int threads, double unit,
                             py::handle row_loss, const std::optional<py::tuple>& gradients) {
        const Block block = block_of(of, precision);
        const Outputs out(gradients);
        auto* const losses = data<double>(row_loss);
        const Scalars scalars = run(block, threads, [&](const Kernels& kernels, const Execution& with) {
            return kernels.sigmoid(block, with, unit, losses, out.gradients);
        });
        out.put(scalars);
        return scalars.dbias;
    });
    module.def("distillation", [](const py::tuple& of, const std::string& precision, int threads,
                                  const py::tuple& given, const py::tuple& of_teacher, const py::tuple& by_teacher,
                                  py::handle row_cross, py::handle col_cross,
                                  const std::optional<py::tuple>& gradients) {
        const Block block = block_of(of, precision), teacher = block_of(of_teacher, precision);
        if (teacher.dtype != block.dtype || teacher.n() != block.n() || teacher.m() != block.m())
            throw std::invalid_argument("teacher: has another dtype, n or m than the block");
        const Weights weights = weights_of(given), teacher_weights = weights_of(by_teacher);
        const Crosses crosses{data<double>(row_cross), data<double>(col_cross)};
        const Outputs out(gradients);
        out.put(run(block, threads, [&](const Kernels& kernels, const Execution& with) {
            return kernels.distillation(block, with, weights, teacher, teacher_weights, crosses, out.gradients);
        }));
    });
    module.def(
        "workspace_bytes",
        [](const std::string& dtype, const std::string& precision, index_t n, index_t m, index_t d, bool norms,
           bool ranks, bool symmetric, bool sigmoid, bool distillation, int threads) {
            const DType of = dtype_from(dtype);
            const int none = 0;
            const void* const factors = norms ? &none : nullptr;  // an address that is not read
            const Matrix x{nullptr, n, d, d, 1, factors}, y{nullptr, m, d, d, 1, factors};
            const Block block{of, product_of(of, precision), x, y, 1, 0, 0};
            return kernels_in_use().workspace_bytes(block, {threads}, {ranks, symmetric, sigmoid, distillation});
        },
        "dtype"_a, "precision"_a, "n"_a, "m"_a, "d"_a, py::kw_only(), "norms"_a, "ranks"_a, "symmetric"_a, "sigmoid"_a,
        "distillation"_a, "threads"_a);
    module.attr("KEPT_HEAD") = kKeptHead;
    module.attr("KEPT_PADDING") = kKeptPadding;
}

void bind_cross_entropy(py::module_& module) {
    // The loss and its gradients at once.
    module.def("symmetric", [](const py::tuple& of, const std::string& precision, int threads, py::handle loss,
                               const py::tuple& gradients, py::handle dbias) {
        const Block block = block_of(of, precision);
        const Outputs out(gradients, dbias);
        const Scalars scalars = run(block, threads, [&](const Kernels& kernels, const Execution& with) {
            return kernels.symmetric(block, with, out.gradients);
        });
        Tensor(loss).put(scalars.loss);
        out.put(scalars);
    });
    module.def("symmetric_cross_entropy", [](const py::tuple& given, index_t n, py::handle loss) {
        Tensor(loss).put(symmetric_cross_entropy(statistics_of(given), n));
    });
    // The gradients of the symmetric loss, times `gradient`, from the statistics that `forward` gave.
    module.def("symmetric_gradients", [](const py::tuple& of, const std::string& precision, int threads,
                                         const py::tuple& given, double gradient, const py::tuple& gradients,
                                         py::handle dbias) {
        const Block block = block_of(of, precision);
        SymmetricCrossEntropy loss(statistics_of(given), block.n(), block.m());
        const Outputs out(gradients, dbias);
        const double by_bias = loss.differentiate(gradient).dbias;
        Scalars scalars = run(block, threads, [&](const Kernels& kernels, const Execution& with) {
            return kernels.backward(block, with, loss.weights(), out.gradients);
        });
        scalars.dbias = by_bias;
        out.put(scalars);
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
    bind_passes(module);
    bind_cross_entropy(module);
    dlpack::use(py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__"));
    module.def("item", [](py::handle scalar) { return Tensor(scalar).get(0); });
    module.def("getenv", [](const py::args& names) {
        py::tuple values(names.size());
        for (std::size_t i = 0; i < names.size(); ++i) {
            const char* const name = PyUnicode_AsUTF8(names[i].ptr());
            if (!name) throw py::error_already_set();
            values[i] = py::cast(static_cast<const char*>(std::getenv(name)));
        }
        return values;
    });
    module.def("release_workspace", &Buffer::release);
    module.def("multiply_adds", [](const std::string& isa, const std::string& dtype, index_t rounds) {
        const Kernels& kernels = kernels_named(isa);
        const py::gil_scoped_release unlocked;
        return kernels.multiply_adds(dtype_from(dtype), rounds);
    });
    module.def("exp2", [](const std::string& isa, const std::string& dtype, std::uintptr_t x, std::uintptr_t out,
                          index_t count) {
        kernels_named(isa).exp2(dtype_from(dtype), pointer<void>(x), pointer<void>(out), count);
    });
    module.def("softplus_and_sigmoid", [](const std::string& isa, const std::string& dtype, std::uintptr_t x,
                                          std::uintptr_t softplus, std::uintptr_t sigmoid, index_t count) {
        kernels_named(isa).softplus_and_sigmoid(dtype_from(dtype), pointer<void>(x), pointer<void>(softplus),
                                                pointer<void>(sigmoid), count);
    });
}
