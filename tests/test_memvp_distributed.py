"""A language model with eyes in two processes: plain DDP gives the whole batch's gradients."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import petiole as pt
from language_models import random, sighted, tokens
from models import MODELS
from test_distributed import launch, torchrun

pytestmark = pytest.mark.slow

IMAGES = random(4, 3, 32, 32)
IDS = tokens(4, 5)
# the second process has text only
INDICATOR = torch.tensor([1, 1, 0, 0])


def make_model() -> pt.Sighted:
    vision = pt.adapt(MODELS["vit_no_classifier"](), pt.AdaptFormer(dim=2), prove=False)
    for p in vision.plugins.parameters():
        torch.nn.init.constant_(p, 0.05)
    return sighted("llama", vision, slots=20)


def gradients(model: pt.Sighted) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.trained()}


def both_processes(out: Path) -> None:
    """What each of two processes does: no images at all in the second one, and no `find_unused_parameters`."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = make_model()
    net = DistributedDataParallel(model)
    part = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):
        model.zero_grad()
        net(IMAGES[part] if rank == 0 else None, input_ids=IDS[part], labels=IDS[part]).loss.backward()
    torch.save(gradients(model), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_plain_ddp_gives_the_whole_batchs_gradients(tmp_path: Path) -> None:
    launch(torchrun(__file__, tmp_path), tmp_path)
    model = make_model()
    model(IMAGES, INDICATOR, input_ids=IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    assert all(grad.any() for grad in expected.values())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    both_processes(Path(sys.argv[1]))
