"""Triton device code: one source for every GPU. Imported only by clipfast.backends.triton, and only when it runs.

A kernel computes on tiles of BLOCK_M rows of x and BLOCK_N rows of y. The product of a tile, z_ij = f_i g_j <x_i, y_j>
(f and g are the optional row factors), is kept in these raw units; logits L = scale z + bias are never formed. For a
shift k that is itself a product, exp(L_ij - L_k) = exp2((z_ij - k) scale2) with scale2 = scale log2(e): the
difference is taken before the multiplication, so the rounding of scale2 is relative to it and not to L.
"""
