"""Checkpoints go to PEFT and come from it: logits are compared with those of PEFT itself."""

import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import petiole as pt
from models import MODELS, WIDTH
from petiole.peft import export_peft, import_peft
from petiole.peft.checkpoint import _INERT

peft = pytest.importorskip("peft")

# PEFT asks transformers models for it
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAMES = ["a", "b", "c", "d"]
ROLES = ("q", "k", "v", "proj", "fc1", "fc2")
DEPTH = 2
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PLUGINS: dict[str, Callable[[], list[pt.FacT]]] = {
    "lora": lambda: [pt.LoRA(rank=3, scale=0.5)],
    "lora-all": lambda: [pt.LoRA(rank=2, roles=ROLES, scale=2.0)],
    "lora-1bit": lambda: [pt.LoRA(rank=3, bits=1)],
    "fact-tt": lambda: [pt.FacT(rank=3, scale=0.5)],
    "fact-tk-paper": lambda: [pt.FacT(rank=3, form="tk")],
    "fact-tk-reference": lambda: [pt.FacT(rank=3, form="tk", layout="reference", scale=2.0)],
    "fact-4bit": lambda: [pt.FacT(rank=3, roles=("q", "v", "fc2"), bits=4)],
    "two": lambda: [pt.LoRA(rank=2), pt.FacT(rank=3, scale=0.5)],
    "two-of-one": lambda: [pt.LoRA(rank=2), pt.LoRA(rank=1, roles=("q", "fc1")), pt.Linear()],
}
HOSTS = [
    "deit_distilled",
    "dinov2_swiglu",
    "eva02_base",
    "eva_gqa",
    "hf_vit",
    "hf_dinov2",
    "hf_clip_classifier",
    "swin",
]


@torch.no_grad()
def adapted(
    host: str,
    *plugins: pt.FacT,
    head_bits: int = 32,
    classes: list[str] | None = NAMES,
    dtype: torch.dtype = torch.float32,
) -> pt.Adapted:
    """A model whose trained tensors are random, as if trained."""
    model = pt.adapt(MODELS[host]().to(dtype), *plugins, classes=classes, head_bits=head_bits).eval()
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.trained():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def fresh(host: str, num_classes: int = len(NAMES)) -> nn.Module:
    """The same backbone as its user builds it, with another random classifier."""
    backbone = MODELS[host]()
    view = pt.adapt(backbone, prove=False).view
    view.set_head(backbone, nn.Linear(view.num_features(backbone), num_classes))
    return backbone.eval()


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """What a model answers, of whichever library."""
    answer = model(images)
    return getattr(answer, "logits", answer)


def probe(model: pt.Adapted) -> Tensor:
    return model.view.probe(model.backbone)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    # the bar is absolute; where logits are larger, so is their rounding
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def unwrapped(model: nn.Module) -> nn.Module:
    """The backbone inside a model of PEFT, without what PEFT put there."""
    return copy.deepcopy(model).unload()


def changed(folder: Path, out: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of a checkpoint with other settings, or tensors by the end of their name; None takes one out."""
    out.mkdir()
    settings = json.loads((folder / CONFIG).read_text(encoding="utf8"))
    (out / CONFIG).write_text(json.dumps(settings | (config or {})), encoding="utf8")
    kept = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        kept.pop(f"base_model.model.{name}", None)
        if tensor is not None:
            kept[f"base_model.model.{name}"] = tensor
    save_file(kept, out / WEIGHTS)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported checkpoint of LoRA on the fused qkv."""
    return export_peft(adapted("vit", pt.LoRA(rank=3)), tmp_path / "lora")


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[..., tuple[nn.Module, Path]]:
    """Makes a random checkpoint with PEFT: its model in eval mode, and the folder."""

    def make(host: str = "vit", **settings: Any) -> tuple[nn.Module, Path]:
        torch.manual_seed(3)
        model = peft.get_peft_model(fresh(host), peft.LoraConfig(**{"init_lora_weights": False, **settings})).eval()
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return make


@pytest.mark.parametrize("name", PLUGINS)
def test_peft_gives_the_logits_of_the_exported_model(name: str, tmp_path: Path) -> None:
    model = adapted("vit", *PLUGINS[name]())
    loaded = peft.PeftModel.from_pretrained(fresh("vit"), export_peft(model, tmp_path / "out")).eval()
    assert_same(logits(loaded, probe(model)), logits(model, probe(model)))
    assert not torch.allclose(logits(fresh("vit"), probe(model)), logits(model, probe(model)), atol=1e-2)


@pytest.mark.parametrize("name", ["lora", "fact-tk-reference", "two"])
@pytest.mark.parametrize("host", HOSTS)
def test_every_host_with_linear_maps_is_exported_and_comes_back(host: str, name: str, tmp_path: Path) -> None:
    # in double precision, where rounding does not hide a wrong number
    model = adapted(host, *PLUGINS[name](), dtype=torch.float64)
    out = export_peft(model, tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(fresh(host).double(), out).eval()
    assert_same(logits(loaded, probe(model)), logits(model, probe(model)), 1e-13)
    assert_same(logits(import_peft(out, MODELS[host]().double()), probe(model)), logits(model, probe(model)), 1e-13)


@pytest.mark.parametrize("bits", [1, 4])
def test_head_of_few_bits_is_exported_as_what_it_stands_for(bits: int, tmp_path: Path) -> None:
    model = adapted("vit", pt.LoRA(rank=3, bits=bits), head_bits=bits)
    out = export_peft(model, tmp_path / "out")
    head = load_file(out / WEIGHTS)["base_model.model.head.weight"]
    assert len(head.unique()) <= 2**bits
    loaded = peft.PeftModel.from_pretrained(fresh("vit"), out).eval()
    assert_same(logits(loaded, probe(model)), logits(model, probe(model)))


def test_model_with_the_backbones_own_classifier_is_exported_without_a_head(tmp_path: Path) -> None:
    model = adapted("vit", pt.LoRA(rank=3), classes=None)
    out = export_peft(model, tmp_path / "out")
    assert json.loads((out / CONFIG).read_text(encoding="utf8"))["modules_to_save"] is None
    loaded = peft.PeftModel.from_pretrained(MODELS["vit"](), out).eval()
    assert_same(logits(loaded, probe(model)), logits(model, probe(model)))
    again = import_peft(out, MODELS["vit"]())
    assert again.head is None
    assert_same(logits(again, probe(model)), logits(model, probe(model)))


def test_several_checkpoints_are_switched_and_merged_by_peft(tmp_path: Path) -> None:
    first, second = adapted("vit", pt.LoRA(rank=3)), adapted("vit", pt.FacT(rank=2))
    loaded = peft.PeftModel.from_pretrained(fresh("vit"), export_peft(first, tmp_path / "a"), adapter_name="first")
    found = loaded.load_adapter(export_peft(second, tmp_path / "b"), adapter_name="second")
    assert not [key for key in found.missing_keys if "second" in key]
    assert not found.unexpected_keys
    for name, model in (("second", second), ("first", first)):
        loaded.set_adapter(name)
        assert_same(logits(loaded.eval(), probe(model)), logits(model, probe(model)))
    assert_same(logits(loaded.merge_and_unload(), probe(first)), logits(first, probe(first)), 2e-6)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        # per layer: (d_in + d_out) * rank, of qkv, proj, fc1, fc2
        ("fact-tt", 3 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)) * WIDTH),
        ("fact-tk-paper", 3 * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)) * WIDTH),
        ("lora", 2 * 3 * (1 + 3) * WIDTH),
        ("lora-all", 2 * (3 * (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)) * WIDTH),
    ],
)
def test_size_is_that_of_the_formula(name: str, numbers: int, tmp_path: Path) -> None:
    tensors = load_file(export_peft(adapted("vit", *PLUGINS[name]()), tmp_path / "out") / WEIGHTS)
    assert sum(t.numel() for key, t in tensors.items() if "lora_" in key) == DEPTH * numbers


def test_fact_on_a_fused_map_has_its_own_rank(tmp_path: Path) -> None:
    tensors = load_file(export_peft(adapted("vit", pt.FacT(rank=5)), tmp_path / "out") / WEIGHTS)
    assert tensors["base_model.model.blocks.0.attn.qkv.lora_A.weight"].shape == (5, WIDTH)
    assert tensors["base_model.model.blocks.0.attn.qkv.lora_B.weight"].shape == (3 * WIDTH, 5)


def test_names_hit_whole_modules_only(tmp_path: Path) -> None:
    model = adapted("vit", pt.LoRA(rank=2, roles=("proj", "q", "v")))
    out = export_peft(model, tmp_path / "out")
    config = json.loads((out / CONFIG).read_text(encoding="utf8"))
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 4, True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {rf"^blocks\.{i}\.attn\.proj": 2 for i in range(DEPTH)}
    loaded = peft.PeftModel.from_pretrained(fresh("vit"), out)
    hit = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert hit == {f"blocks.{i}.attn.{part}" for i in range(DEPTH) for part in ("qkv", "proj")}


def test_checkpoint_says_where_it_comes_from(tmp_path: Path) -> None:
    model = adapted("vit", pt.LoRA(rank=2), pt.FacT(rank=3))
    out = export_peft(model, tmp_path / "out")
    with safe_open(out / WEIGHTS, framework="pt") as file:
        info = json.loads(file.metadata()["petiole"])
    assert info["classes"] == NAMES
    assert info["petiole"] == pt.__version__
    assert [plugin["method"] for plugin in info["plugins"]] == ["lora", "fact"]
    assert info["plugins"][1]["settings"]["rank"] == 3
    config = json.loads((out / CONFIG).read_text(encoding="utf8"))
    assert config["base_model_name_or_path"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    text = (out / "README.md").read_text(encoding="utf8")
    assert 'timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k", pretrained=True, num_classes=4)' in text
    assert "2. c" in text


@pytest.mark.parametrize(
    ("host", "given", "expected", "line"),
    [
        ("vit", "me/mine", "me/mine", "backbone = ...  # me/mine, a timm.models.vision_transformer.VisionTransformer"),
        ("hf_vit", None, None, "backbone = ...  # ViTForImageClassification, a transformers.models.vit"),
        ("hf_vit", "me/vit", "me/vit", 'ViTForImageClassification.from_pretrained("me/vit", num_labels=4, ignore'),
    ],
)
def test_base_model_is_named_as_far_as_it_is_known(
    host: str, given: str | None, expected: str | None, line: str, tmp_path: Path
) -> None:
    out = export_peft(adapted(host, pt.LoRA(rank=2)), tmp_path / "out", base_model=given)
    assert json.loads((out / CONFIG).read_text(encoding="utf8"))["base_model_name_or_path"] == expected
    assert line in (out / "README.md").read_text(encoding="utf8")


def test_export_replaces_an_earlier_one_and_leaves_the_model_as_it_is(folder: Path) -> None:
    model = adapted("vit", pt.FacT(rank=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    export_peft(model, folder)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = peft.PeftModel.from_pretrained(fresh("vit"), folder).eval()
    assert_same(logits(loaded, probe(model)), logits(model.eval(), probe(model)))


def test_backbone_of_half_precision_gets_factors_of_full_precision(tmp_path: Path) -> None:
    backbone = MODELS["vit"]().to(torch.bfloat16)
    model = pt.adapt(backbone, pt.LoRA(rank=2, scale=0.3), classes=NAMES).eval()
    tensors = load_file(export_peft(model, tmp_path / "out") / WEIGHTS)
    assert {t.dtype for key, t in tensors.items() if "lora_" in key} == {torch.float32}
    assert tensors["base_model.model.head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (pt.Convpass, "Convpass cannot be written as PEFT's LoRA: it is not a linear change"),
        (pt.AdaptFormer, "AdaptFormer cannot be written as PEFT's LoRA: it is not a linear change"),
        (pt.Adapter, "Adapter cannot be written as PEFT's LoRA: it is not a linear change"),
        (pt.VPT, "VPT cannot be written as PEFT's LoRA: it is not a linear change"),
        (pt.SSF, "SSF cannot be written as PEFT's LoRA: its change of weights and biases is no product"),
        (pt.RepAdapter, "RepAdapter cannot be written as PEFT's LoRA: its change of weights and biases is no product"),
        (pt.BitFit, "BitFit cannot be written as PEFT's LoRA: it trains tensors of the backbone itself"),
        (pt.LayerNorm, "LayerNorm cannot be written as PEFT's LoRA: it trains tensors of the backbone itself"),
        (pt.Full, "Full cannot be written as PEFT's LoRA: it trains tensors of the backbone itself"),
        (pt.Linear, "no LoRA and no FacT"),
    ],
)
def test_plugin_that_is_no_low_rank_change_is_refused(plugin: Any, message: str, tmp_path: Path) -> None:
    plugins = [plugin()] if plugin is pt.Linear else [pt.LoRA(rank=2), plugin()]
    with pytest.raises(pt.PluginFileError, match=re.escape(message)):
        export_peft(adapted("vit", *plugins), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("host", "roles", "message"),
    [
        (
            "torchvision",
            ("q",),
            "attn.q cannot be written .* belongs to a MultiheadAttention.*petiole merge",
        ),
        ("torchvision", ("proj",), "cannot change .*out_proj: .* never calls the module.*petiole merge"),
        ("beit", ("q", "v"), r"cannot change blocks\.0\.attn\.qkv: .* never calls the module.*petiole merge"),
    ],
)
def test_map_that_peft_cannot_change_is_refused(host: str, roles: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(pt.PluginFileError, match=message):
        export_peft(adapted(host, pt.LoRA(rank=2, roles=roles)), tmp_path / "out")


@pytest.mark.parametrize("host", ["torchvision", "beit"])
def test_other_maps_of_such_a_host_are_exported(host: str, tmp_path: Path) -> None:
    model = adapted(host, pt.LoRA(rank=2, roles=("fc1", "fc2")))
    loaded = peft.PeftModel.from_pretrained(fresh(host), export_peft(model, tmp_path / "out")).eval()
    assert_same(logits(loaded, probe(model)), logits(model, probe(model)))


def test_head_needs_a_class_with_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(pt.MergeError, match="load the backbone as ViTForImageClassification"):
        export_peft(adapted("hf_vit_bare", pt.LoRA(rank=2)), tmp_path / "out")


def test_export_wants_an_adapted_model_and_a_place(tmp_path: Path) -> None:
    with pytest.raises(pt.PluginFileError, match=r"takes what petiole\.adapt returned, got Linear"):
        export_peft(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(pt.PluginFileError, match="cannot be made"):
        export_peft(adapted("vit", pt.LoRA(rank=2)), tmp_path / "absent" / "out")


@pytest.mark.parametrize("name", PLUGINS)
def test_exported_model_comes_back(name: str, tmp_path: Path) -> None:
    model = adapted("vit", *PLUGINS[name](), head_bits=1)
    again = import_peft(export_peft(model, tmp_path / "out"), MODELS["vit"]())
    assert again.classes == tuple(NAMES)
    assert again.input_config == model.input_config
    assert not again.training
    assert_same(logits(again, probe(model)), logits(model, probe(model)))


def test_lora_comes_back_with_its_rank_and_roles(folder: Path) -> None:
    (plugin,) = import_peft(folder, MODELS["vit"]()).plugins
    assert (plugin.rank, plugin.roles, plugin.scale) == (3, ("q", "v"), 1.0)


QKV, PROJ, FC1 = ["qkv"], ["attn.qkv", "attn.proj"], ["blocks.1.mlp.fc1", "blocks.0.attn.qkv"]


@pytest.mark.parametrize(
    ("host", "settings"),
    [
        ("vit", {"r": 4, "lora_alpha": 6, "target_modules": QKV}),
        ("vit", {"r": 4, "lora_alpha": 6, "target_modules": QKV, "use_rslora": True, "lora_dropout": 0.2}),
        ("vit", {"r": 2, "target_modules": PROJ, "rank_pattern": {"proj": 5}, "alpha_pattern": {r"1\.attn\.\w+": 3}}),
        ("vit", {"r": 2, "target_modules": PROJ, "rank_pattern": {r"^blocks\.0\.attn\.qkv": 7}, "use_rslora": True}),
        ("vit", {"r": 3, "target_modules": FC1}),
        ("vit", {"r": 4, "target_modules": r"blocks\.\d\.(attn\.proj|mlp\.fc\d)", "init_lora_weights": "orthogonal"}),
        ("eva02_base", {"r": 3, "target_modules": ["q_proj", "v_proj", "fc1_x"], "rank_pattern": {"v_proj": 5}}),
        ("hf_vit", {"r": 3, "target_modules": ["q_proj", "k_proj", "mlp.fc2"]}),
        ("swin", {"r": 3, "target_modules": ["qkv", "fc2"]}),
    ],
)
@pytest.mark.parametrize("has_head", [True, False], ids=["head", "no-head"])
def test_checkpoint_of_peft_gives_its_logits(host: str, settings: dict[str, Any], has_head: bool, theirs: Any) -> None:
    head = {"hf_vit": "classifier", "swin": "head.fc"}.get(host, "head")
    model, out = theirs(host, **settings, modules_to_save=[head] if has_head else None)
    # with a head the backbone's own classifier has no say, without one it answers
    found = import_peft(out, MODELS[host]() if has_head else unwrapped(model))
    assert_same(logits(found, probe(found)), logits(model, probe(found)))
    assert found.classes == (("0", "1", "2", "3") if has_head else None)
    assert found.plugins[0].dropout == settings.get("lora_dropout", 0.0)


def test_classes_may_be_given(theirs: Any) -> None:
    _, out = theirs(target_modules=["qkv"], modules_to_save=["head"])
    assert import_peft(out, MODELS["vit"](), classes=["w", "x", "y", "z"]).classes == ("w", "x", "y", "z")
    with pytest.raises(pt.PluginFileError, match="a head of 4 classes, got 2 class names"):
        import_peft(out, MODELS["vit"](), classes=["w", "x"])


def test_classes_without_a_head_are_refused(theirs: Any) -> None:
    _, out = theirs(target_modules=["qkv"])
    with pytest.raises(pt.PluginFileError, match="brings no head for 2 classes: leave `classes` out"):
        import_peft(out, MODELS["vit"](), classes=["w", "x"])


def test_what_was_not_trained_yet_keeps_its_rank_and_can_be_trained(theirs: Any) -> None:
    _, out = theirs(r=5, target_modules=["qkv"], init_lora_weights=True)
    model = import_peft(out, MODELS["vit"]())
    assert (model.plugins[0].rank, model.plugins[0].roles) == (5, ("q", "k", "v"))
    assert_same(logits(model, probe(model)), logits(MODELS["vit"](), probe(model)), 0)


def test_what_fills_up_changes_nothing_and_can_be_trained(theirs: Any) -> None:
    _, out = theirs(r=2, target_modules=FC1, rank_pattern={"fc1": 4})
    model = import_peft(out, MODELS["vit"]())
    plugin = model.plugins[0]
    absent = [i for i, site in enumerate(plugin.sites) if site.name in ("blocks.0.mlp.fc1", "blocks.1.attn.q")]
    assert all(not plugin.up[i].any() and plugin.down[i].all() for i in absent)
    model(probe(model)).square().sum().backward()
    assert all(plugin.up[i].grad.any() for i in absent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "PEFT checkpoint of type 'LOHA': petiole reads LORA"),
        ({"use_dora": True}, "sets use_dora to True"),
        ({"lora_bias": True}, "sets lora_bias to True"),
        ({"target_parameters": ["head.weight"]}, "sets target_parameters"),
        ({"something_new": 1}, "sets something_new to 1"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4', which changes the backbone's"),
        ({"r": 5, "rank_pattern": {}}, "has rank 6 in the weights and 5 in the config"),
        ({"rank_pattern": {"(": 3}}, "r in adapter_config.json, or its pattern, is malformed"),
        ({"lora_alpha": "much"}, "lora_alpha in adapter_config.json, or its pattern, is malformed"),
        ({"lora_dropout": "some"}, "lora_dropout in adapter_config.json"),
    ],
)
def test_other_settings_are_refused(settings: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(pt.PluginFileError, match=re.escape(message)):
        import_peft(changed(folder, tmp_path / "out", settings), MODELS["vit"]())


A, B = "blocks.0.attn.qkv.lora_A.weight", "blocks.0.attn.qkv.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({B: None}, "blocks.0.attn.qkv needs lora_A [r, d_in] and lora_B [d_out, r], found [6, 32] and nothing"),
        ({A: None}, "blocks.0.attn.qkv has lora_B without lora_A"),
        ({A: torch.zeros(5, WIDTH)}, "found [5, 32] and [96, 6]"),
        ({A: torch.zeros(6, 3, 8, 8)}, "petiole reads LoRA of linear modules"),
        ({A: torch.full((6, WIDTH), math.nan)}, "is not finite everywhere"),
        ({A: torch.zeros(6, 16)}, "blocks.0.attn.qkv maps 16 to 96 there, 32 to 96 in this VisionTransformer"),
        ({"blocks.0.attn.qkv.lora_magnitude_vector": torch.zeros(4)}, "which plain LoRA does not have"),
        ({"blocks.0.attn.qkv.lora_B.bias": torch.zeros(96)}, "which plain LoRA does not have"),
        ({"norm.weight": torch.zeros(32)}, "trained norm as a whole: besides LoRA, petiole reads a head, here head"),
        ({"head.weight": torch.zeros(4, 16)}, "its head should be of the backbone's width 32"),
        ({"head.bias": torch.zeros(3)}, "its head should be of the backbone's width 32"),
        ({"head.weight": None, "head.bias": None}, "its config saves ['head'], its weights hold none of them"),
    ],
)
def test_other_tensors_are_refused(tensors: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(pt.PluginFileError, match=re.escape(message)):
        import_peft(changed(folder, tmp_path / "out", **tensors), MODELS["vit"]())


@pytest.mark.parametrize("name", ["patch_embed.proj", "head", "blocks.7.attn.qkv"])
def test_module_that_is_no_linear_site_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    pair = {f"{name}.lora_A.weight": torch.ones(6, 32), f"{name}.lora_B.weight": torch.ones(32, 6)}
    with pytest.raises(pt.PluginFileError, match=f"changes {name}, which is no linear map of this VisionTransformer"):
        import_peft(changed(folder, tmp_path / "out", **pair), MODELS["vit"]())


def test_change_that_peft_itself_loses_is_refused(theirs: Any) -> None:
    model, out = theirs("beit", target_modules=["qkv"])
    found = pt.adapt(fresh("beit"), prove=False)
    assert torch.equal(logits(model, probe(found)), logits(unwrapped(model), probe(found)))
    with pytest.raises(pt.PluginFileError, match=r"never calls the module.*Its training had no effect"):
        import_peft(out, MODELS["beit"]())


def test_heads_that_differ_are_refused(tmp_path: Path) -> None:
    out = export_peft(adapted("deit_distilled", pt.LoRA(rank=3)), tmp_path / "a")
    other = changed(out, tmp_path / "b", **{"head_dist.bias": torch.ones(4)})
    with pytest.raises(pt.PluginFileError, match="several heads with different weights"):
        import_peft(other, MODELS["deit_distilled"]())


def test_head_without_a_bias_has_a_bias_of_zero(folder: Path, tmp_path: Path) -> None:
    model = import_peft(changed(folder, tmp_path / "out", **{"head.bias": None}), MODELS["vit"]())
    assert not model.head.bias.any()


def test_head_on_a_class_without_a_classifier_is_refused(tmp_path: Path) -> None:
    out = export_peft(adapted("hf_vit_bare", pt.LoRA(rank=2), classes=None), tmp_path / "a")
    other = changed(out, tmp_path / "b", **{"classifier.weight": torch.zeros(4, 24)})
    with pytest.raises(pt.PluginFileError, match="brings a head, but ViTModel has no classifier"):
        import_peft(other, MODELS["hf_vit_bare"]())


def test_other_weights_than_those_it_was_written_for_are_refused(folder: Path) -> None:
    other = MODELS["vit"]()
    with torch.no_grad():
        other.norm.weight.add_(1)
    with pytest.raises(pt.PluginFileError, match="was written for vit_tiny_patch16_224 with the fingerprint"):
        import_peft(folder, other)


def test_missing_and_foreign_files_are_told_apart(folder: Path, tmp_path: Path) -> None:
    backbone = MODELS["vit"]()
    with pytest.raises(pt.PluginFileError, match="is no folder: download the checkpoint first"):
        import_peft("someone/something", backbone)
    (folder / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(pt.PluginFileError, match="cannot be read"):
        import_peft(folder, backbone)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(pt.PluginFileError, match=r"a pickle adapter_model\.bin, which petiole never opens"):
        import_peft(folder, backbone)
    (folder / CONFIG).write_text("{", encoding="utf8")
    with pytest.raises(pt.PluginFileError, match="is no JSON"):
        import_peft(folder, backbone)
    (folder / CONFIG).unlink()
    with pytest.raises(pt.PluginFileError, match=f"has no {CONFIG}"):
        import_peft(folder, backbone)


def test_checkpoint_without_lora_is_refused(folder: Path, tmp_path: Path) -> None:
    pairs = {name.removeprefix("base_model.model."): None for name in load_file(folder / WEIGHTS) if "lora_" in name}
    with pytest.raises(pt.PluginFileError, match="holds no LoRA at all"):
        import_peft(changed(folder, tmp_path / "out", **pairs), MODELS["vit"]())


def test_malformed_provenance_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS, metadata={"petiole": "[]"})
    with pytest.raises(pt.PluginFileError, match="what petiole wrote into it is malformed"):
        import_peft(folder, MODELS["vit"]())


def test_every_setting_of_peft_is_known_as_inert_or_empty_by_default() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields >= _INERT
    assert not [name for name, value in peft.LoraConfig().to_dict().items() if value and name not in _INERT]


@pytest.mark.slow
def test_neither_direction_imports_peft() -> None:
    code = "import petiole.peft.exchange, sys; print('peft' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_code_for_peft_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "peft.md").read_text(encoding="utf8")
    blocks = re.findall(r"<!-- runnable(?:: peft)? -->\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks[:2]:
        exec(block, names)
    assert isinstance(names["model"], peft.PeftModel)
