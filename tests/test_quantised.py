"""Quantised plugins and heads: what they hold, what their files hold, and rounding without training."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import petiole as pt
from petiole.files.ladder import ladder
from petiole.nn.codebook import levels
from petiole.nn.quantisation import quantise, statistics
from petiole.nn.weights import Weights, quantised

CLASSES = ["a", "b", "c"]
PLUGINS: dict[str, Any] = {
    "adaptformer": lambda bits: pt.AdaptFormer(dim=5, bias=False, bits=bits),
    "lora": lambda bits: pt.LoRA(rank=3, bits=bits),
    "fact-tt": lambda bits: pt.FacT(rank=3, bits=bits),
    "fact-tk": lambda bits: pt.FacT(rank=3, form="tk", bits=bits),
    "convpass": lambda bits: pt.Convpass(dim=3, bits=bits),
    "adapter": lambda bits: pt.Adapter(dim=3, bits=bits),
    "repadapter": lambda bits: pt.RepAdapter(bits=bits),
}
every_plugin = pytest.mark.parametrize("name", PLUGINS)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def adapted(plugin: pt.FacT, head_bits: int = 32) -> pt.Adapted:
    """A model whose trained tensors are random, as if trained."""
    model = pt.adapt(pt.backbone("micro"), plugin, classes=CLASSES, head_bits=head_bits).eval()
    for i, (_, parameter) in enumerate(model.trained()):
        parameter.copy_(0.1 * normal(*parameter.shape, seed=i) + 0.01)
    return model


def test_weights_read_as_their_few_levels() -> None:
    weights = Weights([normal(6, 4), 3 + normal(2, 5, 3, seed=1)], bits=2)
    assert torch.equal(weights[0], quantise(normal(6, 4), levels(2)))
    assert len(weights[1][0].unique()) <= 4
    assert weights.num_matrices == 3
    torch.testing.assert_close(weights.part(1, slice(1, 2)), weights[1][1:2])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("spread", [1.0, 1e-4, 0.0])
def test_held_weights_give_the_same_values_and_codes_again(bits: int, spread: float) -> None:
    weights = Weights({"a": 0.3 + spread * normal(6, 5), "b": spread * normal(2, 4, 3, seed=1)}, bits)
    values, (codes, held) = [weights[key].detach() for key in weights], weights.encoded()
    weights.hold(codes, held)
    again, kept = weights.encoded()
    assert torch.equal(again, codes)
    assert torch.equal(kept, held)
    assert all(torch.equal(weights[key], value) for key, value in zip(weights, values, strict=True))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_released_weights_keep_their_values_and_measure_their_statistics(bits: int) -> None:
    weights = Weights([normal(32, 16), 2 + 5 * normal(3, 7, 9, seed=1)], bits)
    weights.hold(*weights.encoded())
    values, held, codes = [weights[key].detach() for key in weights], weights.statistics, weights.encoded()[0]
    weights.release()
    measured = torch.cat([torch.stack([s.flatten() for s in statistics(p)], -1) for p in weights.parameters()])
    torch.testing.assert_close(measured, held, rtol=1e-5, atol=1e-5)
    assert torch.equal(weights.encoded()[0], codes)
    for key, value in zip(weights, values, strict=True):
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5)


def test_held_gradient_is_passed_straight_through() -> None:
    weights = Weights([normal(4, 3)], 1)
    weights.hold(*weights.encoded())
    cotangent = normal(4, 3, seed=1)
    (weights[0] * cotangent).sum().backward()
    assert torch.equal(next(weights.parameters()).grad, cotangent)


def test_state_of_held_weights_holds_and_a_latent_state_lets_go() -> None:
    weights, other = Weights([normal(4, 3)], 1), Weights([normal(4, 3, seed=1)], 1)
    latent = {name: tensor.clone() for name, tensor in weights.state_dict().items()}
    weights.hold(*weights.encoded())
    other.load_state_dict(weights.state_dict())
    assert torch.equal(other.statistics, weights.statistics)
    other.load_state_dict(latent)
    assert other.statistics is None


def test_rows_of_held_weights_have_their_own_statistics() -> None:
    rows = [Weights([normal(2, 4, 3, seed=i) + i], 2) for i in range(3)]
    for weights in rows:
        weights.hold(*weights.encoded())
    states = [weights.state_dict() for weights in rows]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    host = Weights([normal(2, 4, 3)], 2)
    host.statistics = states[0]["statistics"]

    class Read(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = host

        def forward(self) -> Tensor:
            return self.weights.part(0, slice(1, 2))

    found = torch.func.functional_call(Read(), {f"weights.{name}": t for name, t in stacked.items()}, ())
    assert torch.equal(found, torch.stack([weights[0][1:2] for weights in rows]))


@every_plugin
@pytest.mark.parametrize("bits", [1, 4])
def test_file_of_codes_is_the_model_and_is_saved_again_byte_for_byte(name: str, bits: int, tmp_path: Path) -> None:
    model = adapted(PLUGINS[name](bits), head_bits=bits)
    pt.save(model, tmp_path / "a.safetensors")
    again = pt.load(tmp_path / "a.safetensors", pt.backbone("micro"))
    assert torch.equal(again(IMAGES), model(IMAGES))
    pt.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_file_is_as_large_as_the_papers_formula(bits: int, tmp_path: Path) -> None:
    pt.save(adapted(pt.AdaptFormer(dim=16, bias=False, bits=bits), head_bits=bits), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    plugin = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.startswith("plugins."))
    head = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.startswith("head."))
    assert plugin == 12 * (192 * 16 * bits // 8 + 8)
    assert head == 3 * 192 * bits // 8 + 8
    assert pt.inspect(tmp_path / "a.safetensors").overhead_bytes < 2048


def test_latent_weights_are_kept_on_request(tmp_path: Path) -> None:
    model = adapted(pt.LoRA(rank=3, bits=1), head_bits=2)
    pt.save(model, tmp_path / "latent.safetensors", latent=True)
    again = pt.load(tmp_path / "latent.safetensors", pt.backbone("micro"))
    for (name, ours), (_, theirs) in zip(again.trained(), model.trained(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not again.holds_codes
    pt.save(model, tmp_path / "codes.safetensors")
    coded = pt.load(tmp_path / "codes.safetensors", pt.backbone("micro"))
    with pytest.raises(pt.PluginFileError, match="no latent weights to keep"):
        pt.save(coded, tmp_path / "latent.safetensors", latent=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("plugins.0.down.codes"), "only one of plugins.0.down.codes"),
        (lambda t: t.update({"plugins.0.down.codes": torch.zeros(5, dtype=torch.uint8)}), "should be 6912 codes of 1"),
        (lambda t: t.update({"plugins.0.down.statistics": torch.zeros(3, 2)}), "12 finite means and deviations"),
    ],
)
def test_wrong_codes_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    from petiole.files.codes import packed, unpacked

    model = adapted(pt.LoRA(rank=3, bits=1))
    tensors = packed(model, model.task_state())
    change(tensors)
    with pytest.raises(pt.PluginFileError, match=message):
        unpacked(model, tensors, "the file")


def test_training_what_was_read_from_codes_says_so_and_moves_the_scale(tmp_path: Path) -> None:
    task = pt.open_task("digits")
    recipe = pt.Recipe(epochs=1, batch_size=400)
    model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=2, bits=1), classes=task.classes, head_bits=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pt.fit(model, task, recipe, progress=False)
    pt.save(model, tmp_path / "a.safetensors")
    coded = pt.load(tmp_path / "a.safetensors", pt.backbone("micro"))
    before = [weights.statistics.clone() for _, weights in quantised(coded)]
    with pytest.warns(UserWarning, match="read from codes"):
        pt.fit(coded, task, recipe, progress=False)
    after = [weights.encoded()[1] for _, weights in quantised(coded)]
    assert not coded.holds_codes
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_plugin
def test_rounding_is_quantising_what_was_trained(name: str) -> None:
    model = adapted(PLUGINS[name](32))
    small = pt.quantise(model, bits=2, head_bits=1)
    whole = model.plugins.state_dict()
    for path, weights in quantised(small.plugins):
        for key in weights:
            assert torch.equal(weights[key], quantise(whole[f"{path}.{key}"], levels(2)))
    assert torch.equal(small.head.weight[0], quantise(model.head.weight, levels(1)))
    assert small.plugins[0].settings() == model.plugins[0].settings() | {"bits": 2}


@every_plugin
def test_rounding_back_to_32_bits_is_exact(name: str) -> None:
    model = adapted(PLUGINS[name](1), head_bits=1)
    whole = pt.quantise(model, bits=32, head_bits=32)
    torch.testing.assert_close(whole(IMAGES), model(IMAGES))
    assert list(quantised(whole)) == []


def test_quantised_model_merges() -> None:
    model = adapted(pt.LoRA(rank=4, bits=1), head_bits=1)
    torch.testing.assert_close(pt.merge(model)(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)


def test_bits_that_are_none_are_refused() -> None:
    with pytest.raises(pt.PluginError, match="bits are 1 to 8, or 32"):
        pt.LoRA(bits=16)
    with pytest.raises(pt.PluginError, match="bits are 1 to 8, or 32"):
        pt.adapt(pt.backbone("micro"), pt.LoRA(), classes=CLASSES, head_bits=0)
    with pytest.raises(pt.PluginError, match="SSF has no matrices"):
        pt.quantise(adapted(pt.SSF()), bits=1)
    with pytest.raises(pt.PluginError, match="bitfit has trained the backbone itself: train it with head_bits"):
        pt.quantise(adapted(pt.BitFit()), head_bits=1)
    with pytest.raises(pt.PluginError, match="no head to quantise"):
        pt.quantise(pt.adapt(pt.backbone("micro"), pt.LoRA()), head_bits=1)


def test_ladder_is_what_files_at_those_bits_hold(tmp_path: Path) -> None:
    model = adapted(pt.AdaptFormer(dim=8), head_bits=4)
    pt.save(model, tmp_path / "a.safetensors")
    for step in ladder(pt.inspect(tmp_path / "a.safetensors")):
        pt.save(pt.quantise(model, step.bits, step.bits), tmp_path / "b.safetensors")
        stored = load_file(tmp_path / "b.safetensors")
        sizes = {
            part: sum(t.numel() * t.element_size() for name, t in stored.items() if name.startswith(part))
            for part in ("plugins.", "head.")
        }
        assert (step.plugin_bytes, step.head_bytes) == (sizes["plugins."], sizes["head."]), step.bits


def test_ladder_counts_kept_latent_weights_as_codes(tmp_path: Path) -> None:
    model = adapted(pt.LoRA(rank=4, bits=1))
    pt.save(model, tmp_path / "codes.safetensors")
    pt.save(model, tmp_path / "latent.safetensors", latent=True)
    assert ladder(pt.inspect(tmp_path / "codes.safetensors")) == ladder(pt.inspect(tmp_path / "latent.safetensors"))


def test_ladder_of_what_has_no_matrices_has_no_plugin_bytes(tmp_path: Path) -> None:
    pt.save(adapted(pt.SSF()), tmp_path / "a.safetensors")
    assert {step.plugin_bytes for step in ladder(pt.inspect(tmp_path / "a.safetensors"))} == {None}
