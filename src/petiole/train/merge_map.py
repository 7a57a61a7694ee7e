"""Which patches of an image share a token after each block, and a picture of it.

image ── walk, where each reducer also gets a unit matrix ──> patches that share a token ──> mean colours, outlines
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.adapted import Adapted
from ..core.attended import Attended
from ..core.flow import Flow
from ..core.plugin import Plugin, Reducer
from ..core.prove import eval_mode
from ..core.taps import Taps
from ..errors import PluginError

# least length of a panel's shorter side, its margins, the line of text above it [pixels]
PANEL, MARGIN, CAPTION = 512, 8, 28
# relative error that a reducer's own rounding may cause in a token, also in bfloat16
TOLERANCE = 0.02


@dataclass(frozen=True, eq=False)
class MergeMap:
    """Where each patch of one image is, before the first block and after each.

    Args:
        num_tokens: Tokens that enter the first block, then those that leave each, with prefix tokens `[depth + 1]`.
        groups: The token that each patch is in, counted behind the prefix tokens; -1 for a patch that was dropped
            `[depth + 1, H_grid, W_grid]`.
        pruned: Whether a patch was dropped, or fused because it matters least rather than because it resembles another
            one; alike.
    """

    num_tokens: tuple[int, ...]
    groups: Tensor
    pruned: Tensor

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.num_tokens) - 1

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the patch grid."""
        return self.groups.shape[1], self.groups.shape[2]

    def largest(self, block: int) -> int:
        """Returns how many patches the largest group has after so many blocks."""
        groups = self.groups[block]
        return int(groups[groups >= 0].bincount().max())


@torch.no_grad()
def trace(model: Adapted, image: Tensor) -> MergeMap:
    """Returns where each patch of an image goes; leaves the model in the mode it was in.

    Follows any reducer that decides by what attention compared, not by the tokens' values: it then does to a unit
    matrix what it does to the tokens, and its answer says which tokens went into which.

    Args:
        model: An adapted model; runs where it is. Without a reducer each patch stays by itself.
        image: What the backbone sees, normalised `[3, H, W]`.

    Raises:
        PluginError: The backbone has no place where tokens can go, its patches form no grid, or a reducer decides by
            the tokens' values.

    Example:
        >>> import petiole as pt
        >>> from petiole.train.merge_map import trace
        >>> fast = pt.compress(pt.backbone("micro"), r=8)
        >>> trace(fast, torch.zeros(3, 64, 64)).num_tokens
        (65, 57, 49, 41, 33, 25, 17)
    """
    like, tracer = next(model.parameters()), _Tracer(model.taps.plugins)
    with eval_mode(model):
        model.view.run(model.backbone, image.unsqueeze(0).to(like), tracer)
    if not tracer.groups:
        raise PluginError(f"no token can go in this {type(model.backbone).__name__}, so there are no merges to trace")
    if tracer.grid is None:
        raise PluginError(f"the patches of this {type(model.backbone).__name__} form no grid that could be drawn")
    groups, pruned = (torch.stack(maps).cpu().unflatten(1, tracer.grid) for maps in (tracer.groups, tracer.pruned))
    return MergeMap(tuple(tracer.num_tokens), groups, pruned)


class _Tracer(Taps):
    """Follows the patches of one image through the reducers of one pass."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        super().__init__(plugins)
        self.grid: tuple[int, int] | None = None
        self.num_tokens: list[int] = []
        self.groups: list[Tensor] = []
        self.pruned: list[Tensor] = []

    def tokens(self, name: str, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        y, after = super().tokens(name, x, attended, flow)
        # float32 at least: a share may be too small for half precision
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = torch.eye(x.shape[1], dtype=wide, device=x.device)
        shares = super().tokens(name, unit.unsqueeze(0), attended, flow)[0].squeeze(0)
        reducers = [plugin for plugin, _ in self.table.get(name, ()) if isinstance(plugin, Reducer)]
        # of what the reducers left of the unit matrix, each token is the mixture that its row says
        error, norm = ((t.to(wide)[0]).norm(dim=-1) for t in (y - (shares @ x.to(wide)).to(y.dtype), y))
        if (error > TOLERANCE * norm).any():
            raise PluginError(
                f"{' and '.join(type(plugin).__name__ for plugin in reducers)} at {name} decides by the tokens' values "
                "which of them go, and only decisions by attention can be traced"
            )
        if not self.groups:
            self.grid, self.num_tokens = flow.grid, [x.shape[1]]
            self.groups = [torch.arange(x.shape[1] - flow.num_prefix, device=x.device)]
            self.pruned = [torch.zeros_like(self.groups[0], dtype=torch.bool)]
        is_pruning = any(plugin.is_pruning and plugin.requests[name] for plugin in reducers)
        self._follow(shares[after.num_prefix :, flow.num_prefix :], is_pruning)
        self.num_tokens.append(y.shape[1])
        return y, after

    def _follow(self, shares: Tensor, is_pruning: bool) -> None:
        """Takes the patches through one block, of whose tokens the shares `[M, N]` say what they are made of."""
        goes = shares.argmax(dim=0).masked_fill((shares == 0).all(dim=0), -1)
        is_fused = ((shares != 0).sum(dim=1) > 1)[goes] & is_pruning
        was = self.groups[-1]
        now = goes[was].masked_fill(was < 0, -1)
        self.groups.append(now)
        self.pruned.append(self.pruned[-1] | is_fused[was] | (now < 0))


def draw(pixels: Tensor, merges: MergeMap, blocks: Sequence[int] | None = None) -> Image.Image:
    """Returns the image and, beside it, what is left of it after some blocks, side by side with a line of text above.

    Each panel is a whole number of times as large as the image, with a shorter side of 512 pixels at least.

    Args:
        pixels: The image as the backbone sees it, not normalised: uint8 `[3, H, W]`.
        merges: Where its patches went.
        blocks: After how many blocks, from 1 to the depth, one panel each; by default half of them and all.

    Raises:
        PluginError: There is no such block, or the patches do not tile the image.
    """
    depth = merges.depth
    chosen = sorted({(depth + 1) // 2, depth}) if blocks is None else blocks
    if wrong := [block for block in chosen if not 1 <= block <= depth]:
        raise PluginError(f"there is no block {wrong[0]}: the backbone has {depth}, choose from 1 to {depth}")
    panels = [(f"image: {merges.num_tokens[0]} tokens", _enlarged(pixels))]
    for block in chosen:
        text = f"after block {block}: {merges.num_tokens[block]} tokens"
        panels.append((text, paint(pixels, merges.groups[block], merges.pruned[block])))
    height, width, _ = panels[0][1].shape
    sheet = Image.new("RGB", (MARGIN + len(panels) * (width + MARGIN), CAPTION + height + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, (text, panel) in enumerate(panels):
        left = MARGIN + i * (width + MARGIN)
        pen.text((left, CAPTION // 2), text, fill="black", font=font, anchor="lm")
        sheet.paste(Image.fromarray(panel), (left, CAPTION))
    return sheet


def paint(pixels: Tensor, groups: Tensor, pruned: Tensor) -> NDArray[np.uint8]:
    """Returns one enlarged panel, `[s H, s W, 3]` for a scale s.

    A group of several patches has their mean colour, a patch by itself its own pixels; what was pruned is dim and grey.
    A line runs between different groups.

    Args:
        pixels: The image, uint8 `[3, H, W]`.
        groups: The token each patch is in `[H_grid, W_grid]`.
        pruned: Whether it went by pruning, alike.

    Raises:
        PluginError: The patches do not tile the image.
    """
    (_, height, width), (rows, columns) = pixels.shape, groups.shape
    if height % rows or width % columns:
        raise PluginError(f"{rows} x {columns} patches do not tile an image of {height} x {width} pixels")
    panel = _enlarged(pixels)
    side = panel.shape[0] // rows, panel.shape[1] // columns

    def grown(cells: NDArray[np.generic]) -> NDArray[np.generic]:
        return cells.repeat(side[0], axis=0).repeat(side[1], axis=1)

    cells = pixels.numpy().reshape(3, rows, height // rows, columns, width // columns).mean(axis=(2, 4))
    _, places, counts = np.unique(groups.numpy(), return_inverse=True, return_counts=True)
    places = places.reshape(rows, columns)
    sums = np.stack([np.bincount(places.ravel(), cell.ravel()) for cell in cells], axis=-1)
    means = (sums / counts[:, None])[places]
    grey = (panel.mean(axis=-1, keepdims=True) / 4 + 96).astype(np.uint8)
    panel = np.where(grown(counts[places] > 1)[..., None], grown(means.round().astype(np.uint8)), panel)
    panel = np.where(grown(pruned.numpy())[..., None], grey, panel)
    # black on light and white on dark, so that a line shows on any colour
    lines = grown(np.where(means.mean(axis=-1, keepdims=True) > 127, np.uint8(0), np.uint8(255)))
    return np.where(_edges(grown(places))[..., None], lines, panel)


def _edges(labels: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Returns which pixels `[H, W]` lie beside one of another label."""
    edges = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        found, differs = np.swapaxes(edges, 0, axis), np.diff(np.swapaxes(labels, 0, axis), axis=0) != 0
        found[1:] |= differs
        found[:-1] |= differs
    return edges


def _enlarged(pixels: Tensor) -> NDArray[np.uint8]:
    """Returns an image uint8 `[3, H, W]` as a panel `[s H, s W, 3]`."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = math.ceil(PANEL / min(image.size))
    return np.asarray(image.resize((scale * image.width, scale * image.height), Image.Resampling.BICUBIC))
