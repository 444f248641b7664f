// From block statistics to the loss, and back to the weights of its gradient: clipfast/autograd.py says it in PyTorch,
// and why in this form. A margin is the negatives' logsumexp less the positive logit.
#pragma once

#include <cmath>
#include <limits>

#include "block.h"

namespace clipfast {

inline double margin(double negatives, double positive) {
    // A logit of +inf makes the dense formula NaN (inf - inf).
    const bool infinite = negatives == std::numeric_limits<double>::infinity() ||
                          positive == std::numeric_limits<double>::infinity();
    return infinite ? std::numeric_limits<double>::quiet_NaN() : negatives - positive;
}

inline double softplus(double z) { return (z > 0 ? z : z == z ? 0 : z) + std::log1p(std::exp(-std::fabs(z))); }
inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

inline double symmetric_cross_entropy(const double* row_lse, const double* col_lse, const double* positive, index_t n) {
    double sum = 0;
    for (index_t i = 0; i < n; ++i)
        sum += softplus(margin(row_lse[i], positive[i])) + softplus(margin(col_lse[i], positive[i]));
    return sum / (2 * double(n));
}

// The derivatives by row_lse [n], col_lse [m] and positive [n], times `gradient`; returns their sum, which is sum G.
inline double symmetric_cross_entropy_weights(const double* row_lse, const double* col_lse, const double* positive,
                                            index_t n, index_t m, double gradient, double* row_weight,
                                            double* col_weight, double* positive_weight) {
    double rows = 0, cols = 0, positives = 0;
    for (index_t i = 0; i < n; ++i) {
        row_weight[i] = gradient * sigmoid(margin(row_lse[i], positive[i])) / (2 * double(n));
        col_weight[i] = gradient * sigmoid(margin(col_lse[i], positive[i])) / (2 * double(n));
        positive_weight[i] = -(row_weight[i] + col_weight[i]);
        rows += row_weight[i], cols += col_weight[i], positives += positive_weight[i];
    }
    std::fill(col_weight + n, col_weight + m, 0.0);
    return rows + cols + positives;
}

}  // namespace clipfast
