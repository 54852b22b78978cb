"""Operations of the loss on tensors: nothing here knows pytorch-metric-learning.

`product` and `similarity` make the first gradient, `recompute` calls the latter once more in
backward for chunks of queries, `dispatch` chooses between the kernels in `eager` and `triton`.
"""
