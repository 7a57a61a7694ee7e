"""An image encoder as eyes: patch features of one of its blocks."""

import torch
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..core.flow import Flow
from ..core.prove import eval_mode
from ..core.taps import Step, Taps
from ..errors import BackboneError, PluginError


class Eyes(nn.Module):
    """Patch features of a frozen image encoder, which may have trained plugins.

    Blocks behind the chosen one do not run; its tokens go straight to what the encoder does behind its last block, in
    most families a norm. Trained tensors that no feature depends on, those of the blocks that do not run, are frozen.

    Args:
        model: An adapted model without a head; with or without plugins.
        block: The block whose tokens are taken; negative numbers count from the last, -1.

    Raises:
        BackboneError: The encoder has no such block.
        PluginError: The model has a head, which features never reach.
    """

    def __init__(self, model: Adapted, block: int = -1) -> None:
        super().__init__()
        if model.head is not None:
            raise PluginError("eyes need no head, and this model has one: adapt it without classes")
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
        """Returns features `[B, n, d_image]` of images `[B, 3, H, W]`, without prefix tokens."""
        model = self.model
        tokens, flow = model.view.run(model.backbone, images, _FirstBlocks(model.taps, self.num_blocks))
        return tokens[:, flow.num_prefix :]

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
