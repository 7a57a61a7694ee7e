"""A small network and a small stream for the tests of online learners."""

import torch
from torch import Tensor, nn

from petiole.continual.streams import Stream, class_incremental


def network(seed: int = 0, d_in: int = 6, d_out: int = 5) -> nn.Module:
    """Returns a network with batch norm, whose running statistics are part of its state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(d_in, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, d_out))


def samples(num: int, num_classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns classes that four dimensions tell apart, and two loud ones do not, in a fixed random order."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(num) % num_classes)[torch.randperm(num, generator=generator)]
    centres, loudness = 3 * torch.eye(6)[:num_classes], torch.tensor([0.4, 0.4, 0.4, 0.4, 4.0, 4.0])
    return centres[labels] + loudness * torch.randn(num, 6, generator=generator), labels


def stream(num: int = 400, num_classes: int = 4) -> Stream:
    """Returns two classes in each experience, in batches of ten."""
    return class_incremental(samples(num, num_classes), samples(80, num_classes, 1), num_experiences=2, batch_size=10)


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns samples with other noise each time."""
    return x + 0.1 * torch.randn(x.shape, generator=generator)
