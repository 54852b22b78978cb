"""The PNP ranking loss as a loss function of pytorch-metric-learning (PML).

Importing this package neither changes nor imports PML. The names below are loaded on first use, so
that `pml_pnp.functional` works with PyTorch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pml_pnp import distributed, functional, losses
    from pml_pnp.grad_cache import GradCache
    from pml_pnp.loss import PNPLoss
    from pml_pnp.registration import register, unregister

__version__ = "0.2.0"
__all__ = ["GradCache", "PNPLoss", "distributed", "functional", "losses", "register", "unregister"]

_MODULE_OF = {
    "GradCache": "pml_pnp.grad_cache",
    "PNPLoss": "pml_pnp.loss",
    "register": "pml_pnp.registration",
    "unregister": "pml_pnp.registration",
}

if not TYPE_CHECKING:  # a type checker would take every name for one of the module

    def __getattr__(name: str):
        if name in _MODULE_OF:
            return getattr(import_module(_MODULE_OF[name]), name)
        if name in __all__:
            return import_module(f"pml_pnp.{name}")
        raise AttributeError(f"module 'pml_pnp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
