// clipfast._cpu: pointers, strides and scalars in, nothing computed here. Arguments are checked by the Python side.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cross_entropy.h"
#include "kernels.h"

namespace py = pybind11;
using namespace clipfast;

namespace {

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

template <class T = void>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Block make_block(const std::string& dtype, const std::string& product, index_t n, index_t m, index_t d, std::uintptr_t x, index_t x_row_stride,
                 index_t x_col_stride, std::uintptr_t y, index_t y_row_stride, index_t y_col_stride, double scale,
                 double bias, index_t diag_offset) {
    return {dtype_from(dtype),
            product_from(product),
            {pointer(x), n, d, x_row_stride, x_col_stride},
            {pointer(y), m, d, y_row_stride, y_col_stride},
            scale,
            bias,
            diag_offset};
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "clipfast's compiled CPU kernels";
    py::class_<Block>(module, "Block")
        .def(py::init(&make_block), py::kw_only(), py::arg("dtype"), py::arg("product"), py::arg("n"), py::arg("m"), py::arg("d"),
             py::arg("x"), py::arg("x_row_stride"), py::arg("x_col_stride"), py::arg("y"), py::arg("y_row_stride"),
             py::arg("y_col_stride"), py::arg("scale"), py::arg("bias"), py::arg("diag_offset"));
    module.def("instruction_sets", [] {
        py::list names;
        for (const Kernels& kernels : instruction_sets()) names.append(py::make_tuple(kernels.name, kernels.available()));
        return names;
    });
    module.def("forward", [](const std::string& isa, const Block& block, std::uintptr_t row_lse, std::uintptr_t col_lse,
                             std::uintptr_t positive, int threads) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        kernels.forward(block, {pointer<double>(row_lse), pointer<double>(col_lse), pointer<double>(positive)},
                        threads);
    });
    module.def("backward", [](const std::string& isa, const Block& block, std::uintptr_t row_lse,
                              std::uintptr_t row_weight, std::uintptr_t col_lse, std::uintptr_t col_weight,
                              std::uintptr_t positive_weight, std::uintptr_t dx, std::uintptr_t dy, int threads) {
        const Kernels& kernels = kernels_named(isa);
        py::gil_scoped_release unlocked;
        return kernels.backward(block,
                                {pointer<double>(row_lse), pointer<double>(row_weight), pointer<double>(col_lse),
                                 pointer<double>(col_weight), pointer<double>(positive_weight)},
                                {pointer(dx), pointer(dy)}, threads);
    });
    module.def("symmetric_cross_entropy", [](std::uintptr_t row_lse, std::uintptr_t col_lse, std::uintptr_t positive,
                                             index_t n) {
        return symmetric_cross_entropy(pointer<double>(row_lse), pointer<double>(col_lse), pointer<double>(positive), n);
    });
    module.def("symmetric_cross_entropy_weights", [](std::uintptr_t row_lse, std::uintptr_t col_lse,
                                                     std::uintptr_t positive, index_t n, index_t m, double gradient,
                                                     std::uintptr_t row_weight, std::uintptr_t col_weight,
                                                     std::uintptr_t positive_weight) {
        symmetric_cross_entropy_weights(pointer<double>(row_lse), pointer<double>(col_lse), pointer<double>(positive),
                                        n, m, gradient, pointer<double>(row_weight), pointer<double>(col_weight),
                                        pointer<double>(positive_weight));
    });
    module.def("workspace_bytes", [](const std::string& isa, const std::string& dtype, const std::string& product,
                                     index_t n, index_t m, index_t d, int threads) {
        const Block block = make_block(dtype, product, n, m, d, 0, 0, 0, 0, 0, 0, 1, 0, 0);
        return kernels_named(isa).workspace_bytes(block, threads);
    });
    module.def("exp2", [](const std::string& isa, const std::string& dtype, std::uintptr_t x, std::uintptr_t out,
                          index_t count) { kernels_named(isa).exp2(dtype_from(dtype), pointer(x), pointer(out), count); });
}
