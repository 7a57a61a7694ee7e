"""Properties that every plugin has, asked of every row of the contract table."""

import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import petiole as pt
from contract import DEPTH, PLUGINS, WIDTH, Row
from petiole.core.flow import Flow
from petiole.core.here import Here
from petiole.core.plugin import Delta

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=WIDTH, depth=DEPTH, num_heads=2, num_classes=5)
    return model.eval()


def adapted(row: Row, *, is_random: bool = False, backbone: nn.Module | None = None) -> pt.Adapted:
    model = pt.adapt(backbone or vit(), row.make(), classes=["a", "b", "c"])
    if is_random:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.plugins.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def train(model: pt.Adapted, num_steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.AdamW((p for _, p in model.trained()), lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    model.eval()


every_plugin = pytest.mark.parametrize("row", PLUGINS.values(), ids=PLUGINS)


@every_plugin
def test_fresh_plugin_is_identity_unless_the_row_says_otherwise(row: Row) -> None:
    backbone = vit()
    features = backbone.forward_head(backbone.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(adapted(row, backbone=backbone).forward_features(IMAGES), features) == row.is_identity


@every_plugin
def test_parameter_count_is_the_docstrings(row: Row) -> None:
    model = adapted(row)
    assert sum(p.numel() for name, p in model.trained() if not name.startswith("head.")) == row.num_parameters


@every_plugin
def test_backbone_is_untouched_by_training(row: Row) -> None:
    backbone = vit()
    backbone.blocks[0].train()
    backbone.norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in backbone.parameters()]
    modes = [m.training for m in backbone.modules()]
    train(adapted(row, backbone=backbone))
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())
    assert flags == [(p.requires_grad, p.grad) for p in backbone.parameters()]
    assert modes == [m.training for m in backbone.modules()]


@every_plugin
def test_every_trained_tensor_gets_a_gradient_and_nothing_else_does(row: Row) -> None:
    model = adapted(row, is_random=True)
    model(IMAGES).square().sum().backward()
    trained = {name for name, _ in model.trained()}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained


@every_plugin
def test_frozen_weights_are_the_backbones_own_memory(row: Row) -> None:
    backbone = vit()
    model = adapted(row, backbone=backbone)
    own = {p.data_ptr() for p in backbone.parameters()}
    frozen = [p for p in model.backbone.parameters() if not p.requires_grad]
    assert all(p.data_ptr() in own for p in frozen)
    assert not any(p.data_ptr() in own for _, p in model.trained())


@every_plugin
def test_training_lowers_the_loss(row: Row) -> None:
    model = adapted(row)
    before = nn.functional.cross_entropy(model(IMAGES), LABELS).item()
    train(model, 5)
    assert nn.functional.cross_entropy(model(IMAGES), LABELS).item() < before


@every_plugin
def test_deepcopy_is_independent(row: Row) -> None:
    model = adapted(row, is_random=True)
    expected = model(IMAGES)
    other = copy.deepcopy(model)
    assert torch.equal(other(IMAGES), expected)
    train(other)
    assert not torch.equal(other(IMAGES), expected)
    assert torch.equal(model(IMAGES), expected)


@every_plugin
def test_pickle_round_trips(row: Row) -> None:
    model = adapted(row, is_random=True)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IMAGES), model(IMAGES))


@every_plugin
def test_task_state_shares_no_memory(row: Row) -> None:
    tensors = adapted(row).task_state().values()
    places = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(places)) == len(places)


@every_plugin
def test_settings_make_an_equal_plugin(row: Row) -> None:
    plugin = row.make()
    again = type(plugin)(**plugin.settings())
    assert again.settings() == plugin.settings()


@every_plugin
def test_plugin_serves_one_model(row: Row) -> None:
    plugin = row.make()
    pt.adapt(vit(), plugin)
    with pytest.raises(pt.PluginError, match="already belongs to a model"):
        pt.adapt(vit(), plugin)


@every_plugin
def test_delta_is_linear_and_merges(row: Row) -> None:
    model = adapted(row, is_random=True)
    plugin = model.plugins[0]
    if isinstance(plugin, Delta):
        for site in plugin.sites:
            weight, bias = model.frozen(site)
            # the gain of a norm multiplies as a diagonal matrix does, a convolution its patches as any matrix
            frozen, change = (
                (w.diag() if w.ndim == 1 else w.flatten(1), b)
                for w, b in ((weight, bias), plugin.change(site, weight, bias))
            )
            x = torch.randn(2, 5, frozen[0].shape[1], generator=torch.Generator().manual_seed(2))
            y, expected = nn.functional.linear(x, *frozen), nn.functional.linear(x, *change)
            here = Here(Flow(1, None), None, (y,), (weight,))
            found = plugin.add(site, y if site.kind == "affine" else x, here)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if plugin.sites and not isinstance(plugin, Delta):
        with pytest.raises(pt.MergeError, match="cannot be merged"):
            pt.merge(model)
        return
    plain, logits = pt.merge(model), model(IMAGES)
    assert type(plain) is VisionTransformer
    # the design's bar: logits within 1e-5 relative
    assert (plain(IMAGES) - logits).norm() <= 1e-5 * logits.norm()


@every_plugin
def test_checkpointed_gradients_are_equal(row: Row) -> None:
    model = adapted(row, is_random=True)
    trained = [p for _, p in model.trained()]
    expected = torch.autograd.grad(model(IMAGES).square().sum(), trained)
    again = torch.utils.checkpoint.checkpoint(model, IMAGES, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), trained), expected, strict=True):
        assert torch.equal(a, b)


@every_plugin
def test_gradients_under_bf16_autocast_are_those_of_fp32_up_to_rounding(row: Row) -> None:
    model = adapted(row, is_random=True)
    trained = [p for _, p in model.trained()]
    expected = torch.autograd.grad(model(IMAGES).square().sum(), trained)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    found = torch.autograd.grad(logits.float().square().sum(), trained)
    assert all(g.dtype == p.dtype for g, p in zip(found, trained, strict=True))
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (found, expected))
    # bfloat16 keeps eight bits: an error of a few percent in each step of a chain of twenty
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


@every_plugin
def test_rows_of_a_batch_can_use_different_plugins(row: Row) -> None:
    first, second = adapted(row, is_random=True), adapted(row)
    if not list(first.plugins.parameters()):
        pytest.skip("no plugin tensors of its own")
    names = [name for name, _ in first.plugins.named_parameters()]
    tensors = [dict(m.plugins.named_parameters()) for m in (first, second)]
    mixed = {f"plugins.{n}": torch.stack([tensors[i][n] for i in (0, 1, 1, 0)]) for n in names}
    second.head.load_state_dict(first.head.state_dict())
    logits = torch.func.functional_call(first, mixed, (IMAGES,))
    expected = torch.stack([m(IMAGES[i : i + 1])[0] for i, m in enumerate((first, second, second, first))])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@every_plugin
@pytest.mark.compile
def test_compiles_to_one_graph(row: Row) -> None:
    model = adapted(row, is_random=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_reaches_the_twin_and_the_plugins_sites_alone() -> None:
    backbone = vit()
    model = pt.adapt(backbone, pt.LoRA(rank=2))
    expected = model(IMAGES)
    model.set_drop_path(0.5)
    assert {site.drop_path for site in model.plugins[0].sites} == {0.0, 0.5}
    assert torch.equal(model(IMAGES), expected), "in eval mode nothing may be dropped"
    model.train()
    assert not torch.equal(model(IMAGES), expected)
    assert isinstance(backbone.blocks[1].drop_path1, nn.Identity)
