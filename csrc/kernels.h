// What the bindings call: the instruction sets, best first, and the same functions for each.
#pragma once

#include <vector>

#include "block.h"

namespace clipfast {

struct Kernels {
    const char* name;
    bool (*available)();  // on this processor
    void (*forward)(const Block& block, const Statistics& out, int threads);
    double (*backward)(const Block& block, const Weights& in, const Gradients& out, int threads);  // returns dscale
    index_t (*workspace_bytes)(const Block& block, int threads);
    void (*exp2)(DType dtype, const void* x, void* out, index_t count);  // for tests: float32 or float64
};

const std::vector<Kernels>& instruction_sets();

}  // namespace clipfast
