"""Models leave the library: exported, and compiled to machine code."""

import copy
import shutil

import pytest
import torch
from torch import nn

import petiole as pt
from fitting import make_model

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained_model() -> pt.Adapted:
    """Returns an adapted model whose plugin is not the identity."""
    model = make_model(pt.FacT(rank=2, dropout=0.0)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.plugins.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("is_merged", [True, False], ids=["merged", "adapted"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_program_gives_the_same_logits(is_merged: bool, strict: bool) -> None:
    model = trained_model()
    net: nn.Module = pt.merge(model) if is_merged else model
    with torch.no_grad():
        program = torch.export.export(net, (IMAGES,), strict=strict)
        torch.testing.assert_close(program.module()(IMAGES), net(IMAGES), rtol=1e-5, atol=1e-6)


def test_exported_program_takes_any_batch() -> None:
    net = pt.merge(trained_model())
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(net, (IMAGES,), dynamic_shapes=({0: batch},))
        images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(program.module()(images), net(images), rtol=1e-5, atol=1e-6)


@pytest.mark.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_model_gives_the_same_logits_and_gradients() -> None:
    model = trained_model()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="inductor")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    for net in (compiled, model):
        net(IMAGES).square().sum().backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in compiled.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, {name: p.grad for name, p in model.trained()}, rtol=1e-4, atol=1e-5)
