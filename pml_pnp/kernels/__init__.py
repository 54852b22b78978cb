"""The soft rank R: how many negatives stand before each positive.

The only place that knows about chunks and memory. Everything above calls `negatives_before` and
`count_negatives_before`, so that a faster kernel replaces these two and nothing else.
"""

from pml_pnp.kernels.eager import count_negatives_before, negatives_before

__all__ = ["count_negatives_before", "negatives_before"]
