"""Several plugins on one backbone, plugins taken apart, and sums of plugins."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
from contract import PLUGINS
from models import MODELS
from petiole.core.here import Here
from petiole.core.plugin import Delta, Plugin
from petiole.core.site import Site
from petiole.core.taps import Taps, side_by_side, spread

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def filled(backbone: nn.Module, *plugins: Plugin, seed: int = 1) -> pt.Adapted:
    model = pt.adapt(backbone, *plugins, classes=["a", "b", "c"], prove=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.plugins.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def features_in_double(model: pt.Adapted) -> Tensor:
    return model.double().forward_features(IMAGES.double())


PAIRS = [("fact-tt", "convpass"), ("lora-all", "fact-tk"), ("ssf", "lora-all"), ("adapter-houlsby", "lora-all")]


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_every_tensor_of_two_plugins_gets_a_gradient(names: tuple[str, str]) -> None:
    model = pt.adapt(MODELS["vit"](), *(PLUGINS[name].make() for name in names), classes=["a", "b"])
    model.train()(IMAGES).square().sum().backward()
    assert all(p.grad is not None for _, p in model.trained())


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_the_order_of_plugins_means_nothing(names: tuple[str, str]) -> None:
    backbone = MODELS["vit"]()
    model = filled(backbone, *(PLUGINS[name].make() for name in names))
    turned = pt.adapt(backbone, *(plugin.taken() for plugin in reversed(model.plugins)))
    torch.testing.assert_close(features_in_double(turned), features_in_double(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "names", [("lora-all", "fact-tk"), ("ssf", "lora-all"), ("repadapter", "fact-tt", "ssf")], ids="+".join
)
def test_several_deltas_merge_as_a_sum(names: tuple[str, ...]) -> None:
    model = filled(MODELS["vit"](), *(PLUGINS[name].make() for name in names))
    plain = pt.merge(model)
    with torch.no_grad():
        expected, found = model(IMAGES), plain(IMAGES)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_each_of_two_plugins_works_alone() -> None:
    backbone = MODELS["vit"]()
    both = filled(backbone, pt.FacT(rank=2), pt.Convpass(dim=3))
    for i, name in enumerate(("fact", "convpass")):
        alone = pt.only(both, name)
        expected = pt.adapt(backbone, both.plugins[i].taken()).forward_features(IMAGES)
        assert torch.equal(alone.forward_features(IMAGES), expected)
        assert torch.equal(alone(IMAGES), both.head(expected))
    assert torch.equal(pt.only(both).forward_features(IMAGES), pt.adapt(backbone).forward_features(IMAGES))


def test_only_says_what_the_model_has() -> None:
    both = pt.adapt(MODELS["vit"](), pt.FacT(rank=2), pt.Convpass())
    with pytest.raises(pt.PluginError, match="has no plugin 'lora': it has fact, convpass"):
        pt.only(both, "lora")
    with pytest.raises(pt.PluginError, match="bitfit trains the backbone itself"):
        pt.only(pt.adapt(MODELS["vit"](), pt.BitFit()))


def test_a_composition_comes_back_from_its_file(tmp_path: Path) -> None:
    backbone = MODELS["vit"]()
    model = filled(backbone, pt.FacT(rank=2), pt.Convpass(dim=3), pt.SSF()).eval()
    pt.save(model, tmp_path / "both.safetensors")
    assert torch.equal(pt.load(tmp_path / "both.safetensors", backbone)(IMAGES), model(IMAGES))


def test_a_taken_plugin_is_a_copy() -> None:
    backbone = MODELS["vit"]()
    model = filled(backbone, pt.LoRA(rank=2))
    expected = model.forward_features(IMAGES)
    other = pt.adapt(backbone, model.plugins[0].taken())
    assert torch.equal(other.forward_features(IMAGES), expected)
    with torch.no_grad():
        other.plugins[0].up[0].zero_()
    assert torch.equal(model.forward_features(IMAGES), expected)


def test_a_taken_plugin_joins_equal_sites_only() -> None:
    plugin = pt.adapt(MODELS["vit"](), pt.LoRA(rank=2)).plugins[0].taken()
    with pytest.raises(
        pt.PluginError, match=r"taken from a model with other sites: blocks\.0\.attn\.q \(32 to 32\) and layers"
    ):
        pt.adapt(MODELS["swin"](), plugin)


def changes(plugin: Plugin, model: pt.Adapted) -> list[Tensor]:
    assert isinstance(plugin, Delta)
    return [dy for site in plugin.sites for dy in plugin.change(site, *model.frozen(site)) if dy is not None]


@pytest.mark.parametrize("model_name", ["vit", "swin"])
@pytest.mark.parametrize(
    "makes",
    [
        (lambda: pt.LoRA(rank=2, scale=0.5), lambda: pt.LoRA(rank=3, scale=4.0)),
        (lambda: pt.FacT(rank=2, scale=0.5), lambda: pt.FacT(rank=3, scale=4.0)),
        (lambda: pt.FacT(rank=2, form="tk", layout="reference"), lambda: pt.FacT(rank=3, scale=2.0)),
        (pt.SSF, pt.SSF),
    ],
    ids=["lora", "fact-tt", "fact-tk+tt", "ssf"],
)  # fmt: skip
def test_a_combined_plugin_changes_weights_by_the_weighted_sum(
    makes: tuple[Callable[[], Plugin], ...], model_name: str
) -> None:
    backbone = MODELS[model_name]().double()
    models = [filled(backbone, make(), seed=i) for i, make in enumerate(makes)]
    combined = pt.adapt(backbone, pt.combine([m.plugins[0] for m in models], [0.3, -2.0])).plugins[0]
    parts = [changes(model.plugins[0], model) for model in models]
    for found, a, b in zip(changes(combined, models[0]), *parts, strict=True):
        torch.testing.assert_close(found, 0.3 * a - 2.0 * b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["convpass", "adaptformer", "adapter-houlsby", "repadapter", "lora", "fact-tt", "ssf"])
def test_a_multiplied_plugin_adds_a_multiple(name: str) -> None:
    backbone = MODELS["vit"]()
    model = filled(backbone, PLUGINS[name].make())
    twice = pt.adapt(backbone, pt.combine([model.plugins[0]], [2.0]))
    one, two = (first_addition(each.eval()) for each in (model, twice))
    torch.testing.assert_close(two, 2 * one, rtol=1e-5, atol=1e-6)


class Listening(Taps):
    """Taps that keep every addition."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        super().__init__(plugins)
        self.additions: list[Tensor] = []

    def ask(self, plugin: Plugin, sites: Sequence[Site], x: Tensor, here: Here) -> Sequence[Tensor]:
        additions = side_by_side(super().ask(plugin, sites, x, here), sites)
        self.additions.extend(additions)
        return additions

    def onto(self, plugin: Plugin, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        return y + spread(self.ask(plugin, sites, x, here), here.starts, y.shape[-1])


def first_addition(model: pt.Adapted) -> Tensor:
    """Returns what the plugin adds at the first of its sites, where nothing it added before has changed the input."""
    taps = Listening(model.plugins)
    with torch.no_grad():
        model.view.run(model.backbone, IMAGES, taps)
    return taps.additions[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: pt.combine([m.plugins[0], m.plugins[1]]),
            "the plugins sit at different sites",
        ),
        (lambda m: pt.combine([m.plugins[1], m.plugins[1]]), "Convpass cannot be summed into one plugin exactly"),
        (lambda m: pt.combine([m.plugins[0]], [1.0, 2.0]), "as many factors as plugins, got 2 for 1"),
        (lambda m: pt.combine([pt.Linear()]), "Linear has no tensors at sites"),
    ],
)
def test_what_has_no_exact_sum_is_refused(make: Callable[[pt.Adapted], Plugin], message: str) -> None:
    model = pt.adapt(MODELS["vit"](), pt.FacT(rank=2), pt.Convpass())
    with pytest.raises(pt.PluginError, match=message):
        make(model)


def test_a_method_that_finds_nothing_to_train_is_refused() -> None:
    backbone = MODELS["vit_no_bias"]()
    for part in backbone.modules():
        if getattr(part, "bias", None) is not None:
            part.register_parameter("bias", None)
    with pytest.raises(pt.PluginError, match="BitFit finds nothing to train in this VisionTransformer"):
        pt.adapt(backbone, pt.BitFit(), classes=["a", "b"])


def test_before_the_first_site_that_trains_there_is_no_autograd_graph() -> None:
    class Late(pt.LoRA):
        def select(self, sites: Sequence[Site]) -> Sequence[Site]:
            return [site for site in super().select(sites) if site.block == 1]

    model = pt.adapt(MODELS["vit"](), Late(rank=2), classes=["a", "b"])
    graphs = {}
    for i, block in enumerate(model.backbone.blocks):
        block.norm1.register_forward_hook(lambda _, __, y, i=i: graphs.__setitem__(i, y.grad_fn))
        block.norm2.register_forward_hook(lambda _, __, y, i=i: graphs.__setitem__(f"{i}.mlp", y.grad_fn))
    model.train()(IMAGES)
    assert [graphs[0], graphs["0.mlp"], graphs[1]] == [None] * 3
    assert graphs["1.mlp"] is not None


@pytest.mark.parametrize("model_name", ["vit", "swin", "eva_mixed_rope", "hf_vit", "open_clip"])
def test_checkpointing_keeps_every_gradient_and_less_memory(model_name: str) -> None:
    model = pt.adapt(MODELS[model_name](), pt.LoRA(rank=2, dropout=0.5), classes=["a", "b"])
    images, kept = model.view.probe(model.backbone), []

    def gradients(is_on: bool) -> tuple[list[Tensor], int]:
        model.set_checkpointing(is_on)
        kept.clear()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.train()(images).square().sum()
        size = sum(kept)
        return list(torch.autograd.grad(loss, [p for _, p in model.trained()])), size

    (expected, much), (found, little) = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert little < 0.5 * much
