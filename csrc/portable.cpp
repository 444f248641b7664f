// The portable instruction set: plain C++17 loops, vectorized as far as the compiler's baseline target allows.
// Tiles: panels of up to 128 rows, 64 columns, groups of 16 rows; registers: 4 rows by 32 bytes of columns.

#include "kernels.h"
#include "tile_loop.h"

namespace clipfast::portable {

namespace {

// Calls visit(a kernel for the block's dtype).
template <class Visit>
auto with_kernel(const Block& block, int threads, const Visit& visit) {
    switch (block.dtype) {
        case DType::float64: return visit(Kernel<double, double>(block, threads));
        case DType::bfloat16: return visit(Kernel<float, bfloat16>(block, threads));
        case DType::float16: return visit(Kernel<float, float16>(block, threads));
        default: return visit(Kernel<float, float>(block, threads));
    }
}

}  // namespace

void forward(const Block& block, const Statistics& out, int threads) {
    with_kernel(block, threads, [&](auto&& kernel) { kernel.forward(out); });
}

double backward(const Block& block, const Weights& in, const Gradients& out, int threads) {
    return with_kernel(block, threads, [&](auto&& kernel) { return kernel.backward(in, out); });
}

index_t workspace_bytes(const Block& block, int threads) {
    return with_kernel(block, threads, [](auto&& kernel) { return kernel.workspace_bytes(); });
}

}  // namespace clipfast::portable
