"""Augmentation of a batch of images as a tensor, each image in its own way, from a given generator.

ShiftFlip    a shift by some pixels, and a mirror image
CropColour   a part of the image at full size, a mirror image, and other brightness, contrast and colours
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import FitError


class ShiftFlip:
    """Shifts images, fills in zeros, and mirrors half of them: the augmentation of small images.

    Args:
        shift: Pixels up, down, left or right at most.
        flip: Share of images that are mirrored.

    Raises:
        FitError: The shift is below 0, or the share is none.
    """

    def __init__(self, *, shift: int = 4, flip: float = 0.5) -> None:
        if shift < 0 or not 0 <= flip <= 1:
            raise FitError(f"a shift is 0 or more and a share from 0 to 1, got shift={shift} and flip={flip}")
        self.shift, self.flip = shift, flip

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns images of the same shape, dtype and device `[B, C, H, W]`."""
        height, width = x.shape[-2:]
        padded = F.pad(x, (self.shift,) * 4)
        corners = torch.randint(2 * self.shift + 1, (len(x), 2), generator=generator).tolist()
        # views of the padded images and one kernel that stacks them
        moved = torch.stack([padded[i, :, a : a + height, b : b + width] for i, (a, b) in enumerate(corners)])
        return _mirrored(moved, self.flip, generator)


class CropColour:
    """Cuts out parts of images, mirrors half of them and changes their colours: the views of contrastive learning.

    Source: the augmentation of Mai et al., 2021, "Supervised Contrastive Replay", arXiv 2103.13885, in kind; after Chen
    et al., 2020, arXiv 2002.05709.

    Args:
        scale: Least share of an image's area that is cut out.
        colour: Brightness, contrast and saturation are multiplied by a number from 1 - colour to 1 + colour.
        grey: Share of images that lose their colours.

    Raises:
        FitError: A share is none.

    Differs from the paper: crops keep the image's aspect ratio, hues stay, every image's colours change.
    """

    def __init__(self, *, scale: float = 0.2, colour: float = 0.4, grey: float = 0.2) -> None:
        if not 0 < scale <= 1 or not 0 <= colour <= 1 or not 0 <= grey <= 1:
            raise FitError(f"shares are from 0 to 1, and scale above 0, got {scale}, {colour} and {grey}")
        self.scale, self.colour, self.grey = scale, colour, grey

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns images of the same shape, dtype and device `[B, C, H, W]`; integers to 255, or floats to 1."""
        images = x if x.is_floating_point() else x.float() / 255
        images = self._recoloured(self._cropped(images, generator), generator)
        images = _mirrored(images, 0.5, generator)
        return images if x.is_floating_point() else (images * 255).round().to(x.dtype)

    def _cropped(self, x: Tensor, generator: torch.Generator) -> Tensor:
        side = _uniform((len(x),), self.scale, 1.0, generator).sqrt()
        centre = _uniform((len(x), 2), -1.0, 1.0, generator) * (1 - side)[:, None]
        boxes = torch.zeros(len(x), 2, 3)
        boxes[:, 0, 0] = boxes[:, 1, 1] = side
        boxes[:, :, 2] = centre
        grid = F.affine_grid(boxes.to(x), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def _recoloured(self, x: Tensor, generator: torch.Generator) -> Tensor:
        bright, contrast, saturation = (
            _uniform((3, len(x), 1, 1, 1), 1 - self.colour, 1 + self.colour, generator).to(x).unbind()
        )
        is_grey = (torch.rand(len(x), 1, 1, 1, generator=generator) < self.grey).to(x)
        x = (x * bright).clamp(0, 1)
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (mean + contrast * (x - mean)).clamp(0, 1)
        luma = x.mean(1, keepdim=True)
        return (luma + saturation * (1 - is_grey) * (x - luma)).clamp(0, 1)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _mirrored(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    is_mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < share
    return torch.where(is_mirrored.to(x.device), x.flip(-1), x)
