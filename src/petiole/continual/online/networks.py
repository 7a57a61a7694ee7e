"""Small networks that are trained from nothing on a stream."""

import torch
from torch import nn

from ...errors import FitError


def small_resnet(width: int = 20, *, stride: int = 1, in_channels: int = 3, seed: int = 0) -> nn.Module:
    """Returns the reduced ResNet-18 of online learning: images `[B, in_channels, H, W]` to features `[B, 8 width]`.

    Three times fewer channels than ResNet-18 at the default, and a stem that is one 3x3 convolution without pooling.

    Source: Lopez-Paz and Ranzato, 2017, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, section
    4; built by timm.

    Args:
        width: Channels of the first stage; each of the three others has twice as many as the one before.
        stride: Of the stem: 1 for 32 pixels; 2 takes a quarter of the time.
        in_channels: Channels of the images.
        seed: Seed of the weights.

    Raises:
        FitError: The width is odd or below 2.
    """
    from timm.models.resnet import BasicBlock, ResNet

    if width < 2 or width % 2:
        raise FitError(f"the width is an even number of channels, got {width}")
    channels = tuple(width * 2**i for i in range(4))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # timm lets only a deep stem choose its width; its three convolutions then become one
        network = ResNet(
            BasicBlock, (2, 2, 2, 2), 0, in_channels, stem_width=width // 2, stem_type="deep", channels=channels,
            zero_init_last=False,
        )  # fmt: skip
        network.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def projector(d_in: int, d_out: int, *, seed: int = 0) -> nn.Sequential:
    """Returns two linear maps around a ReLU: features `[B, d_in]` to what `SupCon` compares `[B, d_out]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d_in, d_in), nn.ReLU(), nn.Linear(d_in, d_out))
