"""The losses of queries from similarities: the only place that knows about blocks and devices.

`query_losses` and `ranking_counts` are all that is used from outside. Which kernel computes a loss
is decided here: Triton's on the GPUs it runs on, plain PyTorch elsewhere, or what the environment
variable PML_PNP_KERNEL ("eager" or "triton") says.
"""

from pml_pnp.kernels.autograd import query_losses, ranking_counts
from pml_pnp.kernels.settings import Settings

__all__ = ["Settings", "query_losses", "ranking_counts"]
