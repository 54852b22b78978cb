"""Replace PML's own PNPLoss by this package's, for code whose imports cannot be edited."""

from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import distributed as pml_distributed

from pml_pnp import distributed, losses

_MISSING = object()
_saved: list[tuple[object, str, object]] = []


def register() -> None:
    """Set `pytorch_metric_learning.losses.PNPLoss` and PML's wrappers to this package's.

    The wrappers are `CrossBatchMemory` and `SelfSupervisedLoss` of `pytorch_metric_learning.losses`
    and `DistributedLossWrapper` and `DistributedMinerWrapper` of
    `pytorch_metric_learning.utils.distributed`; those of this package are subclasses of them. Call
    it before the code that uses them is imported: a `from ... import PNPLoss` that was executed
    earlier keeps PML's class. A CrossBatchMemory or SelfSupervisedLoss of PML that was imported
    earlier takes this PNPLoss, but no MultipleLosses. A second call does nothing. PML's logger
    reports it.

    Example:
        >>> import pml_pnp
        >>> from pytorch_metric_learning import losses
        >>> pml_pnp.register()
        >>> losses.PNPLoss is pml_pnp.PNPLoss
        True
        >>> pml_pnp.unregister()
        >>> getattr(losses, "PNPLoss", None) is pml_pnp.PNPLoss
        False
    """
    if _saved:
        return
    for name in ("CrossBatchMemory", "SelfSupervisedLoss"):
        ours, theirs = getattr(losses, name), getattr(pml_losses, name)
        _replace(theirs, "supported_losses", staticmethod(ours.supported_losses))
        _replace(pml_losses, name, ours)
    for name in ("DistributedLossWrapper", "DistributedMinerWrapper"):
        _replace(pml_distributed, name, getattr(distributed, name))
    _replace(pml_losses, "PNPLoss", losses.PNPLoss)
    c_f.LOGGER.info("pml_pnp registered: pytorch_metric_learning.losses.PNPLoss is pml_pnp.PNPLoss")


def unregister() -> None:
    """Undo `register` by restoring every attribute; without an earlier `register` do nothing."""
    if not _saved:
        return
    while _saved:
        owner, name, value = _saved.pop()
        delattr(owner, name) if value is _MISSING else setattr(owner, name, value)
    c_f.LOGGER.info("pml_pnp unregistered: pytorch_metric_learning.losses is as it was")


def _replace(owner, name: str, value) -> None:
    """Set an attribute and remember the previous one."""
    _saved.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)
