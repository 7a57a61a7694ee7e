"""petiole's methods as tuners of PEFT, compared with petiole's own adapted model."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import petiole as pt
from models import MODELS
from petiole.plugins import method as default_plugin

peft = pytest.importorskip("peft")
bridge = pytest.importorskip("petiole.peft.bridge")

# PEFT asks transformers for a property that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fact-tt": ("FacT", {"rank": 4}),
    "fact-tk": ("FacT", {"rank": 4, "form": "tk", "scale": 2.0}),
    "fact-1bit": ("FacT", {"rank": 4, "bits": 1}),
    "convpass": ("Convpass", {"dim": 4}),
    "adaptformer": ("AdaptFormer", {"dim": 4}),
}
HEADS = {"vit": "head", "hf_vit": "classifier"}
every_method = pytest.mark.parametrize("name", METHODS)
every_host = pytest.mark.parametrize("host", HEADS)


def config(name: str, **more: Any) -> Any:
    method, settings = METHODS[name]
    return getattr(bridge, f"{method}Config")(**settings, **more)


def plugin(model: nn.Module, adapter: str = "default") -> nn.Module:
    return model.base_model.walk.adapters[adapter]


@torch.no_grad()
def fill(module: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))


def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    answer = model(images)
    return answer if isinstance(answer, Tensor) else answer.logits


def tuned(name: str, host: str = "vit", seed: int = 1) -> Any:
    """Returns a PEFT model in eval mode whose plugin and head are no longer fresh."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(MODELS[host](), config(name, modules_to_save=[HEADS[host]])).eval()
    fill(plugin(model), seed)
    fill(model.get_submodule(f"base_model.model.{HEADS[host]}.modules_to_save"), seed)
    return model


@every_host
@every_method
def test_logits_are_those_of_petioles_own_model_bit_for_bit(name: str, host: str) -> None:
    method, settings = METHODS[name]
    own = pt.adapt(MODELS[host](), getattr(pt, method)(**settings), prove=False)
    fill(own.plugins)
    model = peft.get_peft_model(MODELS[host](), config(name)).eval()
    plugin(model).load_state_dict(own.plugins[0].state_dict())
    assert torch.equal(logits(model), own(IMAGES))


@pytest.mark.parametrize("host", ["deit3", "vit_qk_norm", "beit", "swin", "hf_dinov2", "torchvision", "open_clip"])
def test_other_hosts_agree_too(host: str) -> None:
    own = pt.adapt(MODELS[host](), pt.Convpass(dim=4), prove=False)
    fill(own.plugins)
    model = peft.get_peft_model(MODELS[host](), config("convpass")).eval()
    plugin(model).load_state_dict(own.plugins[0].state_dict())
    assert torch.equal(logits(model), own(IMAGES))


def test_training_mode_draws_what_petiole_draws() -> None:
    own = pt.adapt(MODELS["vit"](), pt.Convpass(dim=4), prove=False).train()
    fill(own.plugins)
    model = peft.get_peft_model(MODELS["vit"](), config("convpass")).train()
    plugin(model).load_state_dict(own.plugins[0].state_dict())
    torch.manual_seed(2)
    expected = own(IMAGES)
    torch.manual_seed(2)
    assert torch.equal(logits(model), expected)


def test_grid_is_that_of_the_images_also_in_a_copy() -> None:
    own = pt.adapt(MODELS["vit_dynamic"](), pt.Convpass(dim=4), prove=False)
    fill(own.plugins)
    model = peft.get_peft_model(MODELS["vit_dynamic"](), config("convpass")).eval()
    plugin(model).load_state_dict(own.plugins[0].state_dict())
    for size in ((24, 40), (40, 24)):
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3))
        assert torch.equal(logits(copy.deepcopy(model), images), own(images))


@every_host
@every_method
def test_gradient_reaches_every_plugin_tensor_and_nothing_else_but_the_head(name: str, host: str) -> None:
    model = tuned(name, host)
    logits(model).square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    tensors = {f"base_model.{model.base_model.prefix}plugins.default.{n}" for n, _ in plugin(model).named_parameters()}
    head = {f"base_model.model.{HEADS[host]}.modules_to_save.default.{n}" for n in ("weight", "bias")}
    assert reached == tensors | head == {n for n, p in model.named_parameters() if p.requires_grad}


@every_host
@every_method
def test_saved_adapter_gives_equal_logits_under_any_name(name: str, host: str, tmp_path: Path) -> None:
    model = tuned(name, host)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MODELS[host](), tmp_path)
    assert torch.equal(logits(again), expected)
    second = peft.PeftModel.from_pretrained(MODELS[host](), tmp_path, adapter_name="second")
    assert torch.equal(logits(second), expected)
    found = second.load_adapter(tmp_path, "third")
    second.set_adapter("third")
    assert torch.equal(logits(second), expected)
    assert not found.missing_keys
    assert not found.unexpected_keys


def test_named_adapter_in_its_own_folder_comes_back_as_another(tmp_path: Path) -> None:
    model = tuned("convpass")
    model.add_adapter("birds", config("convpass", modules_to_save=["head"]))
    model.set_adapter("birds")
    fill(plugin(model, "birds"), seed=5)
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["birds"])
    again = peft.PeftModel.from_pretrained(MODELS["vit"](), tmp_path / "birds", adapter_name="default")
    assert torch.equal(logits(again), expected)


def test_file_holds_every_factor_once(tmp_path: Path) -> None:
    model = tuned("fact-tk")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    own = {f"base_model.fact_plugins.{name}.32" for name in ("u", "v", "core", "mix")}
    assert set(tensors) == own | {"base_model.model.head.weight", "base_model.model.head.bias"}
    assert sum(tensors[name].numel() for name in own) == 2 * 32 * 4 + 24 * 4 + 4**3
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "FACT"
    assert (settings["rank"], settings["form"], settings["scale"]) == (4, "tk", 2.0)


@every_method
def test_adapters_switch_and_are_switched_off(name: str) -> None:
    model, other = tuned(name), tuned(name, seed=7)
    first, second = logits(model), logits(other)
    model.add_adapter("other", config(name, modules_to_save=["head"]))
    state = peft.get_peft_model_state_dict(other)
    peft.set_peft_model_state_dict(model, state, adapter_name="other")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), second)
    assert not any(p.requires_grad for p in plugin(model).parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(MODELS["vit"]()))
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    model.delete_adapter("other")
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("other")
    assert torch.equal(logits(model), first)


def test_several_active_adapters_add_up() -> None:
    own = pt.adapt(MODELS["vit"](), pt.FacT(rank=4), pt.FacT(rank=2), prove=False)
    fill(own.plugins)
    model = peft.get_peft_model(MODELS["vit"](), config("fact-tt")).eval()
    model.add_adapter("other", bridge.FacTConfig(rank=2))
    for adapter, theirs in zip(("default", "other"), own.plugins, strict=True):
        plugin(model, adapter).load_state_dict(theirs.state_dict())
    model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(model), own(IMAGES))


@every_host
def test_fact_merges_and_unmerges_exactly(host: str) -> None:
    model = tuned("fact-tt", host)
    expected, before = logits(model), copy.deepcopy(model.get_base_model().state_dict())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    plain = model.merge_and_unload()
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)
    assert set(plain.state_dict()) == set(MODELS[host]().state_dict())
    assert not any(module._forward_hooks for module in plain.modules())


def test_what_is_not_linear_does_not_merge_and_unloads() -> None:
    model = tuned("convpass")
    with pytest.raises(pt.MergeError, match="Convpass cannot be merged"):
        model.merge_and_unload()
    plain = peft.get_peft_model(MODELS["vit"](), config("convpass")).eval().unload()
    assert torch.equal(logits(plain), logits(MODELS["vit"]()))


def test_copies_and_pickles_are_models_of_their_own() -> None:
    model = tuned("fact-tt")
    expected, file = logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), expected)
        fill(plugin(other), seed=9)
        assert not torch.equal(logits(other), expected)
    assert torch.equal(logits(model), expected)


def test_host_keeps_its_other_entrances_and_outputs() -> None:
    vit = tuned("convpass")
    pooled = vit.forward_head(vit.forward_features(IMAGES))
    assert torch.equal(pooled, logits(vit))
    answer = tuned("convpass", "hf_vit")(pixel_values=IMAGES, labels=torch.tensor([0, 1]))
    expected = nn.functional.cross_entropy(answer.logits, torch.tensor([0, 1]))
    torch.testing.assert_close(answer.loss, expected)


def test_gradient_checkpointing_of_transformers_gives_equal_gradients() -> None:
    grads, calls = [], []
    for is_on in (False, True):
        model = tuned("fact-tt", "hf_vit").train()
        if is_on:
            model.get_base_model().gradient_checkpointing_enable()
        first = model.get_base_model().vit.layers[0]
        first.layernorm_before.register_forward_hook(lambda *_, at=is_on: calls.append(at))
        torch.manual_seed(4)
        logits(model).square().sum().backward()
        grads.append([p.grad for p in plugin(model).parameters()])
    assert calls == [False, True, True]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_plugin_has_the_dtype_of_the_host() -> None:
    model = peft.get_peft_model(MODELS["vit"]().bfloat16(), config("fact-tt"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, IMAGES.bfloat16()).dtype == torch.bfloat16


def test_low_memory_loading_gives_equal_logits(tmp_path: Path) -> None:
    model = tuned("convpass")
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MODELS["vit"](), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))


def test_what_does_not_fit_is_refused_and_leaves_the_host_as_it_was() -> None:
    with pytest.raises(pt.BackboneError, match="no view walks"):
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 2)), config("fact-tt"))
    with pytest.raises(pt.PluginError, match="rank is at least 1"):
        bridge.FacTConfig(rank=0)
    for host, settings, message in (("eva02", {}, "more than tokens"), ("vit", {"roles": ["x"]}, "asked for x")):
        model = MODELS[host]()
        with pytest.raises(pt.PluginError, match=message):
            peft.get_peft_model(model, bridge.FacTConfig(**settings))
        assert not any(module._forward_hooks or isinstance(module, bridge.BlockLayer) for module in model.modules())


def test_names_and_arguments_that_peft_would_lose_are_refused() -> None:
    model = tuned("convpass")
    with pytest.raises(pt.PluginError, match="cannot be called '0'"):
        model.add_adapter("0", config("convpass"))
    with pytest.raises(pt.PluginError, match="for LoRA only"):
        model(IMAGES, adapter_names=["default", "default"])


def test_method_that_peft_has_already_is_refused_with_its_version() -> None:
    with pytest.raises(pt.PluginError, match=rf"peft {peft.__version__}, which already has a method FACT"):
        bridge._tuner("fact")
    with pytest.raises(pt.PluginError, match="already has a method LORA"):
        bridge._tuner("lora")


def test_configs_have_the_plugins_settings_and_defaults() -> None:
    for method in ("fact", "convpass", "adaptformer"):
        made = getattr(bridge, f"{bridge.METHODS[method]}Config")()
        assert made.plugin().settings() == default_plugin(method).settings()
