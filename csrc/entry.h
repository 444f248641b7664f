// The functions that an instruction set's file offers: a kernel for the block's dtype, then its method.
// Included once per instruction set, like tile_loop.h.
#pragma once

#include "tile_loop.h"

namespace clipfast {
namespace {

template <class Isa>
struct Entry {
    template <class Visit>
    static auto with_kernel(const Block& block, int threads, const Visit& visit) {
        switch (block.dtype) {
            case DType::float64: return visit(Kernel<Tile<Isa, double>, double>(block, threads));
            case DType::bfloat16: return visit(Kernel<Tile<Isa, float>, bfloat16>(block, threads));
            case DType::float16: return visit(Kernel<Tile<Isa, float>, float16>(block, threads));
            default: return visit(Kernel<Tile<Isa, float>, float>(block, threads));
        }
    }

    static void forward(const Block& block, const Statistics& out, int threads) {
        with_kernel(block, threads, [&](auto&& kernel) { kernel.forward(out); });
    }

    static double backward(const Block& block, const Weights& in, const Gradients& out, int threads) {
        return with_kernel(block, threads, [&](auto&& kernel) { return kernel.backward(in, out); });
    }

    static index_t workspace_bytes(const Block& block, int threads) {
        return with_kernel(block, threads, [](auto&& kernel) { return kernel.workspace_bytes(); });
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
        return {name, available, forward, backward, workspace_bytes, exp2_all};
    }
};

}  // namespace
}  // namespace clipfast
