// From a block's statistics to the symmetric loss, and to the weights of its gradient: clipfast/cross_entropy.py says it
// in PyTorch, and why in this form.
#pragma once

#include <vector>

#include "block.h"
#include "parallel.h"

namespace clipfast {

// The mean of both directions' cross-entropies.
double symmetric_cross_entropy(const Statistics& of, index_t n);

// The same with the weights of its gradient.
class SymmetricCrossEntropy {
  public:
    SymmetricCrossEntropy(const Statistics& of, index_t n, index_t m);
    // Of statistics that are still to come, for which it has a place.
    SymmetricCrossEntropy(index_t n, index_t m);
    ~SymmetricCrossEntropy();
    SymmetricCrossEntropy(const SymmetricCrossEntropy&) = delete;

    // What it holds, the statistics included.
    static index_t bytes(index_t n, index_t m) { return 2 * (2 * n + m) * index_t{sizeof(double)}; }

    const Statistics& statistics() const { return of_; }
    Weights weights() const;

    // Sets the weights, times `gradient`; the loss is without it, dbias is sum G.
    Scalars differentiate(double gradient, Team* team = nullptr);

  private:
    Scalars differentiate_part(double gradient, index_t part);

    index_t n_;
    std::vector<double> weights_, statistics_;
    double *row_, *col_, *positive_;  // [n], [m], [n]; columns beyond the n matched ones have no weight
    Statistics of_;
};

}  // namespace clipfast
