"""ResNets for CIFAR-10, with weights that others trained."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, with shortcuts that have no weights.

    Source: He et al., 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, section 4.2; shortcuts of
    its option A.

    Args:
        depth: Layers: 6 n + 2 for n blocks a stage.
        num_classes: Classes of the classifier.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, num_blocks)
        self.layer2 = stage(16, 32, num_blocks)
        self.layer3 = stage(32, 64, num_blocks)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Block(nn.Module):
    """Two convolutions beside a shortcut, which skips positions and pads channels with zeros where it must."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.stride, self.num_added = d_out // d_in, d_out - d_in
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(d_out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        side = self.num_added // 2
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side)))


def stage(d_in: int, d_out: int, num_blocks: int) -> nn.Sequential:
    """Returns a stage; its first block widens it."""
    return nn.Sequential(Block(d_in, d_out), *(Block(d_out, d_out) for _ in range(num_blocks - 1)))


def cifar_resnet(depth: int, folder: Path) -> CifarResNet:
    """Returns a network with the weights of a folder, trained on CIFAR-10 at 32x32.

    Args:
        depth: 20 or 56.
        folder: Where the files of `FILES` are.
    """
    stored = torch.load(folder / FILES[depth], map_location="cpu", weights_only=True)["state_dict"]
    network = CifarResNet(depth)
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
    return network.eval()
