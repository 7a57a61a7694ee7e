"""The tensors of a model that a file keeps, and a file's tensors written into a model."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..core.fingerprint import digest
from ..errors import PluginFileError
from .description import dtype_name


def own_tensors(model: Adapted) -> dict[str, Tensor]:
    """Returns all that a file keeps of an adapted model.

    Raises:
        PluginFileError: A mixture of dtypes that a fresh model on the same backbone would not have.
    """
    tensors = model.task_state() | _moved_buffers(model)
    _check_dtypes(model, tensors)
    return tensors


def _moved_buffers(model: Adapted) -> dict[str, Tensor]:
    """Returns the backbone's buffers that training has changed, e.g. running statistics of batch norm."""
    trained = {name for name, _ in model.trained()}
    weights = model.view.frozen_weights(model.backbone)
    own = {f"backbone.{n}": (t, model.origin[n]) for n, t in weights if n in model.origin}
    return {name: t for name, (t, origin) in own.items() if name not in trained and digest(t) != origin}


def _check_dtypes(model: Adapted, tensors: Mapping[str, Tensor]) -> None:
    like = next(p for n, p in model.backbone.named_parameters()).dtype
    for name, tensor in tensors.items():
        before = model.origin.get(name.removeprefix("backbone."), dtype_name(like)).partition("[")[0]
        if tensor.is_floating_point() and dtype_name(tensor.dtype) != before:
            raise PluginFileError(
                f"{name} is {dtype_name(tensor.dtype)} on a backbone of {before}, so the file could not be loaded "
                "again: convert the backbone before petiole.adapt, or the whole model back before saving"
            )


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Checks that every tensor is finite.

    Raises:
        PluginFileError: One is not.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PluginFileError(f"{where}: the tensor {name} is not finite: training diverged, use an earlier state")


def fill(
    model: nn.Module, tensors: Mapping[str, Tensor], needed: Collection[str], allowed: Collection[str], where: str
) -> None:
    """Copies a file's tensors into a fresh model, which nobody else holds yet.

    Args:
        model: Where to.
        tensors: The file's, by the model's names.
        needed: Names that must be there.
        allowed: Names that may be there as well.
        where: What messages call the file.

    Raises:
        PluginFileError: A tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    state, known = model.state_dict(), {*needed, *allowed}
    if missing := [name for name in needed if name not in tensors]:
        raise PluginFileError(f"{where} lacks {_some(missing)}: the file's plugins and head need {len(needed)} tensors")
    if unknown := [name for name in tensors if name not in known]:
        raise PluginFileError(f"{where} holds {_some(unknown)}, which the file's plugins and head do not have")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise PluginFileError(
                f"{where}: {name} should have the shape {list(state[name].shape)}, found {list(tensor.shape)}"
            )
        if tensor.dtype != state[name].dtype:
            expected, found = dtype_name(state[name].dtype), dtype_name(tensor.dtype)
            raise PluginFileError(f"{where}: {name} should be {expected}, found {found}")
    check_finite(tensors, where)
    model.load_state_dict(dict(tensors), strict=False)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ("the tensor " if len(names) == 1 else "the tensors ") + ", ".join(names[:3]) + more
