"""The losses over the ranks of a group: every logit once per pass in the whole job, the same result on all ranks.

Rank r has images x_r [n_r, d] and texts y_r [m_r, d], m_r >= n_r, the first n_r of which are the images' matches. It
takes its images against all texts. What belongs to rows is whole then; what belongs to columns, merged over ranks, is
with the rank whose texts they are, which has these columns' matches as well. So every rank has the losses of its own
rows and columns, as in one process, and the weights of their gradients.

With out_r what rank r's call returns and g_r its upstream gradient, gradients are those of S = sum_r <g_r, out_r>. For
reduction "mean" every out_r is the loss of the whole job, so S counts it once for each rank:

    grad_reduction   features    scale and bias
    "mean"           dS/df       dS/ds / W           averaged over ranks: the gradient of the loss
    "sum"            dS/df / W   dS/ds / W^2         added over ranks: the gradient of the loss

With reduction "none" the out_r are different rows, S is what the ranks make of them together, and gradients are dS/df
and dS/ds / W with either.

One file for each loss, over job.py: what the ranks of a call have agreed on, and this rank's part in it.
"""

from clipfast.distributed.distillation import distillation_loss
from clipfast.distributed.retrieval import ranks_of_matches
from clipfast.distributed.sigmoid import siglip_loss
from clipfast.distributed.softmax import contrastive_loss

__all__ = ["contrastive_loss", "distillation_loss", "ranks_of_matches", "siglip_loss"]
