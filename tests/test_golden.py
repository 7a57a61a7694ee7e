"""Agreement with the authors' own implementations in float64, gradients included.

To 1e-9; what is quantised to 1e-6, as their tables of levels are float32.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import petiole as pt

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def det(name: str, shape: tuple[int, ...], std: float) -> Tensor:
    seed = zlib.crc32(name.encode()) % 2**32
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape) * std)


@torch.no_grad()
def rebuild(model: nn.Module, std: float, prefix: str = "") -> nn.Module:
    """Gives a backbone its golden weights; `std` is that of tensors with more than one dimension."""
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            p.copy_(1 + det(prefix + name, p.shape, 0.1))
        else:
            p.copy_(det(prefix + name, p.shape, std if p.ndim > 1 else 0.05))
    return model


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return rebuild(VisionTransformer(embed_dim=768, depth=2, num_heads=12, num_classes=10).double().eval(), 0.02)


IMAGES = det("input", (2, 3, 224, 224), 1.0)
COTANGENT = det("cotangent", (2, 10), 1.0)


def assert_gradient(grad: Tensor, expected: dict[str, float], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(grad.norm().item(), expected["grad_norm"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.sum().item(), expected["grad_sum"], rtol=tolerance, atol=tolerance)


def assert_logits(logits: Tensor, expected: list[list[float]], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


def test_backbone_is_rebuilt(vit: VisionTransformer) -> None:
    assert_logits(vit(IMAGES), golden("backbone")["logits"])


def test_fact_tt_agrees(vit: VisionTransformer) -> None:
    expected = golden("fact_tt")
    r, tensors = expected["rank"], expected["tensors"]
    values = {name: det(name, tuple(t["shape"]), expected["std"]) for name, t in tensors.items()}
    model = pt.adapt(vit, pt.FacT(rank=r, scale=expected["scale"]))
    plugin = model.plugins[0]
    names, cores = [], []
    for block in range(2):
        prefix = f"fact_tt.blocks.{block}."
        for role, count, dim in [
            *((f"attn.{m}", 1, 0) for m in ("q", "k", "v", "proj")),
            ("mlp.fc1", 4, 0),
            ("mlp.fc2", 4, 1),
        ]:
            name = f"{prefix}{role}_FacTs.weight"
            names.append((name, count, dim))
            # the authors keep linear weights, y = z S^T; ours are the row convention, y = z S
            cores += [piece.T for piece in values[name].chunk(count, dim)]
    with torch.no_grad():
        plugin.core["768"].copy_(torch.stack(cores))
        plugin.u["768"].copy_(values["fact_tt.FacTu.weight"])
        plugin.v["768"].copy_(values["fact_tt.FacTv.weight"])
    logits = model(IMAGES)
    assert_logits(logits, expected["logits"])
    (logits * COTANGENT).sum().backward()
    assert_gradient(plugin.u["768"].grad, tensors["fact_tt.FacTu.weight"])
    assert_gradient(plugin.v["768"].grad, tensors["fact_tt.FacTv.weight"])
    first = 0
    for name, count, _ in names:
        assert_gradient(plugin.core["768"].grad[first : first + count], tensors[name])
        first += count


def test_fact_tk_agrees(vit: VisionTransformer) -> None:
    expected = golden("fact_tk_attention")
    tensors, std = expected["tensors"], expected["std"]
    mix = det("fact_tk.FacTp", (8, 144), std)
    for block in range(12):
        mix[:, 12 * block + 4 : 12 * block + 12] = 0
    # the gradient of the unused MLP columns tells the layouts apart: the authors' is `reference`
    model = pt.adapt(vit, pt.FacT(rank=8, form="tk", scale=expected["scale"], layout="reference"))
    plugin = model.plugins[0]
    with torch.no_grad():
        plugin.mix["768"].copy_(mix[:, :24])
        plugin.core["768"].copy_(det("fact_tk.FacTc", (8, 8, 8), std))
        plugin.u["768"].copy_(det("fact_tk.FacTu.weight", (8, 768), std))
        plugin.v["768"].copy_(det("fact_tk.FacTv.weight", (768, 8), std))
    logits = model(IMAGES)
    assert_logits(logits, expected["logits"])
    (logits * COTANGENT).sum().backward()
    for name, p in (
        ("FacTp", plugin.mix),
        ("FacTc", plugin.core),
        ("FacTu.weight", plugin.u),
        ("FacTv.weight", plugin.v),
    ):
        assert_gradient(p["768"].grad, tensors[f"fact_tk.{name}"])


def convpass_tensors(plugin: pt.Convpass, method: str) -> dict[str, Tensor]:
    """The plugin's parameters by the authors' names."""
    named = {}
    for i, site in enumerate(plugin.sites):
        block, _, role = site.name.rpartition(".")
        prefix = f"{method}.{block}.adapter_{role}.adapter_"
        for part, weight, bias in (
            ("down", plugin.down.weight, plugin.down.bias),
            ("conv", plugin.conv, plugin.conv_bias),
            ("up", plugin.up.weight, plugin.up.bias),
        ):
            named[f"{prefix}{part}.weight"], named[f"{prefix}{part}.bias"] = weight[i], bias[i]
    return named


@pytest.mark.parametrize(("name", "roles"), [("convpass", ("attn", "mlp")), ("convpass_attn", ("attn",))])
def test_convpass_agrees(vit: VisionTransformer, name: str, roles: tuple[str, ...]) -> None:
    expected = golden(name)
    model = pt.adapt(vit, pt.Convpass(dim=expected["dim"], roles=roles, scale=expected["scale"]))
    tensors = convpass_tensors(model.plugins[0], name)
    assert {n: t.numel() for n, t in tensors.items()} == {n: math.prod(shape_of(expected, n)) for n in tensors}
    with torch.no_grad():
        for n, tensor in tensors.items():
            tensor.copy_(det(n, shape_of(expected, n), expected["std"]).reshape(tensor.shape))
    logits = model(IMAGES)
    assert_logits(logits, expected["logits"])
    (logits * COTANGENT).sum().backward()
    for n, tensor in tensors.items():
        assert_gradient(tensor.grad, expected["tensors"][n])


def shape_of(expected: dict[str, Any], name: str) -> tuple[int, ...]:
    return tuple(expected["tensors"][name]["shape"])


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("method", ["bi_adaptformer", "bi_lora"])
def test_quantised_plugin_agrees(vit: VisionTransformer, method: str, bits: int) -> None:
    expected = golden(f"{method}_{bits}bit")
    if method == "bi_lora":
        plugin: Any = pt.LoRA(rank=expected["dim"], scale=expected["scale"], bits=bits)
        places = {f"attn.lora_{role}.adapter_{part}.weight": (role, part) for role in "qv" for part in ("down", "up")}
    else:
        plugin = pt.AdaptFormer(dim=expected["dim"], scale=expected["scale"], bias=False, bits=bits)
        places = {f"adapter_mlp.adapter_{part}.weight": ("mlp", part) for part in ("down", "up")}
    model = pt.adapt(vit, plugin)
    index = {site.name: i for i, site in enumerate(plugin.sites)}
    latent = {}
    for block in range(2):
        for name, (role, part) in places.items():
            place = f"blocks.{block}.{'mlp' if role == 'mlp' else f'attn.{role}'}"
            weights = getattr(plugin, part)
            weights = weights if method == "bi_lora" else weights.weight
            latent[f"{method}.blocks.{block}.{name}"] = weights.get_parameter(str(index[place]))
    assert latent.keys() == expected["tensors"].keys()
    with torch.no_grad():
        for name, tensor in latent.items():
            tensor.copy_(det(name, tensor.shape, expected["std"]) + expected["mean"])
    logits = model(IMAGES)
    assert_logits(logits, expected["logits"], 1e-6)
    (logits * COTANGENT).sum().backward()
    for name, tensor in latent.items():
        assert_gradient(tensor.grad, expected["tensors"][name], 1e-6)


def test_one_bit_head_agrees(vit: VisionTransformer) -> None:
    expected = golden("bihead")
    model = pt.adapt(vit, pt.Linear(), classes=list("0123456789"), head_bits=1)
    (latent,) = model.head.parameters()
    with torch.no_grad():
        latent.copy_(det("bihead.weight", latent.shape, expected["std"]) + expected["mean"])
    logits = model(IMAGES)
    assert_logits(logits, expected["logits"], 1e-6)
    (logits * COTANGENT).sum().backward()
    assert_gradient(latent.grad, expected["tensors"]["bihead.weight"], 1e-6)


@pytest.mark.parametrize("budget", [0, 8, 16, (8, -1)], ids=str)
def test_merged_vit_agrees(budget: Any) -> None:
    expected = golden("tome_vit")
    name = "(8, -1.0)" if budget == (8, -1) else str(budget)
    settings = {"embed_dim": 768, "depth": expected["depth"], "num_heads": 12, "num_classes": 10}
    model = pt.adapt(rebuild(VisionTransformer(**settings).double().eval(), 0.02), pt.ToMe(budget=budget))
    assert_logits(model(IMAGES), expected["logits"][name], 1e-6)


@pytest.mark.parametrize("pair", golden("tocom")["logits"])
def test_compensated_vit_agrees(pair: str) -> None:
    expected = golden("tocom")
    target, source = (int(part.partition("=")[2]) for part in pair.split(","))
    settings = {"embed_dim": 768, "depth": expected["depth"], "num_heads": 12, "num_classes": 10}
    backbone = rebuild(VisionTransformer(**settings).double().eval(), 0.02)
    groups = expected["groups"]
    plugin = pt.ToCom(
        groups=groups, dim=expected["dim"] // groups, source=source, target=target, scale=expected["scale"]
    )
    model = pt.adapt(backbone, plugin, pt.ToMe(budget=target), prove=False)
    with torch.no_grad():
        for i, site in enumerate(plugin.sites):
            for part, weights in (("down", plugin.down), ("up", plugin.up)):
                name = f"tocom.{site.name}_tocom.adapter_{part}.weight"
                assert name in expected["tensors"]
                weights[i].copy_(det(name, weights[i].shape, expected["std"]))
    assert_logits(model(IMAGES), expected["logits"][pair], 1e-6)


@pytest.fixture(scope="module")
def swin() -> SwinTransformer:
    expected = golden("convpass_swin")
    model = SwinTransformer(**expected["config"]).double().eval()
    assert {n: list(p.shape) for n, p in model.named_parameters()} == expected["parameters"]
    return rebuild(model, expected["std_backbone"], "swin.")


SMALL_IMAGES = det("swin.input", (2, 3, 112, 112), 1.0)


@pytest.mark.parametrize(("name", "roles"), [("convpass", ("attn", "mlp")), ("convpass_attn", ("attn",))])
def test_convpass_on_swin_agrees(swin: SwinTransformer, name: str, roles: tuple[str, ...]) -> None:
    expected = golden("convpass_swin")
    model = pt.adapt(swin, pt.Convpass(dim=expected["dim"], roles=roles, scale=expected["scale"]))
    tensors = convpass_tensors(model.plugins[0], f"swin.{name}")
    shapes = expected["logits"][f"{name}_tensors"]
    assert {n: t.numel() for n, t in tensors.items()} == {n: math.prod(shape) for n, shape in shapes.items()}
    with torch.no_grad():
        for n, tensor in tensors.items():
            tensor.copy_(det(n, tuple(shapes[n]), expected["std_plugin"]).reshape(tensor.shape))
    assert_logits(swin(SMALL_IMAGES), expected["logits"]["plain"])
    assert_logits(model(SMALL_IMAGES), expected["logits"][name])
