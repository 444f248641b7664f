"""One module per backend; `clipfast.dispatch.BACKENDS` lists them in order of preference.

Every backend holds the same names, and the nouns of clipfast/block.py say what goes in and out:

    NAME
    unsupported_reasons(problem) -> tuple of sentences, empty if it can run
    reasons_against_auto(problem) -> tuple of sentences why it runs only when it is named, though it can run; else empty
    folds_norms(dtype) -> whether it takes blocks with factors
    workspace_bytes(problem) -> bound on the peak of its temporaries in forward and backward, outputs excluded, of
                                contiguous features
    forward(block, matches=None) -> Statistics
    backward(block, weights, dtype) -> Gradients, dx and dy in `dtype`: the block's or its accumulation dtype
    matches(block) -> Matches
    sigmoid(block, unit, gradients, dtype) -> SigmoidPass
    distillation(block, weights, teacher, teacher_weights, gradients, dtype) -> DistillationPass

On a block L = scale x y^T + bias the positive of row i is column p = i + diag_offset; a pair with equal ids that is not
(i, p) is `same`; every other pair is a negative.

Softmax, in which C is all pairs but (i, p), and but the same pairs that are ignored:

    positive_i = L_ip                               (0 where p lies outside the block)
    row_lse_i  = log sum_{j in C} exp L_ij          -inf if there are none
    col_lse_j  = log sum_{i in C} exp L_ij

    G_ij = row_weight_i exp(L_ij - row_lse_i) + col_weight_j exp(L_ij - col_lse_j)    in C
         + row_target_i + col_target_j                                                at same pairs that are positives
    G_ip = positive_weight_i,   G_ij = 0 elsewhere
    dx = scale G y,   dy = scale G^T x,   dscale = sum_ij G_ij <x_i, y_j>

Leaving the positive out of the logsumexps is what keeps a well-trained model's loss and gradient precise: there
P_ii is 1 - 1e-9, and P_ii - 1 taken from a rounded logsumexp would be noise. Here it never is a difference.

Ranks: matches(block) has the largest logit of each row's and column's positives, same pairs among them in either mode;
forward with the matches of the whole batch counts the negatives that are not below them (ties and NaN count):

    row_above_i = #{j negative: not L_ij < matches.rows_i},   col_above_j = #{i negative: not L_ij < matches.cols_j}

A logit is the same number, bit for bit, wherever in a block and in whichever pass it is formed, so that ties are ties.

Sigmoid (Zhai et al. 2023, arXiv:2303.15343), in one pass that forms the gradients where they are wanted:

    row_loss_i = sum_{negatives} softplus(L_ij) + sum_{positives} softplus(-L_ij)
    G_ij = unit sigmoid(L_ij) at negatives, -unit sigmoid(-L_ij) at positives, 0 at same pairs that are ignored
    dbias = sum_ij G_ij

where p and, with same_id "positive", the same pairs are positives. Both keep their relative precision however small.

Distillation, of a block and its teacher's T, which has no positives, nor ids:

    row_cross_i = sum_j exp(T_ij - t_row_lse_i) L_ij,   col_cross_j = sum_i exp(T_ij - t_col_lse_j) L_ij
                  (of no meaning where the teacher's weight is 0)
    G_ij = row_weight_i exp(L_ij - row_lse_i) + col_weight_j exp(L_ij - col_lse_j)
         - t_row_weight_i exp(T_ij - t_row_lse_i) - t_col_weight_j exp(T_ij - t_col_lse_j)

With factors f [n] and g [m], f_i x_i and g_j y_j are taken for x and y; dx and dy remain gradients by x and y, through
the norms (clipfast/norms.py).

A backend that can keep logits from `forward` to `backward` (`Block.keep`, `Statistics.kept`, `Weights.kept`) holds

    kept_size(n, m) -> how many numbers of the accumulation dtype they take
    keeping(dtype) -> whether it does so where nobody asks for it, and why; a backend without it does

Blocks merge: logaddexp over logsumexps, sum over positives, counts, losses and gradients, maximum over matches; of two
crosses the mean weighted by exp(t_lse).

A backend may hold `symmetric_cross_entropy` and `symmetric_gradients` in place of what is in
clipfast/cross_entropy.py, where one call is to take the place of many small ones; one that keeps logits

    symmetric(block, dtype) -> the mean loss of both directions [], its Gradients and dbias [], in one pass that keeps
                               them for itself; with the need "symmetric" `workspace_bytes` has them too

and any


    project(features, weight, bias or None) -> rows features weight + bias [n, d] in the features' dtype, and what makes
                                               the length of each 1, [n] (clipfast/projected.py)
"""
