"""Saves an adapted model as one file that is a working classifier, and loads it onto a backbone."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import view_of
from ..core.adapted import Adapted
from ..core.prove import eval_mode
from ..core.view import View
from ..errors import PetioleError, PluginFileError
from ..nn.weights import FULL
from ..plugins import method
from .codes import packed, unpacked
from .container import one_line, write
from .description import class_name
from .hosts import build_backbone, match_backbone
from .metadata import NUM_IMAGES, PluginInfo, describe, open_file
from .stacking import stack, unstack
from .state import check_finite, fill, own_tensors

# Relative error of the check's logits per dtype: other kernels and machines round otherwise, with room.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# The check keeps at most this many logits an image, evenly spaced, so that a thousand classes do not bloat the file.
_MAX_LOGITS = 32


def save(
    model: Adapted,
    path: str | os.PathLike[str],
    *,
    metrics: Mapping[str, float] | None = None,
    notes: str = "",
    latent: bool = False,
) -> int:
    """Writes a plugin file and returns its size [bytes].

    Holds the trained tensors in their own dtype, and what is needed to use them: method and settings, the backbone's
    name and fingerprint, transform, class names, and the model's logits on synthetic images. Written atomically: an
    old file stays until the new one is whole. Equal models give equal bytes.

    Args:
        model: What `petiole.adapt` returned; stays as it is.
        path: Where to; its folder must exist.
        metrics: What the model reached, by name.
        notes: Free text.
        latent: Whether to keep the latent weights of quantised tensors, from which training goes on exactly, instead
            of their codes: a large file. Codes that were loaded are kept as they are otherwise.

    Raises:
        PluginFileError: The file cannot be written, a tensor is not finite, there are no latent weights to keep, or
            the file could not be loaded again.

    Example:
        >>> import petiole as pt
        >>> model = pt.adapt(pt.backbone("micro"), pt.FacT(rank=4), classes=["cat", "dog"])
        >>> pt.save(model, "pets.safetensors", metrics={"val_accuracy": 0.93})
    """
    if not isinstance(model, Adapted):
        raise PluginFileError(
            f"save takes what petiole.adapt returned, got {type(model).__name__}: eyes of a language model are kept by "
            "save_eyes"
        )
    tensors = own_tensors(model)
    check_finite(tensors, "the model")
    if not latent:
        tensors = packed(model, tensors)
    elif model.holds_codes:
        raise PluginFileError(
            "there are no latent weights to keep: the model was read from codes and not trained since"
        )
    return write(path, stack(tensors), describe(model, metrics or {}, notes, _expect(model)))


def load(path: str | os.PathLike[str], backbone: nn.Module | None = None, *, check: bool = True) -> Adapted:
    """Returns the model of a plugin file, in eval mode, on the backbone's device.

    Args:
        path: A file of `petiole.save`.
        backbone: The model it was trained on; never written to. None builds it by the name in the file, which may
            download its weights.
        check: Whether to run the model on synthetic images and compare its logits with those in the file.

    Raises:
        PluginFileError: The file is damaged, foreign or of another schema version; the backbone is another one; a
            tensor is missing, unknown, of another shape or dtype, or not finite; or the logits differ.

    Example:
        >>> import petiole as pt
        >>> model = pt.load("pets.safetensors", pt.backbone("micro"))
    """
    tensors, info = open_file(path)
    if backbone is None:
        backbone = build_backbone(info.backbone, info.path, f"give the backbone: petiole.load({info.path!r}, backbone)")
    view = match_backbone(info.backbone, backbone, info.path)
    model = _rebuild(info, backbone, view)
    _refill(model, tensors, info)
    model.input_config = dict(info.input_config)
    model.eval()
    if check:
        _check_logits(model, info)
    return model


def transplant(path: str | os.PathLike[str], backbone: nn.Module) -> Adapted:
    """Returns the plugins of a file on a backbone of the same name and shape, whose weights may have been tuned since.

    Raises:
        PluginFileError: The file is damaged or foreign, or the backbone is of another name or shape.
    """
    tensors, info = open_file(path)
    view, wanted = view_of(backbone), info.backbone
    name, kind = view.identify(backbone)["name"], class_name(backbone)
    if (kind, name) != (wanted["class"], wanted["name"]):
        raise PluginFileError(f"{info.path} belongs to {wanted['name']} ({wanted['class']}), this is {name} ({kind})")
    model = _rebuild(info, backbone, view)
    _refill(model, tensors, info)
    return model.eval()


def _rebuild(info: PluginInfo, backbone: nn.Module, view: View) -> Adapted:
    """Returns a fresh adapted model with the file's plugins and head."""
    try:
        plugins = [method(entry["method"], **entry["settings"]) for entry in info.plugins]
        return Adapted(backbone, view, plugins, info.classes, head_bits=(info.head or {}).get("bits", FULL))
    except (PetioleError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise PluginFileError(f"{info.path} describes plugins that do not fit: {one_line(error)}") from error


def _refill(model: Adapted, tensors: Mapping[str, Tensor], info: PluginInfo) -> None:
    """Copies a file's tensors into a fresh model."""
    own = unpacked(model, unstack(tensors), info.path)
    fill(model, own, model.task_state(), [f"backbone.{name}" for name in model.origin], info.path)


@torch.no_grad()
def _logits(model: Adapted, num_images: int) -> Tensor:
    """Returns the model's logits on fixed synthetic images `[B, min(C, about 32)]`, in eval mode, as float64."""
    with eval_mode(model):
        logits = model(model.view.probe(model.backbone, num_images))
    stride = math.ceil(logits.shape[-1] / _MAX_LOGITS)
    return logits[:, ::stride].double().cpu()


def _expect(model: Adapted) -> dict[str, Any]:
    """Returns the check of a model: its logits, to more digits than the tolerance asks for."""
    dtype = next(model.backbone.parameters()).dtype
    logits, digits = _logits(model, NUM_IMAGES), 9 if dtype == torch.float64 else 6
    if not torch.isfinite(logits).all():
        raise PluginFileError("the model's logits on synthetic images are not finite: training diverged")
    rows = [[float(f"{value:.{digits}g}") for value in row] for row in logits.tolist()]
    return {"num_images": NUM_IMAGES, "seed": 0, "logits": rows, "tolerance": TOLERANCE[dtype]}


def _check_logits(model: Adapted, info: PluginInfo) -> None:
    """Compares the model's logits with the file's."""
    expected = torch.tensor(info.check["logits"], dtype=torch.float64)
    try:
        found = _logits(model, info.check["num_images"])
    except (RuntimeError, ValueError, TypeError) as error:
        raise PluginFileError(f"{info.path} fails its check: the model cannot run: {one_line(error)}") from error
    if expected.shape != found.shape:
        raise PluginFileError(
            f"{info.path}: the check expects logits {list(expected.shape)}, the model gives {list(found.shape)}"
        )
    off, allowed = float((found - expected).norm() / expected.norm().clamp_min(1e-30)), info.check["tolerance"]
    if not off <= allowed:
        settings = "pooling, image size" if info.head else "pooling, image size, classifier"
        raise PluginFileError(
            f"{info.path} fails its check: the logits on synthetic images are off by {off:.1e} relative, allowed are "
            f"{allowed:.0e}. The weights agree, so the backbone runs otherwise than in training: compare library "
            f"versions and settings ({settings})"
        )
