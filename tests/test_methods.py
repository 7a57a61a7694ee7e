"""Every method against another route to the same numbers, and against published counts."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from contract import WIDTH
from models import MODELS, randomised
from petiole.backbones import view_of
from petiole.core.flow import Flow
from petiole.core.here import Here
from petiole.core.plugin import Plugin, Tuning
from petiole.core.site import Site
from petiole.nn.convolution import convolve
from test_contract import IMAGES, vit


def joined(plugin: Plugin, backbone: nn.Module, classes: Sequence[str] | None = None) -> pt.Adapted:
    """The plugin on a backbone, its tensors moved at random, in eval mode."""
    model = pt.adapt(backbone, plugin, classes=classes).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.plugins.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def features(backbone: nn.Module) -> Tensor:
    return backbone.forward_head(backbone.forward_features(IMAGES), pre_logits=True)


def patched(backbone: nn.Module, part: str, change: Callable[[Tensor], Tensor], *, is_input: bool = False) -> None:
    """Lets a module of the backbone see or give something else, by a hook: what the library itself never does."""
    module = backbone.get_submodule(part)
    if is_input:
        module.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    else:
        module.register_forward_hook(lambda _, args, output: change(output))


def trained_names(plugin: Tuning, backbone: nn.Module) -> set[str]:
    """What a method trains of a backbone whose classifier stays."""
    return {name.removeprefix("backbone.") for name, _ in pt.adapt(backbone, plugin, prove=False).trained()}


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (pt.BitFit, 102_912),
        (pt.LayerNorm, 38_400),
        (lambda: pt.RepAdapter(bias=False), 221_184),
        (pt.RepAdapter, 239_808),
        (pt.SSF, 205_824),
        (lambda: pt.VPT(num_prompts=50), 460_800),
        (lambda: pt.VPT(num_prompts=50, deep=False), 38_400),
    ],
    ids=["bitfit", "layernorm", "repadapter_weights", "repadapter", "ssf", "vpt_deep", "vpt_shallow"],
)
def test_count_on_vit_b16_is_the_published_one(make: Callable[[], Plugin], count: int) -> None:
    import timm

    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    plugin = make()
    plugin.attach(view_of(backbone).sites(backbone))
    tuned = 0
    if isinstance(plugin, Tuning):
        owners = {name: backbone.get_submodule(name.rpartition(".")[0]) for name, _ in backbone.named_parameters()}
        tuned = sum(p.numel() for name, p in backbone.named_parameters() if plugin.trains(name, owners[name]))
    assert sum(p.numel() for p in plugin.parameters()) + tuned == count


@pytest.mark.parametrize(("make", "count"), [(pt.Convpass, 437_504), (lambda: pt.FacT(rank=16), 135_168)])
def test_count_on_swin_b_is_the_published_one(make: Callable[[], Plugin], count: int) -> None:
    import timm

    with torch.device("meta"):
        backbone = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
    plugin = make()
    plugin.attach(view_of(backbone).sites(backbone))
    assert sum(p.numel() for p in plugin.parameters()) == count


@pytest.mark.parametrize("name", ["vit_qk_norm", "deit3", "eva02", "swin", "hf_dinov2", "torchvision", "open_clip"])
def test_layernorm_trains_the_modules_that_are_called_norms(name: str) -> None:
    backbone = MODELS[name]()
    norms = {part for part, module in backbone.named_modules() if "norm" in type(module).__name__.lower()}
    expected = {n for n, _ in backbone.named_parameters() if n.rpartition(".")[0] in norms}
    assert trained_names(pt.LayerNorm(), backbone) == expected


@pytest.mark.parametrize(
    ("owner", "is_norm"),
    [
        (nn.RMSNorm(4), True),
        (nn.GroupNorm(2, 4), True),
        (nn.BatchNorm2d(4), True),
        (nn.Linear(4, 4), False),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Embedding(4, 4), False),
        (nn.PReLU(4), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layernorm_knows_a_norm_by_its_shape(owner: nn.Module, is_norm: bool) -> None:
    assert {pt.LayerNorm().trains(f"part.{name}", owner) for name, _ in owner.named_parameters()} == {is_norm}


def test_bitfit_trains_biases_outside_their_maps_and_no_table_of_positions() -> None:
    backbone = MODELS["beit"]()
    parts = ("norm1.bias", "norm2.bias", "attn.proj.bias", "attn.q_bias", "attn.v_bias", "mlp.fc1.bias", "mlp.fc2.bias")
    inside = {f"blocks.{i}.{part}" for i in range(2) for part in parts}
    assert trained_names(pt.BitFit(), backbone) == inside | {"patch_embed.proj.bias", "fc_norm.bias", "head.bias"}


def test_bitfit_trains_the_bias_of_a_fused_map_of_torch() -> None:
    names = trained_names(pt.BitFit(), MODELS["torchvision"]())
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_bias" in names
    assert not [name for name in names if not name.endswith("bias")]


@pytest.mark.parametrize("name", ["vit", "dinov2_registers", "deit_distilled"])
@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_vpt_is_a_loop_that_concatenates(name: str, deep: bool) -> None:
    backbone = MODELS[name]()
    model = joined(pt.VPT(num_prompts=3, deep=deep), backbone)
    own, prompts = backbone.num_prefix_tokens, [p.expand(len(IMAGES), -1, -1) for p in model.plugins[0].prompts]
    x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(IMAGES)))
    x = torch.cat([x[:, :own], prompts[0], x[:, own:]], dim=1)
    for i, block in enumerate(backbone.blocks):
        if deep and i > 0:
            x = torch.cat([x[:, :own], prompts[i], x[:, own + 3 :]], dim=1)
        x = block(x)
    x = backbone.norm(torch.cat([x[:, :own], x[:, own + 3 :]], dim=1))
    torch.testing.assert_close(model(IMAGES), backbone.forward_head(x), rtol=1e-5, atol=1e-6)


def test_vpt_reaches_a_backbone_of_another_library() -> None:
    backbone = MODELS["hf_vit_bare"]()
    model = joined(pt.VPT(num_prompts=3), backbone)
    images = model.view.probe(backbone)
    x = backbone.embeddings(images)
    for layer, p in zip(backbone.layers, model.plugins[0].prompts, strict=True):
        x = layer(torch.cat([x[:, :1], p.expand(len(x), -1, -1), x[:, 1:]], dim=1))
        x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
    expected = backbone.pooler(backbone.layernorm(x))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)


def test_vpt_prompts_have_no_position_to_turn_by() -> None:
    backbone = MODELS["eva02"]()
    model, by_hand = joined(pt.VPT(num_prompts=3), backbone), copy.deepcopy(backbone)
    x, rope = by_hand._pos_embed(by_hand.patch_embed(IMAGES))
    for block, p in zip(by_hand.blocks, model.plugins[0].prompts, strict=True):
        # timm's own block, told that the prompts are prefix tokens, which it does not rotate
        block.attn.num_prefix_tokens += 3
        x = block(torch.cat([x[:, :1], p.expand(len(x), -1, -1), x[:, 1:]], dim=1), rope=rope)
        x = torch.cat([x[:, :1], x[:, 4:]], dim=1)
    expected = by_hand.forward_head(by_hand.norm(x))
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "shallow"])
def test_vpt_keeps_its_gradients_when_blocks_are_computed_again(deep: bool) -> None:
    model = joined(pt.VPT(num_prompts=3, deep=deep), vit())
    prompts = list(model.plugins.parameters())
    expected = torch.autograd.grad(model(IMAGES).square().sum(), prompts)
    model.set_checkpointing(True)
    again = torch.autograd.grad(model(IMAGES).square().sum(), prompts)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_vpt_shares_a_model_with_a_method_at_other_sites() -> None:
    model = pt.adapt(vit(), pt.VPT(num_prompts=3), pt.Convpass(dim=3), pt.LoRA(rank=2))
    assert model(IMAGES).shape == (4, 5), "a convolution over the grid must not see prompts as patches"


def test_vpt_drops_prompts_in_training_alone() -> None:
    model = joined(pt.VPT(num_prompts=3, dropout=0.5), vit())
    assert torch.equal(model(IMAGES), model(IMAGES))
    model.train()
    assert not torch.equal(model(IMAGES), model(IMAGES))


def test_vpt_starts_within_the_papers_bound() -> None:
    prompts = torch.cat(list(pt.adapt(vit(), pt.VPT(num_prompts=100)).plugins[0].prompts))
    bound = (6 / (2 * 32)) ** 0.5
    assert 0.99 * bound < prompts.abs().max() <= bound


@pytest.mark.parametrize("name", ["swin", "beit"])
def test_vpt_refuses_a_backbone_whose_attention_counts_its_tokens(name: str) -> None:
    with pytest.raises(pt.PluginError, match=r"VPT adds tokens .* this backbone takes none: its attention knows every"):
        pt.adapt(MODELS[name](), pt.VPT())


def test_vpt_wants_a_prompt() -> None:
    with pytest.raises(pt.PluginError, match="num_prompts must be at least 1, got 0"):
        pt.VPT(num_prompts=0)


def test_ssf_scales_and_shifts_what_the_modules_give() -> None:
    backbone = MODELS["vit_avg_pool"]()
    model, by_hand = joined(pt.SSF(), backbone), copy.deepcopy(backbone)
    plugin, total = model.plugins[0], {}
    for site in plugin.sites:
        part = site.weight.name.removesuffix(".weight")
        total.setdefault(part, []).append((1 + plugin.scale_of(site), plugin.shift_of(site)))
    assert len(total) == 6 * 2 + 1, "the pooled norm lies in the head, outside the sites"
    for part, pairs in total.items():
        gamma, beta = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        if part == "patch_embed.proj":
            gamma, beta = gamma[:, None, None], beta[:, None, None]
        patched(by_hand, part, lambda y, gamma=gamma, beta=beta: gamma * y + beta)
    torch.testing.assert_close(model.forward_features(IMAGES), features(by_hand), rtol=1e-4, atol=1e-5)


def test_ssf_only_scales_a_map_without_a_bias() -> None:
    model = joined(pt.SSF(), MODELS["beit"]())
    plugin = model.plugins[0]
    unshifted = {site.role for site in plugin.sites if plugin.shift_of(site) is None}
    assert unshifted == {"k"}


def test_ssf_keeps_the_dtype_of_mixed_precision() -> None:
    model = joined(pt.SSF(), vit())
    plugin = model.plugins[0]
    site = next(site for site in plugin.sites if site.role == "fc1")
    y = torch.ones(2, 5, site.d_out, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert plugin.add_onto([site], y, y, None).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [pt.SSF, lambda: pt.RepAdapter(bias=False)], ids=["ssf", "repadapter"])
@pytest.mark.parametrize("name", ["vit_no_bias", "vit_qk_norm", "beit", "eva02", "swin_padded", "hf_dinov2"])
def test_merged_model_answers_alike_in_every_family(name: str, make: Callable[[], Plugin]) -> None:
    model = joined(make(), MODELS[name]())
    images = model.view.probe(model.backbone)
    plain = pt.merge(model)
    torch.testing.assert_close(model.view.answer(plain, images), model(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_repadapter_is_a_pair_of_convolutions_in_front_of_the_maps(groups: int) -> None:
    backbone = randomised(vit())
    model, by_hand = joined(pt.RepAdapter(groups=groups, scale=0.5), backbone), copy.deepcopy(backbone)
    plugin = model.plugins[0]
    for i, part in enumerate(("blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1")):
        down, up = plugin.down[i][..., None], plugin.up[i].flatten(0, 1)[..., None]

        def adapter(x: Tensor, i: int = i, down: Tensor = down, up: Tensor = up) -> Tensor:
            code = F.conv1d(x.mT, down, plugin.down_bias[i])
            return x + 0.5 * F.conv1d(code, up, plugin.up_bias[i], groups=groups).mT

        patched(by_hand, part, adapter, is_input=True)
    torch.testing.assert_close(model.forward_features(IMAGES), features(by_hand), rtol=1e-4, atol=1e-5)


def test_repadapter_with_biases_cannot_merge_into_a_map_without_one() -> None:
    model = joined(pt.RepAdapter(), MODELS["beit"]())
    with pytest.raises(pt.MergeError, match=r"blocks\.0\.attn\.k has no bias .* train RepAdapter\(bias=False\)"):
        pt.merge(model)


def test_repadapter_shares_one_adapter_between_the_halves_of_a_gated_mlp() -> None:
    plugin = joined(pt.RepAdapter(roles=("mlp",)), MODELS["eva02_base"]()).plugins[0]
    assert {site.role for site in plugin.sites} == {"fc1_g", "fc1_x"}
    assert len(plugin.down) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 6, "groups": 4}, "dim must be a multiple of groups, got dim 6 and groups 4"),
        ({"roles": ("attn", "fc2")}, "roles are attn and mlp, got attn, fc2"),
        ({"roles": ()}, "roles are attn and mlp, got none"),
    ],
)
def test_repadapter_refuses_settings_that_contradict(settings: dict[str, object], message: str) -> None:
    with pytest.raises(pt.PluginError, match=message):
        pt.RepAdapter(**settings)


def test_repadapter_names_the_width_its_groups_do_not_divide() -> None:
    with pytest.raises(pt.PluginError, match=r"groups 3 must divide the width 32 at blocks\.0\.attn\.q"):
        pt.adapt(vit(), pt.RepAdapter(dim=6, groups=3))


# Convpass, AdaptFormer, Adapter


def moved(plugin: Plugin, sites: Sequence[Site]) -> Plugin:
    """The plugin at these sites, in float64 with random tensors and in eval mode."""
    plugin.attach(sites)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in plugin.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return plugin.eval()


def branch(drop_path: float = 0.0) -> Site:
    return Site("blocks.0.attn", "branch", block=0, width=4, d_in=4, d_out=4, drop_path=drop_path)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def quick_gelu(t: Tensor) -> Tensor:
    return t / (1 + torch.exp(-1.702 * t))


def test_convpass_is_a_loop_over_the_grid() -> None:
    (height, width), num_prefix = (2, 3), 3
    plugin, x = moved(pt.Convpass(dim=2, roles=("attn",), scale=0.5), [branch()]), normal(2, 3 + 6, 4)
    kernel, shift = plugin.conv[0].reshape(plugin.dim, plugin.dim, 3, 3), plugin.conv_bias[0]
    code = quick_gelu(torch.einsum("bnd,hd->bnh", x, plugin.down.weight[0]) + plugin.down.bias[0])
    images = [(code[:, t : t + 1], 1, 1) for t in range(num_prefix)] + [(code[:, num_prefix:], height, width)]
    found = []
    for image, rows, columns in images:
        for row in range(rows):
            for column in range(columns):
                total = shift.expand(2, 2)
                for i in range(max(0, row - 1), min(rows, row + 2)):
                    for j in range(max(0, column - 1), min(columns, column + 2)):
                        tap = kernel[:, :, i - row + 1, j - column + 1]
                        total = total + image[:, i * columns + j] @ tap.T
                found.append(quick_gelu(total))
    expected = 0.5 * (torch.stack(found, dim=1) @ plugin.up.weight[0].T + plugin.up.bias[0])
    here = Here(Flow(num_prefix, (height, width)))
    torch.testing.assert_close(plugin.add(branch(), x, here), expected)


@pytest.mark.parametrize("dim", [1, 8, 12])
def test_convpass_starts_as_the_identity_of_the_grid_when_asked(dim: int) -> None:
    plugin, x = pt.Convpass(dim=dim, roles=("attn",), init="dirac"), normal(2, 1 + 6, dim)
    plugin.attach([branch()])
    plugin.double()
    torch.testing.assert_close(convolve(x, 1, (2, 3), plugin.conv[0].reshape(dim, dim, 3, 3), plugin.conv_bias[0]), x)


def test_convpass_drops_whole_samples_at_the_rate_of_its_branch() -> None:
    torch.manual_seed(0)
    site, here = branch(drop_path=0.4), Here(Flow(1, (2, 2)))
    plugin = moved(pt.Convpass(dim=2, roles=("attn",), dropout=0.0), [site])
    x = normal(1, 5, 4)
    expected = plugin.add(site, x, here)
    rows = plugin.train().add(site, x.expand(1000, -1, -1), here)
    is_kept = rows.flatten(1).any(dim=1)
    torch.testing.assert_close(rows[is_kept], (expected / 0.6).expand(int(is_kept.sum()), -1, -1))
    # five standard deviations of the mean of 1000 draws
    assert abs(is_kept.double().mean().item() - 0.6) < 5 * (0.4 * 0.6 / 1000) ** 0.5


def test_convpass_draws_its_stochastic_depth_apart_from_the_backbones() -> None:
    model = joined(pt.Convpass(roles=("mlp",), dropout=0.0), randomised(vit()).double())
    model.set_drop_path(0.5)
    torch.manual_seed(0)
    rows = model.train().forward_features(IMAGES[:1].double().expand(200, -1, -1, -1))
    # of the last block attention, MLP and bypass are each kept or dropped: 8 outcomes, 4 if two shared one draw
    assert len(rows.detach().round(decimals=6).unique(dim=0)) == 8


def test_convpass_says_what_to_do_without_a_grid() -> None:
    plugin = moved(pt.Convpass(roles=("attn",)), [branch()])
    with pytest.raises(pt.PluginError, match=r"needs the whole patch grid at blocks\.0\.attn.*patch dropout"):
        plugin.add(branch(), normal(1, 5, 4), Here(Flow(1, None)))


def test_convpass_names_the_roles_a_backbone_has() -> None:
    with pytest.raises(pt.PluginError, match="Convpass was asked for fc1; this backbone has attn, mlp"):
        pt.adapt(vit(), pt.Convpass(roles=("attn", "fc1")))


@pytest.mark.parametrize(
    "name", ["vit_non_square", "dinov2_registers", "deit_distilled", "beit", "swin_padded", "hf_vit"]
)
def test_convpass_serves_every_family(name: str) -> None:
    model = joined(pt.Convpass(), MODELS[name]())
    images = model.view.probe(model.backbone)
    assert not torch.equal(model(images), model.view.answer(model.backbone, images))


@pytest.mark.parametrize("bias", [True, False])
def test_adaptformer_reads_the_residual_stream_before_the_mlps_norm(bias: bool) -> None:
    backbone = randomised(vit())
    model = joined(pt.AdaptFormer(dim=8, scale=0.5, bias=bias), backbone)
    down, up = model.plugins[0].down, model.plugins[0].up
    x = backbone._pos_embed(backbone.patch_embed(IMAGES))
    for i, block in enumerate(backbone.blocks):
        x = x + block.attn(block.norm1(x))
        code = F.relu(x @ down.weight[i].T + (down.bias[i] if bias else 0))
        x = x + block.mlp(block.norm2(x)) + 0.5 * (code @ up.weight[i].T + (up.bias[i] if bias else 0))
    expected = backbone.forward_head(backbone.norm(x), pre_logits=True)
    torch.testing.assert_close(model.forward_features(IMAGES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("placement", "parts"), [("houlsby", ("attn.proj", "mlp.fc2")), ("pfeiffer", ("mlp.fc2",))])
@pytest.mark.parametrize("name", ["vit", "deit3"])
def test_adapter_is_a_hook_behind_the_output_map(name: str, placement: str, parts: tuple[str, ...]) -> None:
    backbone = MODELS[name]()
    model, by_hand = joined(pt.Adapter(placement=placement, scale=0.5), backbone), copy.deepcopy(backbone)
    down, up = model.plugins[0].down, model.plugins[0].up
    for i, part in enumerate(f"blocks.{block}.{part}" for block in range(2) for part in parts):

        def adapter(y: Tensor, i: int = i) -> Tensor:
            code = F.gelu(F.linear(y, down.weight[i], down.bias[i]))
            return y + 0.5 * F.linear(code, up.weight[i], up.bias[i])

        patched(by_hand, part, adapter)
    torch.testing.assert_close(model.forward_features(IMAGES), features(by_hand), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("make", "is_dropped"), [(pt.AdaptFormer, False), (pt.Adapter, True), (pt.Convpass, True)])
def test_stochastic_depth_drops_what_lies_inside_the_branch(make: Callable[[], Plugin], is_dropped: bool) -> None:
    model = joined(make(), randomised(vit()))
    model.set_drop_path(1.0)
    model.train()
    torch.manual_seed(0)
    before = model.forward_features(IMAGES)
    with torch.no_grad():
        model.plugins[0].up.bias[len(model.plugins[0].sites) - 1].add_(normal(WIDTH))
    torch.manual_seed(0)
    # in the last block every branch is dropped, and with it what lies inside; AdaptFormer's addition lies outside
    assert torch.equal(model.forward_features(IMAGES), before) == is_dropped


@pytest.mark.parametrize("make", [pt.AdaptFormer, pt.Adapter, pt.Convpass])
def test_bottlenecks_keep_to_mixed_precision(make: Callable[[], Plugin]) -> None:
    model = joined(make(), vit())
    expected = model.forward_features(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.forward_features(IMAGES)
    assert found.dtype == expected.dtype
    # bfloat16 keeps 8 bits
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pt.AdaptFormer(dim=0), "dim must be at least 1, got 0"),
        (lambda: pt.Adapter(placement="both"), "placement houlsby or pfeiffer; got dim 8 and placement 'both'"),
        (lambda: pt.Convpass(init="zeros"), "init xavier or dirac; got dim 8 and init 'zeros'"),
    ],
)
def test_bottlenecks_refuse_settings_they_do_not_know(make: Callable[[], Plugin], message: str) -> None:
    with pytest.raises(pt.PluginError, match=message):
        make()


@pytest.mark.parametrize("seed", range(5))
def test_a_bottleneck_of_width_one_is_proven_alive(seed: int) -> None:
    pt.adapt(vit(), pt.AdaptFormer(dim=1), classes=["a", "b"], seed=seed)


def test_what_is_dead_in_every_draw_is_found() -> None:
    class Dead(pt.AdaptFormer):
        def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
            return super().add(site, x, here) * (site.block == 0)

    with pytest.raises(
        pt.ProofError, match=r"the plugin at blocks\.1\.mlp adds nothing there even with random tensors"
    ):
        pt.adapt(vit(), Dead(dim=1))
