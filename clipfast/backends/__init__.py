"""One module per backend; `clipfast.dispatch.BACKENDS` lists them in order of preference.

Every backend holds the same seven names:

    NAME
    unsupported_reasons(problem) -> tuple of sentences, empty if it can run
    reasons_against_auto(problem) -> tuple of sentences why it runs only when it is named, though it can run; else empty
    folds_norms(dtype) -> whether forward and backward take 1 / |x_i| and 1 / |y_j| as two more arguments
    workspace_bytes(problem) -> predicted peak of its temporaries in forward and backward, outputs excluded
    forward(x, y, scale, bias, diag_offset) -> row_lse [n], col_lse [m], positive [n]
    backward(x, y, scale, bias, row_lse, col_lse, row_weight, col_weight, positive_weight, diag_offset)
        -> dx [n, d], dy [m, d], dscale []

on a block of logits L = scale * x y^T + bias, in which the positive of row i is column p = i + diag_offset:

    positive_i = L_ip                               (0 where p lies outside the block)
    row_lse_i  = log sum_{j != p} exp L_ij          over the row's negatives, -inf if there are none
    col_lse_j  = log sum_{i + diag_offset != j} exp L_ij

    G_ij = row_weight_i exp(L_ij - row_lse_i) + col_weight_j exp(L_ij - col_lse_j),   G_ip = positive_weight_i
    dx = scale G y,   dy = scale G^T x,   dscale = sum_i <(G y)_i, x_i>

and may hold `symmetric_cross_entropy` and `symmetric_cross_entropy_weights` in place of those in clipfast/autograd.py,
where one call is to take the place of many small ones.

Leaving the positive out of the logsumexps is what keeps a well-trained model's loss and gradient precise: there
P_ii is 1 - 1e-9, and P_ii - 1 taken from a rounded logsumexp would be noise. Here it never is a difference.

With factors f [n] and g [m] at the end of their arguments, forward and backward take f_i x_i and g_j y_j for x and y;
dx and dy remain gradients by x and y, through the norms (clipfast/norms.py).

x and y have one dtype, which dx and dy have too; scale, bias and dscale are 0-D in its accumulation dtype; statistics
and weights have `statistics_dtype`. Blocks merge: logaddexp over their logsumexps, sum over their positives.
"""
