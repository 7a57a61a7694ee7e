"""Attention with a bias for each key: as a mask and as one more channel."""

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import petiole as pt
from models import MODELS
from petiole.backbones import view_of
from petiole.nn import attention


def made(d_head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d_head)
    q, k, v = (torch.randn(2, 3, 7, d_head, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.rand(2, 1, 1, 7, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("d_head", [8, 13])
def test_bias_as_a_channel_gives_the_scores_of_the_mask(d_head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, bias = made(d_head)
    expected = (q @ k.mT * d_head**-0.5 + bias).softmax(dim=-1) @ v
    torch.testing.assert_close(attention.attend(q, k, v, bias), expected)
    monkeypatch.setattr(attention, "takes_masks", lambda device: False)
    torch.testing.assert_close(attention.attend(q, k, v, bias), expected)
    wide = attention.with_bias_channel(q, k, v, bias, d_head**-0.5)
    assert {t.shape[-1] % attention.MULTIPLE for t in wide} == {0}


@pytest.mark.parametrize("name", ["vit", "torchvision"])
def test_compressed_model_needs_no_kernel_with_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pt.compress(MODELS[name]().eval(), r=3)
    images = model.view.probe(model.backbone)
    expected = model(images)
    monkeypatch.setattr(attention, "takes_masks", lambda device: False)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "with_bias_channel", None)
        with pytest.raises(TypeError):
            model(images)


def test_kernels_of_transformers_that_take_no_mask_get_the_bias_as_a_channel() -> None:
    def maskless(module, q, k, v, attention_mask, dropout=0.0, scaling=None, **settings):  # type: ignore[no-untyped-def]
        assert attention_mask is None
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return y.transpose(1, 2), None

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                           image_size=32, patch_size=8)  # fmt: skip
        backbone = ViTModel(config).eval()
    images = view_of(backbone).probe(backbone)
    expected = pt.compress(backbone, r=3)(images)
    ALL_ATTENTION_FUNCTIONS.register("flash_attention_of_tests", maskless)
    backbone.config._attn_implementation = "flash_attention_of_tests"
    torch.testing.assert_close(pt.compress(backbone, r=3)(images), expected, rtol=1e-4, atol=1e-5)
