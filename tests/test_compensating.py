"""The compensator between token budgets: its laws, its folding, and a model whose budget changes while it serves."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import petiole as pt
from models import MODELS
from petiole.core.adapted import Adapted
from petiole.tasks import Pixels

CLASSES = ["a", "b", "c"]


def compensation(source: int, target: int, seed: int = 0) -> Tensor:
    """All weight changes of a random compensator between two degrees."""
    backbone = MODELS["vit"]().eval().double()
    model = pt.adapt(backbone, pt.ToCom(groups=6, source=source, target=target), prove=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    plugin = model.plugins[0]
    return torch.stack([plugin.change(site, *model.frozen(site))[0] for site in plugin.sites])


def test_compensation_is_antisymmetric_additive_along_chains_and_nothing_at_equal_degrees() -> None:
    assert torch.equal(compensation(1, 4), -compensation(4, 1))
    torch.testing.assert_close(compensation(0, 2) + compensation(2, 5), compensation(0, 5))
    torch.testing.assert_close(compensation(5, 3) + compensation(3, 6), compensation(5, 6))
    assert not compensation(3, 3).any()
    assert torch.linalg.matrix_rank(compensation(1, 4)[0]) == 3 * 2


def test_compensated_model_folds_into_an_ordinary_one_for_a_pair() -> None:
    model = pt.adapt(pt.backbone("micro"), pt.ToCom(source=2, target=8), classes=CLASSES).eval()
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    images = model.view.probe(model.backbone)
    plain = pt.merge(model)
    torch.testing.assert_close(pt.compress(plain, 8)(images), pt.compress(model, 8)(images), rtol=1e-4, atol=1e-4)


def test_degree_that_was_not_trained_is_refused() -> None:
    with pytest.raises(pt.PluginError, match=r"target degree is a whole number from 0 to 16, .* got 17"):
        pt.ToCom(target=17)
    with pytest.raises(pt.PluginError, match=r"source degree is a whole number from 0 to 4, .* got -1"):
        pt.ToCom(groups=4, source=-1, target=2)
    with pytest.raises(pt.PluginError, match=r"got 2\.5"):
        pt.ToCom(target=2.5)  # type: ignore[arg-type]


def trained(compensator: pt.ToCom | None = None) -> Adapted:
    """A compensator on `micro` with random tensors, as if it were trained."""
    model = pt.adapt(pt.backbone("micro"), compensator or pt.ToCom(groups=8, scale=0.5), prove=False).eval()
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def images(num: int = 2) -> Tensor:
    return torch.randn(num, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_sums_from_degree_0_give_every_pair() -> None:
    plugin = trained().taps.plugins[0]
    assert isinstance(plugin, pt.ToCom)
    for site in plugin.sites[::5]:
        sums = plugin.sums(site)
        assert sums.shape == (9, 192, 192)
        for source, target in ((0, 3), (2, 8), (7, 1), (5, 5)):
            plugin.set_degrees(source, target)
            change, _ = plugin.change(site, torch.empty(0), None)
            torch.testing.assert_close(sums[target] - sums[source], change, atol=1e-5, rtol=1e-5)


def test_compressing_with_a_compensator_puts_it_between_the_two_budgets(tmp_path: Path) -> None:
    pt.save(trained(), tmp_path / "tocom.safetensors")
    model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=2), classes=CLASSES).eval()
    fast = pt.compress(model, r=6, compensator=tmp_path / "tocom.safetensors")
    assert [plugin.method for plugin in fast.taps.plugins] == ["lora", "tocom", "tome"]
    by_hand = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=2), pt.ToCom(groups=8, scale=0.5, source=0, target=6),
                       pt.ToMe(budget=6), classes=CLASSES, prove=False).eval()  # fmt: skip
    weights = trained().plugins[0].state_dict()
    by_hand.plugins[1].load_state_dict(weights)
    by_hand.head.load_state_dict(model.head.state_dict())
    by_hand.plugins[0].load_state_dict(model.plugins[0].state_dict())
    assert torch.equal(fast(images()), by_hand(images()))
    assert not torch.equal(fast(images()), pt.compress(model, r=6)(images()))


def test_budget_of_training_is_what_the_model_came_with() -> None:
    model = pt.adapt(pt.backbone("micro"), pt.ToMe(budget=4), classes=CLASSES)
    fast = pt.compress(model, r=8, compensator=trained())
    again = pt.compress(fast, r=2)
    back = pt.compress(again, r=4)
    degrees = [(p.source, p.target) for m in (fast, again, back) for p in m.taps.plugins if isinstance(p, pt.ToCom)]
    assert degrees == [(4, 8), (4, 2), (4, 4)]
    assert torch.equal(back.eval()(images()), model.eval()(images()))
    assert pt.compress(model, r=8, compensator=trained(), source=1, scale=0.3).plugins[0].settings()["source"] == 1


def test_compensator_serves_a_backbone_that_was_tuned_since(tmp_path: Path) -> None:
    pt.save(trained(), tmp_path / "tocom.safetensors")
    tuned = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=2), classes=CLASSES)
    with torch.no_grad():
        for parameter in tuned.plugins.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    merged = pt.merge(tuned)
    fast = pt.compress(merged, r=5, compensator=tmp_path / "tocom.safetensors")
    expected = pt.compress(tuned.eval(), r=5, compensator=trained())(images())
    torch.testing.assert_close(fast(images()), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(pt.PluginFileError, match=r"belongs to micro .* this is vit_tiny_patch16_224"):
        pt.compress(MODELS["vit"](), r=2, compensator=tmp_path / "tocom.safetensors")


def test_elastic_model_equals_the_compressed_one_at_every_budget_and_adds_nothing() -> None:
    backbone = pt.backbone("micro")
    before = copy.deepcopy(backbone.state_dict())
    model = pt.adapt(backbone, pt.AdaptFormer(dim=4), classes=CLASSES).eval()
    fast = pt.compress(model, r=8, compensator=trained())
    live = pt.Elastic(fast)
    for r in (8, 0, 3, 8, 1):
        live.set_budget(r)
        expected = pt.compress(fast, r=r).eval()(images())
        torch.testing.assert_close(live(images()), expected, rtol=1e-5, atol=1e-5)
        assert live.budget == r
    # equal degrees fold to the very bits of the model
    live.set_budget(0)
    assert torch.equal(live(images()), model(images()))
    assert not any(plugin.method == "tocom" for plugin in live.folded.taps.plugins)
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert fast.taps.plugins[1].settings()["target"] == 8
    twin = copy.deepcopy(live)
    twin.set_budget(8)
    assert torch.equal(live(images()), model(images()))


def test_elastic_model_shares_what_it_does_not_fold() -> None:
    fast = pt.compress(pt.adapt(pt.backbone("micro"), classes=CLASSES), r=8, compensator=trained())
    live = pt.Elastic(fast)
    base = {t.data_ptr() for t in fast.backbone.parameters()}
    own = [name for name, t in live.folded.backbone.named_parameters() if t.data_ptr() not in base]
    assert own == [f"blocks.{i}.attn.qkv.weight" for i in range(6)]


def test_elastic_model_without_a_compensator_changes_its_budget_alone() -> None:
    model = pt.adapt(pt.backbone("micro"), classes=CLASSES).eval()
    live = pt.Elastic(pt.compress(model, r=8))
    live.set_budget((4, -1))
    assert torch.equal(live(images()), pt.compress(model, r=(4, -1))(images()))


def test_budget_that_a_compensator_does_not_know_is_refused_and_nothing_changes() -> None:
    model = pt.adapt(pt.backbone("micro"), classes=CLASSES)
    with pytest.raises(pt.PluginError, match=r"whole numbers of tokens that each block removes; got \(4, -1\)"):
        pt.compress(model, r=(4, -1), compensator=trained())
    with pytest.raises(pt.PluginError, match=r"whole number from 0 to 8, .* got 9"):
        pt.compress(model, r=9, compensator=trained())
    with pytest.raises(pt.PluginError, match="there is none: pass compensator"):
        pt.compress(model, r=4, source=2)
    with pytest.raises(pt.PluginError, match="has no compensator"):
        pt.compress(model, r=4, compensator=model)
    with pytest.raises(pt.PluginError, match="lora removes no tokens"):
        pt.compress(model, method="lora")
    live = pt.Elastic(pt.compress(model, r=4, compensator=trained()).eval())
    before = live(images())
    with pytest.raises(pt.PluginError, match="got 9"):
        live.set_budget(9)
    assert live.budget == 4
    assert torch.equal(live(images()), before)
    with pytest.raises(pt.PluginError, match="no token budget"):
        pt.Elastic(model)


def test_bundled_compensator_brings_budgets_together_on_images_it_has_not_seen() -> None:
    pixels = Pixels(
        pt.open_task("digits").val.part(range(48)), pt.Transform(pt.adapt(pt.backbone("micro")).input_config)
    )
    digits = pixels.transform.normalize(pixels.batch(range(48))[0])
    plain = pt.adapt(pt.backbone("micro"))
    for source, target in ((0, 32), (0, 20), (8, 24), (32, 4)):
        at_source = pt.compress(plain, r=source)(digits)
        without = pt.compress(plain, r=target)(digits)
        with_it = pt.compress(plain, r=target, compensator="micro", source=source)(digits)
        assert (with_it - at_source).norm() < 0.97 * (without - at_source).norm()
