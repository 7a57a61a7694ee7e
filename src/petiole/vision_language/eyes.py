"""An image encoder as eyes: patch features of one of its blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.adapted import Adapted
from ..core.flow import Flow
from ..core.prove import eval_mode
from ..core.taps import Step, Taps
from ..errors import BackboneError, PluginError


class Eyes(nn.Module):
    """Patch features of a frozen image encoder, which may have trained plugins.

    Blocks behind the chosen one do not run; its tokens go straight to what the encoder does behind its last block, in
    most families a norm. Trained tensors that no feature depends on, those of the blocks that do not run, are frozen.

    Source: the patches of a block as in Jie et al., 2024, arXiv 2405.05615; scales and class token as in Hao et al.,
    2024, arXiv 2410.17779.

    Args:
        model: An adapted model without a head; with or without plugins.
        block: The block whose tokens are taken; negative numbers count from the last, -1.
        scales: Sides of the squares of patches that are averaged, 1 for the patches themselves; at the edge of the
            grid, what is there is averaged. `(1, 2)` makes 256 + 64 features of 16 x 16 patches, the finest first.
        class_token: Whether the class token comes along, as the first feature.

    Raises:
        BackboneError: The encoder has no such block, or no class token that is asked for.
        PluginError: The model has a head, which features never reach; scales are none, or its patches form no grid.
    """

    def __init__(
        self, model: Adapted, block: int = -1, *, scales: Sequence[int] = (1,), class_token: bool = False
    ) -> None:
        super().__init__()
        if model.head is not None:
            raise PluginError("eyes need no head, and this model has one: adapt it without classes")
        if not scales or len(set(scales)) < len(scales) or any(type(s) is not int or s < 1 for s in scales):
            raise PluginError(f"scales are different whole numbers from 1, e.g. (1, 2), got {tuple(scales)}")
        self.scales, self.class_token = tuple(sorted(scales)), class_token
        depth = 1 + max(site.block for site in model.view.sites(model.backbone))
        if not -depth <= block < depth:
            raise BackboneError(f"block {block} was asked for; this {type(model.backbone).__name__} has {depth} blocks")
        self.model, self.num_blocks = model, block % depth + 1
        with eval_mode(self), torch.enable_grad():
            features = self(self.blank())
        self.num_features, self.width = features.shape[1:]
        trained = [p for _, p in model.trained()]
        grads = torch.autograd.grad(features.sum(), trained, allow_unused=True) if trained else ()
        for p, grad in zip(trained, grads, strict=True):
            p.requires_grad_(grad is not None)

    def forward(self, images: Tensor) -> Tensor:
        """Returns features `[B, n, d_image]` of images `[B, 3, H, W]`, `num_features` of each."""
        model = self.model
        tokens, flow = model.view.run(model.backbone, images, _FirstBlocks(model.taps, self.num_blocks))
        patches = tokens[:, flow.num_prefix :]
        features = patches if self.scales == (1,) else self._averaged(patches, flow)
        if not self.class_token:
            return features
        if not flow.has_class:
            raise BackboneError(f"this {type(model.backbone).__name__} has no class token: leave class_token out")
        return torch.cat([tokens[:, :1], features], dim=1)

    def _averaged(self, patches: Tensor, flow: Flow) -> Tensor:
        """Returns patches `[B, n, d_image]` averaged at each scale, the finest first."""
        if flow.grid is None or flow.grid[0] * flow.grid[1] != patches.shape[1]:
            raise PluginError(
                f"scales {self.scales} average neighbours of a grid, and the {patches.shape[1]} patches of this model "
                "form none, as where a plugin merges or drops some: leave scales at (1,)"
            )
        grid = patches.mT.unflatten(2, flow.grid)
        scaled = [F.avg_pool2d(grid, s, ceil_mode=True) for s in self.scales if s > 1]
        return torch.cat([patches] * (1 in self.scales) + [t.flatten(2).mT for t in scaled], dim=1)

    def blank(self) -> Tensor:
        """Returns one image of zeros `[1, 3, H, W]`."""
        return torch.zeros_like(self.model.view.probe(self.model.backbone, 1))


class _FirstBlocks(Taps):
    """Taps of one walk that let only the first blocks run."""

    def __init__(self, taps: Taps, num_blocks: int) -> None:
        super().__init__(taps.plugins, taps.is_checkpointed)
        self.num_left = num_blocks

    def block(self, name: str, x: Tensor, flow: Flow, run: Step) -> tuple[Tensor, Flow]:
        self.num_left -= 1
        return (x, flow) if self.num_left < 0 else super().block(name, x, flow, run)
