"""Operations of the loss on tensors, without pytorch-metric-learning.

`product` computes losses and gradient for similarities that are a matrix product, `similarity` for
any other matrix. `recompute` calls a function of the losses for chunks of queries, and again in
backward. `dispatch` chooses between the kernels in `eager` and `triton`.
"""
