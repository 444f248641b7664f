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
    const void* factors = nullptr;   // [rows], of the type that adds features up: factor_i row_i is taken for row_i
};

// Below this length a row keeps its factor whatever it is (torch.nn.functional.normalize).
constexpr double kMinNorm = 1e-12;

struct Block {
    DType dtype;  // of x and y
    Product product;
    Matrix x;     // [n, d]
    Matrix y;     // [m, d]
    double scale, bias;
    index_t diag_offset;  // the positive of row i is column i + diag_offset, if that lies inside
    const std::int32_t *row_ids = nullptr, *col_ids = nullptr;  // [n], [m], or neither
    bool ignores_same_ids = true;  // pairs of one id off the diagonal are left out, or further positives

    index_t n() const { return x.rows; }
    index_t m() const { return y.rows; }
    index_t d() const { return x.cols; }
};

// The largest logit of each row's and each column's positives, in log2 units; an exact number of the compute type.
struct Matches {
    double *rows = nullptr, *cols = nullptr;  // [n], [m]
};

// How much memory the logits take that one pass keeps for another, in elements of the type that adds features up. They
// lie as that pass needs them (chunks.h), on any instruction set within so many.
constexpr index_t kKeptHead = 16, kKeptPadding = 64;
inline index_t kept_size(index_t n, index_t m) { return kKeptHead + n * (m + kKeptPadding); }

// Natural-log units.
struct Statistics {
    double *row_lse, *col_lse, *positive;  // [n], [m], [n]
    std::int32_t *row_above = nullptr, *col_above = nullptr;  // [n], [m]: counted where there are matches
    void* kept = nullptr;  // where the logits go, for the pass that takes their gradient
};

// Natural-log units.
struct Weights {
    const double *row_lse, *row_weight;  // [n]
    const double *col_lse, *col_weight;  // [m]
    const double* positive_weight;       // [n]
    const double *row_target = nullptr, *col_target = nullptr;  // [n], [m], of further positives
    const void* kept = nullptr;  // the logits, or null
};

struct Gradients {
    void *dx = nullptr, *dy = nullptr;  // [n, d], [m, d], contiguous
    DType dtype = DType::float32;       // the block's, or the one its sums have
};

// The student's logits under the teacher's softmaxes.
struct Crosses {
    double *rows = nullptr, *cols = nullptr;  // [n], [m]
};

struct Scalars {
    double dscale = 0, dbias = 0, loss = 0;
};

// What a pass beyond plain softmax statistics and gradients is asked for.
struct Needs {
    bool ranks = false, symmetric = false, sigmoid = false, distillation = false;
};

}  // namespace clipfast
