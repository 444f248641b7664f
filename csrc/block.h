// One block of logits as the bindings hand it to a kernel. What is computed: clipfast/backends/__init__.py.
#pragma once

#include <algorithm>
#include <cstdint>

namespace clipfast {

using index_t = std::int64_t;

enum class DType { float32, float64, bfloat16, float16 };

// How features are multiplied. An instruction set without matrix units for bfloat16 takes float32 for all of them.
enum class Product {
    exact,       // in the dtype, halves in float32
    bfloat16x3,  // float32 as the sum of two bfloat16, three products of them
    bfloat16     // rounded to bfloat16
};

struct Matrix {
    const void* data;
    index_t rows, cols;
    index_t row_stride, col_stride;  // in elements
};

struct Block {
    DType dtype;  // of x, y, dx and dy
    Product product;
    Matrix x;     // [n, d]
    Matrix y;     // [m, d]
    double scale, bias;
    index_t diag_offset;  // the positive of row i is column i + diag_offset, if that lies inside

    index_t n() const { return x.rows; }
    index_t m() const { return y.rows; }
    index_t d() const { return x.cols; }
};

// Natural-log units.
struct Statistics {
    double *row_lse, *col_lse, *positive;  // [n], [m], [n]
};

// Natural-log units.
struct Weights {
    const double *row_lse, *row_weight;  // [n]
    const double *col_lse, *col_weight;  // [m]
    const double* positive_weight;       // [n]
};

struct Gradients {
    void *dx, *dy;  // [n, d], [m, d], contiguous, of the block's dtype
};

}  // namespace clipfast
