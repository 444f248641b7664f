// What the bindings call: the instruction sets, best first, and the same functions for each.
#pragma once

#include <vector>

#include "block.h"
#include "parallel.h"

namespace clipfast {

struct Kernels {
    const char* name;
    bool (*available)();  // on this processor

    void (*forward)(const Block&, const Execution&, const Matches&, const Statistics& out);
    void (*matches)(const Block&, const Execution&, const Matches& out);
    // Gradients are formed where they have a place.
    Scalars (*backward)(const Block&, const Execution&, const Weights&, const Gradients& out);
    // The symmetric loss and its gradients, from logits that stay in memory between the two.
    Scalars (*symmetric)(const Block&, const Execution&, const Gradients& out);
    Scalars (*sigmoid)(const Block&, const Execution&, double unit, double* row_loss, const Gradients& out);
    Scalars (*distillation)(const Block&, const Execution&, const Weights&, const Block& teacher,
                            const Weights& teacher_weights, const Crosses& crosses, const Gradients& out);
    // What a pass holds at most, apart from its outputs; the teacher is as wide as the block.
    index_t (*workspace_bytes)(const Block&, const Execution&, const Needs&);

    // For benchmarks: this thread's floating-point operations in `rounds` rounds of the products' inner loop, of features
    // of the dtype, without memory.
    double (*multiply_adds)(DType dtype, index_t rounds);

    // For tests, of float32 or float64.
    void (*exp2)(DType dtype, const void* x, void* out, index_t count);
    void (*softplus_and_sigmoid)(DType dtype, const void* x, void* softplus, void* sigmoid, index_t count);
};

const std::vector<Kernels>& instruction_sets();

}  // namespace clipfast
