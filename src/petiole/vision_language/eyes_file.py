"""Saves the eyes of a language model as one file, without any frozen weight, and gives them to it again."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.language import language_view_of
from ..core.adapted import Adapted
from ..core.fingerprint import fingerprint
from ..core.language import LanguageView
from ..core.prove import eval_mode
from ..errors import BackboneError, PetioleError, PluginFileError
from ..files.codes import packed, unpacked
from ..files.container import one_line, write
from ..files.description import class_name, dtype_name
from ..files.hosts import build_backbone, match_backbone
from ..files.plugin_file import TOLERANCE
from ..files.stacking import stack, unstack
from ..files.state import check_finite, fill, own_tensors
from ..plugins import method
from .eyes import Eyes
from .eyes_info import EyesInfo, appearance, describe, open_eyes_file, recaller
from .sighted import EYES, Sighted

# The check keeps this many numbers of features and of logits, evenly spaced.
_NUM_KEPT = 32


def save_eyes(
    model: Sighted, path: str | os.PathLike[str], *, metrics: Mapping[str, float] | None = None, notes: str = ""
) -> int:
    """Writes the eyes of a language model into a file and returns its size [bytes].

    Holds what reads the images, and plugins of the eyes, in their own dtypes; and what is needed to use them: methods
    and settings, names and fingerprints of language model and image encoder, template, transform, and what comes out
    for a synthetic image and a few tokens. Written atomically; equal models give equal bytes.

    Args:
        model: What `petiole.give_eyes` returned; stays as it is.
        path: Where to; its folder must exist.
        metrics: What the model reached, by name.
        notes: Free text.

    Raises:
        PluginFileError: The file cannot be written, a tensor is not finite, or the file could not be loaded again.

    Example:
        >>> import petiole as pt
        >>> model = pt.give_eyes(language_model, pt.backbone("micro"), pt.MemVP(slots=64))
        >>> pt.save_eyes(model, "dots.safetensors", metrics={"val_accuracy": 0.93})
    """
    if not isinstance(model, Sighted):
        raise PluginFileError(f"save_eyes takes what petiole.give_eyes returned, got {type(model).__name__}: take save")
    tensors = model.reader_state()
    if converted := [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]:
        raise PluginFileError(
            f"{converted[0]} is {dtype_name(tensors[converted[0]].dtype)}, so the file could not be loaded again: the "
            "plugin stays in float32 whatever the language model is, convert it back by "
            f"model.{converted[0].partition('.')[0]}.float()"
        )
    if model.eyes is not None:
        tensors |= {f"{EYES}.{name}": tensor for name, tensor in own_tensors(model.eyes.model).items()}
    check_finite(tensors, "the model")
    return write(path, stack(packed(model, tensors)), describe(model, metrics or {}, notes, _expect(model)))


def load_eyes(
    path: str | os.PathLike[str], language_model: nn.Module, eyes: nn.Module | None = None, *, check: bool = True
) -> Sighted:
    """Returns a language model with the eyes of a file, in eval mode, on the language model's device.

    Args:
        path: A file of `save_eyes`.
        language_model: The model it was trained with; never written to.
        eyes: The image encoder it was trained with; never written to. None builds it by the name in the file, which may
            download its weights.
        check: Whether to show the model a synthetic image and compare what it answers with the file.

    Raises:
        PluginFileError: The file is damaged, foreign, a classifier's or of another schema version; a model is another
            one; a tensor is missing, unknown, of another shape or dtype, or not finite; or the answer differs.

    Example:
        >>> import petiole as pt
        >>> model = pt.load_eyes("dots.safetensors", language_model, pt.backbone("micro"))
    """
    tensors, info = open_eyes_file(path)
    view = _match(info, language_model)
    if info.eyes is None and eyes is not None:
        raise PluginFileError(f"{info.path} has no eyes, the model takes features: leave the image encoder out")
    host = eyes
    if info.eyes is not None and host is None:
        advice = f"give the image encoder: petiole.load_eyes({info.path!r}, language_model, eyes)"
        host = build_backbone(info.eyes, info.path, advice).to(next(language_model.parameters()).device)
    model = _rebuild(info, language_model, view, host)
    fill(model, unpacked(model, unstack(tensors), info.path), model.task_state(), model.movable(), info.path)
    model.template = info.template
    if model.eyes is not None and info.input_config is not None:
        model.eyes.model.input_config = dict(info.input_config)
    model.eval()
    if check:
        _check(model, info)
    return model


def _match(info: EyesInfo, model: Any) -> LanguageView:
    """Returns the view of a language model after comparing its fingerprint with the file's."""
    wanted, kind = info.language_model, class_name(model)
    try:
        view = language_view_of(model)
    except BackboneError as error:
        raise PluginFileError(f"{info.path} belongs to a {wanted['class']}, got a {kind}: {one_line(error)}") from error
    found = {"class": kind, **appearance(model)}
    differing = [key for key in found if found[key] != wanted[key]]
    if differing:
        key = differing[0]
        why = f"the {key} differs, {wanted[key]} in the file and {found[key]} here"
        if key == "dtype":
            why += f": load it with dtype=torch.{wanted['dtype']}"
    elif fingerprint(sorted(model.state_dict().items())) != wanted["fingerprint"]:
        why = "class and dtype agree, the weights differ: load the same pretrained weights, not fine-tuned since"
    else:
        return view
    raise PluginFileError(f"{info.path} belongs to another language model, {wanted['name'] or wanted['class']}: {why}")


def _rebuild(info: EyesInfo, language_model: nn.Module, view: LanguageView, host: nn.Module | None) -> Sighted:
    """Returns a fresh model with the file's plugins."""
    eyes = None
    try:
        if info.eyes is not None:
            assert host is not None
            host_view = match_backbone(info.eyes, host, info.path)
            plugins = [method(entry["method"], **entry["settings"]) for entry in info.eyes["plugins"]]
            adapted, scales = Adapted(host, host_view, plugins), info.eyes["scales"]
            eyes = Eyes(adapted, info.eyes["block"], scales=scales, class_token=info.class_token)
        plugin = recaller(info.plugin["method"], **info.plugin["settings"])
        return Sighted(language_model, view, eyes, plugin, info.d_image, class_token=info.class_token)
    except PluginFileError:
        raise
    except (PetioleError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise PluginFileError(f"{info.path} describes plugins that do not fit: {one_line(error)}") from error


@torch.no_grad()
def _answer(model: Sighted) -> dict[str, Tensor]:
    """Returns some features of a synthetic image and some logits of a few tokens, in eval mode, as float64."""
    with eval_mode(model):
        if model.eyes is None:
            num = 1 if model.class_token is None else 2
            features = torch.randn(1, num, model.d_image, generator=torch.Generator().manual_seed(0))
            features = features.to(model.language_model.device)
        else:
            inside = model.eyes.model
            features = model.eyes(inside.view.probe(inside.backbone, 1))
        logits = model(features=features, **model.view.probe(model.language_model)).logits
    return {"features": _some(features), "logits": _some(logits)}


def _some(tensor: Tensor) -> Tensor:
    """Returns numbers of a tensor from its first to its last, evenly spaced."""
    flat = tensor.flatten()
    places = torch.linspace(0, len(flat) - 1, min(len(flat), _NUM_KEPT), dtype=torch.float64).round().long()
    return flat[places.to(flat.device)].double().cpu()


def _expect(model: Sighted) -> dict[str, Any]:
    """Returns the check of a model: what it answers, to more digits than the tolerance asks for."""
    dtypes = {model.language_model.dtype}
    if model.eyes is not None:
        dtypes.add(next(model.eyes.model.backbone.parameters()).dtype)
    answers, digits = _answer(model), 9 if dtypes == {torch.float64} else 6
    if not all(torch.isfinite(values).all() for values in answers.values()):
        raise PluginFileError("the model's answer to a synthetic image is not finite: training diverged")
    kept = {key: [float(f"{value:.{digits}g}") for value in values.tolist()] for key, values in answers.items()}
    return {**kept, "tolerance": max(TOLERANCE[dtype] for dtype in dtypes)}


def _check(model: Sighted, info: EyesInfo) -> None:
    """Compares what the model answers with the file."""
    try:
        answers = _answer(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise PluginFileError(f"{info.path} fails its check: the model cannot run: {one_line(error)}") from error
    for key, found in answers.items():
        expected, allowed = torch.tensor(info.check[key], dtype=torch.float64), info.check["tolerance"]
        if expected.shape != found.shape:
            raise PluginFileError(f"{info.path}: the check expects {len(expected)} {key}, the model gives {len(found)}")
        off = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
        if not off <= allowed:
            raise PluginFileError(
                f"{info.path} fails its check: the {key} of a synthetic image are off by {off:.1e} relative, allowed "
                f"are {allowed:.0e}. The weights agree, so the models run otherwise than in training: compare library "
                "versions and settings"
            )
