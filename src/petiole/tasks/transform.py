"""How images become a backbone's input, exactly as timm evaluates it."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import TaskError
from .images import to_rgb

_DEFAULTS: dict[str, Any] = {  # timm's own
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


class Transform:
    """The evaluation transform of a timm-style configuration, in two parts: geometry per image, values per batch.

    Args:
        config: `input_size` (3, H, W) [pixels] and, where they differ from timm's defaults, `interpolation`, `mean` and
            `std` (of values from 0 to 1), `crop_pct` (kept part of the resized edge) and `crop_mode`: `center` crops,
            `squash` ignores the aspect ratio, `border` pads.

    Raises:
        TaskError: A value that timm would not take, or a key it does not know.

    Example:
        >>> transform = Transform({"input_size": (3, 64, 64)})
        >>> transform.pixels(Image.new("L", (80, 60))).shape
        torch.Size([3, 64, 64])
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        # timm.data takes seconds to import, and who only reads tasks does not need it
        from timm.data import create_transform

        self.config = _checked(config)
        self._geometry = create_transform(**self.config, is_training=False, use_prefetcher=True)
        self._mean, self._std = (torch.tensor(self.config[key]).view(3, 1, 1) for key in ("mean", "std"))

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of what the backbone sees."""
        _, height, width = self.config["input_size"]
        return 3, height, width

    def pixels(self, image: Image.Image) -> Tensor:
        """Returns an image of any size and mode resized and cropped, uint8 `[3, H, W]`.

        Raises:
            TaskError: Its mode has no defined white (float images).
        """
        return self._geometry(to_rgb(image))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Returns what the backbone sees, float32 `[B, 3, H, W]` on the device of the uint8 pixels `[B, 3, H, W]`."""
        x = pixels.to(torch.float32).div_(255)
        return x.sub_(self._mean.to(x.device)).div_(self._std.to(x.device))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transform) and self.config == other.config

    def __hash__(self) -> int:
        return hash(repr(self.config))

    def __repr__(self) -> str:
        return f"Transform({self.config})"


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration complete and ready for JSON."""
    if unknown := sorted(set(config) - {"input_size", *_DEFAULTS}):
        raise TaskError(f"a transform has no setting {unknown[0]!r}: it has input_size, {', '.join(_DEFAULTS)}")
    merged = {**_DEFAULTS, **config}
    size = merged.get("input_size")
    if not isinstance(size, list | tuple) or len(size) != 3 or size[0] != 3 or min(size) < 1:
        raise TaskError(f"input_size must be (3, height, width) in pixels, got {size!r}")
    for key, known in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
        if merged[key] not in known:
            raise TaskError(f"{key} must be one of {', '.join(known)}, got {merged[key]!r}")
    for key in ("mean", "std"):
        if len(merged[key]) != 3 or (key == "std" and min(merged[key]) <= 0):
            raise TaskError(f"{key} must be three numbers{' above 0' * (key == 'std')}, got {merged[key]!r}")
    if not merged["crop_pct"] > 0:
        raise TaskError(f"crop_pct must be above 0, got {merged['crop_pct']!r}")
    return {
        "input_size": [int(n) for n in size],
        "interpolation": str(merged["interpolation"]),
        "mean": [float(v) for v in merged["mean"]],
        "std": [float(v) for v in merged["std"]],
        "crop_pct": float(merged["crop_pct"]),
        "crop_mode": str(merged["crop_mode"]),
    }
