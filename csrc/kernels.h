// What the bindings call: one pair of functions per instruction set.
#pragma once

#include "block.h"

namespace clipfast::portable {

void forward(const Block& block, const Statistics& out, int threads);
double backward(const Block& block, const Weights& in, const Gradients& out, int threads);  // returns dscale
index_t workspace_bytes(const Block& block, int threads);

}  // namespace clipfast::portable
