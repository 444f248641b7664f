// What entry.h is for an instruction set whose bfloat16 units take pairs; what they do not serve is left to avx512.
// Included once per instruction set, which has AVX-512 with bfloat16.
#pragma once

#include "entry.h"
#include "pairs.h"

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
    template <class Pass, class Visit, class... Arguments>
    static auto with_kernel(Pass pass, const Visit& visit, const Block& block, const Execution& execution,
                            const Arguments&... arguments) {
        const auto otherwise = [&] { return (avx512().*pass)(block, execution, arguments...); };
        if (std::fabs(block.scale) <= std::max(1e-30, std::fabs(block.bias) / 1024)) return otherwise();
        if (block.product == Product::bfloat16 && block.dtype == DType::bfloat16)
            return visit(Kernel<PairTile<Isa, 1>, bfloat16>(block, execution));
        if (block.product == Product::bfloat16 && block.dtype == DType::float32)
            return visit(Kernel<PairTile<Isa, 1>, float>(block, execution));
        if constexpr (Isa::kSplitsFloat32)
            if (block.product == Product::bfloat16x3 && block.dtype == DType::float32)
                return visit(Kernel<PairTile<Isa, 2>, float>(block, execution));
        return otherwise();
    }

    // Whatever the scale and bias.
    static index_t workspace_bytes(const Block& block, const Execution& execution, const Needs& needs) {
        return std::max(Passes<PairEntry>::workspace_bytes(block, execution, needs),
                        avx512().workspace_bytes(block, execution, needs));
    }

    static double multiply_adds(DType dtype, index_t rounds) {
        return dtype == DType::bfloat16 ? PairTile<Isa, 1>::multiply_adds(rounds)
                                        : avx512().multiply_adds(dtype, rounds);
    }

    static Kernels kernels(const char* name, bool (*available)()) {
        using P = Passes<PairEntry>;
        const Kernels others = avx512();
        return {name,         available,  P::forward,      P::matches,      P::backward,
                P::symmetric, P::sigmoid, P::distillation, workspace_bytes, multiply_adds,
                others.exp2,  others.softplus_and_sigmoid};
    }
};

}  // namespace
}  // namespace clipfast
