// What entry.h is for an instruction set whose bfloat16 units take pairs; what they do not serve is left to avx512.
// Included once per instruction set, which has AVX-512 with bfloat16.
#pragma once

#include "pairs.h"
#include "tile_loop.h"

namespace clipfast {
namespace {

struct Avx512Halves {
    using V = Vector<float, 16>;
    // To nearest even; subnormal numbers become 0, as they do in the products.
    static CLIPFAST_INLINE Halves round(V v) { return as<Halves>(_mm512_cvtneps_pbh(v)); }
};

template <class Isa>
struct PairEntry {
    // Three products pay where one is so much faster than float32's. dscale comes from sum G (logit - bias), in which
    // x y^T must not have drowned in the bias.
    template <class Visit, class Otherwise>
    static auto with_kernel(const Block& block, int threads, const Visit& visit, const Otherwise& otherwise) {
        if (std::fabs(block.scale) <= std::max(1e-30, std::fabs(block.bias) / 1024)) return otherwise();
        if (block.product == Product::bfloat16 && block.dtype == DType::bfloat16)
            return visit(Kernel<PairTile<Isa, 1>, bfloat16>(block, threads));
        if (block.product == Product::bfloat16 && block.dtype == DType::float32)
            return visit(Kernel<PairTile<Isa, 1>, float>(block, threads));
        if constexpr (Isa::kSplitsFloat32)
            if (block.product == Product::bfloat16x3 && block.dtype == DType::float32)
                return visit(Kernel<PairTile<Isa, 2>, float>(block, threads));
        return otherwise();
    }

    static void forward(const Block& block, const Statistics& out, int threads) {
        with_kernel(
            block, threads, [&](auto&& kernel) { kernel.forward(out); },
            [&] { avx512().forward(block, out, threads); });
    }

    static double backward(const Block& block, const Weights& in, const Gradients& out, int threads) {
        return with_kernel(
            block, threads, [&](auto&& kernel) { return kernel.backward(in, out); },
            [&] { return avx512().backward(block, in, out, threads); });
    }

    static index_t workspace_bytes(const Block& block, int threads) {
        return with_kernel(
            block, threads, [](auto&& kernel) { return kernel.workspace_bytes(); },
            [&] { return avx512().workspace_bytes(block, threads); });
    }

    static Kernels kernels(const char* name, bool (*available)()) {
        return {name, available, forward, backward, workspace_bytes, avx512().exp2};
    }
};

}  // namespace
}  // namespace clipfast
