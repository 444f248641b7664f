// What the bindings call: the instruction sets, best first, and the same functions for each.
#pragma once

#include <vector>

#include "block.h"
#include "parallel.h"

namespace clipfast {

struct Kernels {
    const char* name;
    bool (*available)();  // on this processor
    void (*forward)(const Block&, const Execution&, const Statistics& out);
    double (*backward)(const Block&, const Execution&, const Weights& in, const Gradients& out);  // returns dscale
    index_t (*workspace_bytes)(const Block&, const Execution&);  // what a pass holds at most, apart from its outputs
    void (*exp2)(DType dtype, const void* x, void* out, index_t count);  // for tests: float32 or float64
};

const std::vector<Kernels>& instruction_sets();

}  // namespace clipfast
