"""Features of a frozen model: computed batch by batch, or once for all samples and kept."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..core.adapted import Adapted
from ..core.fingerprint import fingerprint, raw_bytes
from ..core.prove import eval_mode
from ..errors import FitError, PluginFileError
from ..files.container import one_line, read, write
from ..files.description import describe_backbone
from ..files.state import own_tensors
from ..tasks.augment import Augmented
from ..tasks.cache import Pixels
from ..tasks.task import Split
from ..tasks.transform import Transform
from .samples import Samples, as_samples

# relative error of features that are computed again on another machine or in other batches, with room
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NUM_COMPARED = 4


class Extractor:
    """What the head of a frozen model sees, as a function of images.

    Args:
        model: An adapted model, with plugins or without, with a head or without; always runs in eval mode, where it is.
        dtype: What features are rounded to before they are used, as a cache of them rounds: half precision takes half
            the room.

    Example:
        >>> import petiole as pt
        >>> extract = Extractor(pt.adapt(pt.backbone("micro")))
        >>> extract(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 192])
    """

    def __init__(self, model: Adapted, *, dtype: torch.dtype = torch.float16) -> None:
        if not isinstance(model, Adapted):
            raise FitError(f"features are those of what petiole.adapt returned, got {type(model).__name__}")
        self.model, self.dtype = model, dtype
        self.transform = Transform(model.input_config)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Returns features `[B, d]`, float32 on the model's device.

        Args:
            images: Pixels as the model's transform gives them, uint8 `[B, 3, H, W]`; floats `[B, 3, H, W]`, which are
                taken as normalised; or features `[B, d]`, e.g. of a cache, which are returned as they are.

        Raises:
            FitError: The images have another size than the model takes, or a feature does not fit into the dtype.
        """
        like = next(self.model.parameters())
        if images.shape[1:] == (self.model.view.num_features(self.model.backbone),):
            return images.to(like.device, torch.float32)
        if images.shape[1:] != self.transform.input_size:
            raise FitError(
                f"the model takes images {list(self.transform.input_size)}, got {list(images.shape[1:])}: prepare them "
                "by petiole.Transform(model.input_config)"
            )
        x = images.to(like.device)
        x = x if x.is_floating_point() else self.transform.normalize(x)
        with eval_mode(self.model):
            features = self.model.forward_features(x.to(like.dtype)).to(self.dtype).float()
        if not torch.isfinite(features).all():
            raise FitError(
                f"a feature is not finite in {str(self.dtype).removeprefix('torch.')}: use dtype=torch.float32"
            )
        return features


class CachedFeatures:
    """Samples that are features, in one view each or in several.

    Of several views, a stream draws one for each sample in each epoch; without a draw it is the first.

    Args:
        values: `[n, d]`, or `[n, views, d]`.
        labels: Class of each sample, int64 `[n]`.
        drawn: View of each sample `[n]`; None for the first.
    """

    def __init__(self, values: Tensor, labels: Tensor, drawn: Tensor | None = None) -> None:
        self.values, self.labels = values, labels
        self._drawn = torch.zeros(len(labels), dtype=torch.int64) if drawn is None else drawn

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_views(self) -> int:
        """Views of each sample."""
        return 1 if self.values.ndim == 2 else self.values.shape[1]

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns features `[B, d]`, float32 where they are kept, and labels `[B]`."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        places = [rows] if self.values.ndim == 2 else [rows, self._drawn[rows]]
        return self.values[tuple(place.to(self.values.device) for place in places)].float(), self.labels[rows]

    def drawn(self, seed: Sequence[int]) -> "CachedFeatures":
        """Returns the samples with a view of each, which follows from the seed."""
        if self.num_views == 1:
            return self
        drawn = np.random.default_rng(seed).integers(self.num_views, size=len(self))
        return CachedFeatures(self.values, self.labels, torch.from_numpy(drawn))

    def every_view(self) -> "CachedFeatures":
        """Returns all views as samples of their own, for learners that make their own epochs."""
        return CachedFeatures(self.values.flatten(0, -2), self.labels.repeat_interleave(self.num_views))


def cache_features(
    model: Adapted,
    source: Any,
    *,
    views: int = 1,
    augment: Literal["none", "fgvc"] = "none",
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    folder: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> CachedFeatures:
    """Returns the features of samples, each image run through a frozen model once for every view.

    With a folder they are kept in a file, whose name follows from all they depend on: backbone, plugins, transform,
    every pixel, views and dtype. What is kept is used if it is of the same, and if the model gives the first few
    features again; otherwise it is computed.

    Args:
        model: An adapted model, with plugins or without, with a head or without.
        source: Images with labels (`Split`), or samples whose inputs are images.
        views: Views of each image; several need an augmentation.
        augment: What happens to an image in each view: `none`, or `fgvc` as in `Recipe`.
        seed: Seed of the augmentation.
        dtype: What features are kept in; they are used in float32.
        device: Where they are kept; None for the model's.
        batch_size: Images a forward pass.
        folder: Where to keep them in a file; None keeps none.
        progress: Called with the number of views done and in all.

    Raises:
        FitError: The settings contradict each other, samples are prepared for another model, or a feature does not fit
            into the dtype.
        TaskError: An image cannot be read, or the source is none.
        PluginFileError: The file cannot be written.

    Example:
        >>> import petiole as pt
        >>> from petiole.continual.streams import class_incremental
        >>> task, model = pt.open_task("digits"), pt.adapt(pt.backbone("micro"))
        >>> train, test = cache_features(model, task.train), cache_features(model, task.test)
        >>> stream = class_incremental(train, test, num_experiences=5, classes=task.classes)
    """
    extract = Extractor(model, dtype=dtype)
    samples = as_samples(source, extract.transform) if isinstance(source, Split) else as_samples(source)
    look = _looks(samples, extract.transform, views, augment, seed)
    labels, where = samples.labels, next(model.parameters()).device if device is None else torch.device(device)
    path = None
    if folder is not None:
        facts = _facts(extract, samples, views, augment, seed, batch_size)
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        path = Path(folder) / f"features-{name}.safetensors"
        if (kept := _kept(path, facts, extract, look)) is not None:
            return CachedFeatures(kept.to(where), labels)
    values = _computed(extract, look, len(samples), views, batch_size, where, progress)
    if path is not None:
        _write(path, values, facts)
    return CachedFeatures(values, labels)


Look = Callable[[list[int], int], Tensor]


def _looks(samples: Samples, transform: Transform, views: int, augment: str, seed: int) -> Look:
    """Returns the function from rows and a view's number to images."""
    if isinstance(samples, Pixels) and samples.transform != transform:
        raise FitError("the images are prepared for another model: use petiole.Transform(model.input_config)")
    if augment == "none" and views == 1:
        return lambda rows, view: samples.batch(rows)[0]
    if augment != "fgvc" or views < 1:
        raise FitError(f"views differ by their augmentation: {views} of them with augment={augment!r} cannot be")
    if not isinstance(samples, Pixels):
        raise FitError(f"augment={augment!r} needs images with labels (a Split), got {type(samples).__name__}")
    images = Augmented(samples.split, transform, seed)
    return lambda rows, view: images.batch(rows, view)[0]


def _computed(
    extract: Extractor,
    look: Look,
    num_samples: int,
    views: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int, int], object] | None,
) -> Tensor:
    """Returns features `[n, d]`, or `[n, views, d]` of several views."""
    d = extract.model.view.num_features(extract.model.backbone)
    values = torch.empty(num_samples, views, d, dtype=extract.dtype, device=device)
    for start in range(0, num_samples, batch_size):
        rows = list(range(start, min(start + batch_size, num_samples)))
        for view in range(views):
            values[start : start + len(rows), view] = extract(look(rows, view)).to(values)
            if progress is not None:
                progress(start * views + (view + 1) * len(rows), num_samples * views)
    return values.squeeze(1) if views == 1 else values


def _facts(
    extract: Extractor, samples: Samples, views: int, augment: str, seed: int, batch_size: int
) -> dict[str, Any]:
    """Returns all that features depend on, as plain values."""
    model = extract.model
    own = {name: tensor for name, tensor in own_tensors(model).items() if not name.startswith("head.")}
    images = hashlib.sha256()
    for start in range(0, len(samples), batch_size):
        x, _ = samples.batch(range(start, min(start + batch_size, len(samples))))
        if not start:
            images.update(f"{x.dtype}{list(x.shape[1:])}".encode())
        images.update(raw_bytes(x))
    facts = {
        "kind": "features",
        "petiole": __version__,
        "backbone": describe_backbone(model),
        "plugins": [{"method": plugin.method, **plugin.settings()} for plugin in model.taps.plugins],
        "tensors": fingerprint(sorted(own.items())),
        "transform": extract.transform.config,
        "num_samples": len(samples),
        "images": images.hexdigest(),
        "views": views,
        "augment": augment,
        "seed": seed,
        "dtype": str(extract.dtype).removeprefix("torch."),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _kept(path: Path, facts: dict[str, Any], extract: Extractor, look: Look) -> Tensor | None:
    """Returns the features in a file, None where there is no such file or it is no longer right."""
    if not path.exists():
        return None
    try:
        tensors, found = read(path)
    except PluginFileError:
        # a cache can be made again
        return None
    if found != facts:
        return None
    values = tensors["features"]
    rows = list(range(min(_NUM_COMPARED, len(values))))
    again, first = extract(look(rows, 0)).cpu(), values[rows].float()
    # settings of a backbone that are no weights, such as its pooling, are in no fingerprint
    off = (again - (first[:, 0] if first.ndim == 3 else first)).norm() / again.norm().clamp_min(1e-30)
    return values if off <= _TOLERANCE.get(extract.dtype, 1e-3) else None


def _write(path: Path, values: Tensor, facts: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PluginFileError(f"the folder {path.parent} cannot be made: {one_line(error)}") from error
    write(path, {"features": values}, facts)
