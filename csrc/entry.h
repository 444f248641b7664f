// The functions that an instruction set's file offers: a kernel for the block's dtype, then one of its passes.
// Included once per instruction set, like tile_loop.h.
#pragma once

#include "softmax.h"
#include "tile_loop.h"

namespace clipfast {
namespace {

// The passes of the kernels that Choice chooses: Choice::with_kernel(&Kernels::pass, visit, block, execution, arguments...)
// calls visit(kernel), or has another instruction set's `pass` do it.
template <class Choice>
struct Passes {
    static void forward(const Block& block, const Execution& execution, const Statistics& out) {
        Choice::with_kernel(
            &Kernels::forward,
            [&](auto&& kernel) {
                SoftmaxStatistics statistics(kernel.chunks(), out);
                kernel.scan(statistics);
            },
            block, execution, out);
    }

    static double backward(const Block& block, const Execution& execution, const Weights& in, const Gradients& out) {
        return Choice::with_kernel(
            &Kernels::backward,
            [&](auto&& kernel) {
                SoftmaxGradient gradient(kernel.chunks(), kernel.logits(), in);
                return kernel.differentiate(gradient, out);
            },
            block, execution, in, out);
    }

    static index_t workspace_bytes(const Block& block, const Execution& execution) {
        return Choice::with_kernel(
            &Kernels::workspace_bytes,
            [](auto&& kernel) {
                SoftmaxStatistics statistics(kernel.chunks(), {});
                SoftmaxGradient gradient(kernel.chunks(), kernel.logits(), {});
                return std::max(kernel.scan_bytes(statistics), kernel.differentiate_bytes(gradient));
            },
            block, execution);
    }
};

template <class Isa>
struct Entry {
    template <class Pass, class Visit, class... Arguments>
    static auto with_kernel(Pass, const Visit& visit, const Block& block, const Execution& execution,
                            const Arguments&...) {
        switch (block.dtype) {
            case DType::float64: return visit(Kernel<Tile<Isa, double>, double>(block, execution));
            case DType::bfloat16: return visit(Kernel<Tile<Isa, float>, bfloat16>(block, execution));
            case DType::float16: return visit(Kernel<Tile<Isa, float>, float16>(block, execution));
            default: return visit(Kernel<Tile<Isa, float>, float>(block, execution));
        }
    }

    template <class T>
    static void exp2_of(const T* x, T* out, index_t count) {
        constexpr int W = Tile<Isa, T>::W;
        for (index_t i = 0; i < count; i += W) {
            const auto y = exp2<T, W>(Tile<Isa, T>::load_elements(x + i, 1, count - i));
            for (index_t l = 0; l < std::min<index_t>(W, count - i); ++l) out[i + l] = y[l];
        }
    }

    static void exp2_all(DType dtype, const void* x, void* out, index_t count) {
        if (dtype == DType::float64) exp2_of(static_cast<const double*>(x), static_cast<double*>(out), count);
        else exp2_of(static_cast<const float*>(x), static_cast<float*>(out), count);
    }

    static constexpr Kernels kernels(const char* name, bool (*available)()) {
        return {name, available, Passes<Entry>::forward, Passes<Entry>::backward,
                Passes<Entry>::workspace_bytes, exp2_all};
    }
};

}  // namespace
}  // namespace clipfast
