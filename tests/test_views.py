"""Every view walks its models bit for bit, and what it offers to plugins is what the model computes with."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from models import CLASSES, MODELS, WIDTH
from petiole.backbones import VIEWS, view_of
from petiole.core.attended import Attended
from petiole.core.flow import Flow
from petiole.core.here import Here
from petiole.core.plugin import Bypass, Reducer
from petiole.core.prove import prove_view
from petiole.core.site import Site
from petiole.core.taps import Step, Taps

RANDOM_IN_TRAINING = [
    "vit", "vit_unfused", "vit_patch_drop", "deit3", "beit", "beit_unfused", "eva", "eva02", "eva02_post_norm",
    "eva_dynamic", "dinov3", "swin", "swin_unfused", "hf_vit", "hf_dinov2", "hf_dinov2_registers", "hf_clip",
    "hf_siglip", "torchvision", "open_clip",
]  # fmt: skip
# families whose attention knows where on the grid every token is
BOUND = [n for n in MODELS if n.startswith(("beit", "eva_", "eva02", "dinov3", "swin")) and n != "eva02_post_norm"]
DROP_PATH_FREE = ("hf_vit", "hf_clip", "hf_siglip", "torchvision", "open_clip")

every_model = pytest.mark.parametrize("name", MODELS)


def own_answer(model: Any, images: Tensor) -> Tensor:
    """Returns the model's own answer. Gradients are on, so that `nn.MultiheadAttention` takes its ordinary path."""
    found = model(images)
    if isinstance(found, Tensor):
        return found
    tensors = [found.get(key) for key in ("logits", "image_embeds", "pooler_output", "last_hidden_state")]
    return next(t for t in tensors if t is not None)


def walked(model: nn.Module, images: Tensor, taps: Taps) -> Tensor:
    view = view_of(model)
    return view.classify(model, *view.run(model, images, taps))


def absent(name: str) -> set[str]:
    # rotary positions spare what is before the patches; windows and tables of relative positions know every token
    return {"tokens", "input"} if name.startswith(("beit", "swin")) else {"tokens"}


class Recorder(Taps):
    """Taps that keep what the walk offers."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: list[tuple[Sequence[str], Tensor, Sequence[Tensor], Flow]] = []
        self.weights: list[Tensor] = []
        self.order: list[str] = []
        self.attended: list[tuple[Tensor, Attended]] = []

    def block(self, name: str, x: Tensor, flow: Flow, run: Step) -> tuple[Tensor, Flow]:
        self.order.append(f"{name}.input")
        return super().block(name, x, flow, run)

    def affine(self, name: str, y: Tensor, flow: Flow) -> Tensor:
        self.order.append(name)
        return y

    def linear(
        self,
        names: Sequence[str],
        x: Tensor,
        outputs: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor],
        flow: Flow,
    ) -> Sequence[Tensor]:
        parts = super().linear(names, x, outputs, weights, flow)
        self.weights += weights.chunk(len(names)) if isinstance(weights, Tensor) else weights
        self.linears.append((names, x, parts, flow))
        self.order += names
        return parts

    def branch(self, name: str, y: Tensor, x: Tensor, flow: Flow, residual: Tensor) -> Tensor:
        self.order.append(name)
        return y

    def tokens(self, name: str, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        self.order.append(name)
        self.attended.append((x, attended))
        return x, flow


class Witness(Bypass):
    """A bypass on all branch sites that keeps what it sees and adds a multiple of it."""

    method = "witness"

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [site for site in sites if site.kind == "branch"]

    def build(self, generator: torch.Generator | None) -> None:
        self.gain = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[Site, Tensor, Flow, Tensor]] = []

    def add(self, site: Site, x: Tensor, here: Here) -> Tensor:
        assert here.residual is not None
        self.seen.append((site, x, here.flow, here.residual))
        return self.gain * x


class Halve(Reducer):
    """A reducer that keeps the prefix and every second patch."""

    method = "halve"

    def select(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [site for site in sites if site.kind == "tokens"]

    def build(self, generator: torch.Generator | None) -> None:
        """Creates nothing."""

    def reduce(self, site: Site, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        patches = x[:, flow.num_prefix :: 2]
        return torch.cat([x[:, : flow.num_prefix], patches], dim=1), Flow(flow.num_prefix, None)


def lora_everywhere(model: nn.Module) -> pt.LoRA:
    roles = dict.fromkeys(site.role for site in view_of(model).sites(model) if site.kind == "linear")
    return pt.LoRA(rank=2, roles=tuple(roles))


def fill(plugin: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in plugin.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))


@every_model
def test_walk_equals_model_bit_for_bit(name: str) -> None:
    model = MODELS[name]()
    images = view_of(model).probe(model)
    assert torch.equal(walked(model, images, Taps()), own_answer(model, images))


@every_model
def test_walk_equals_model_in_training_with_the_same_random_numbers(name: str) -> None:
    model = MODELS[name]()
    images = view_of(model).probe(model)
    still = own_answer(model, images)
    model.train()
    torch.manual_seed(3)
    expected = own_answer(model, images)
    torch.manual_seed(3)
    assert torch.equal(walked(model, images, Taps()), expected)
    assert name not in RANDOM_IN_TRAINING or not torch.equal(expected, still)


@pytest.mark.parametrize("name", ["torchvision", "open_clip"])
def test_pytorchs_fused_attention_differs_by_rounding_only(name: str) -> None:
    model = MODELS[name]()
    images = view_of(model).probe(model)
    with torch.no_grad():
        torch.testing.assert_close(walked(model, images, Taps()), model(images), rtol=1e-5, atol=1e-5)


@every_model
def test_prove_view_accepts_the_model(name: str) -> None:
    model = MODELS[name]()
    prove_view(view_of(model), model)


@every_model
def test_slots_reproduce_what_the_model_computes(name: str) -> None:
    model = MODELS[name]()
    view, taps, state = view_of(model), Recorder(), model.state_dict()
    sites = {site.name: site for site in view.sites(model)}
    view.run(model, view.probe(model), taps)
    for names, x, outputs, _ in taps.linears:
        for one, output in zip(names, outputs, strict=True):
            site = sites[one]
            assert site.weight is not None
            weight = state[site.weight.name][site.weight.start : site.weight.stop]
            bias = None if site.bias is None else state[site.bias.name][site.bias.start : site.bias.stop]
            assert x.shape[::2] == (2, site.d_in)
            assert output.shape == (*x.shape[:2], site.d_out)
            torch.testing.assert_close(F.linear(x, weight, bias), output, rtol=1e-5, atol=1e-5)
    linear = [site.name for site in view.sites(model) if site.kind == "linear"]
    for one, weight in zip(linear, taps.weights, strict=True):
        slot = sites[one].weight
        assert torch.equal(weight, state[slot.name][slot.start : slot.stop])


@every_model
def test_sites_are_those_the_walk_calls_in_its_order(name: str) -> None:
    model = MODELS[name]()
    view, taps = view_of(model), Recorder()
    view.run(model, view.probe(model), taps)
    sites = [site.name for site in view.sites(model)]
    assert sites == [one for one in taps.order if one in sites]
    left_out = {one.rpartition(".")[2] for one in taps.order if one not in sites}
    # norms without a weight are no sites, nor are places where tokens must not come or go
    assert left_out <= {"norm", "norm1", "norm2"} | (absent(name) if name in BOUND else set())


@every_model
def test_maps_with_one_input_are_offered_together(name: str) -> None:
    model = MODELS[name]()
    view, taps = view_of(model), Recorder()
    view.run(model, view.probe(model), taps)
    groups = {tuple(one.rsplit(".", 1)[1] for one in names) for names, *_ in taps.linears}
    assert groups - {("fc1",), ("fc1_g", "fc1_x")} == {("q", "k", "v"), ("proj",), ("fc2",)}


@every_model
def test_queries_and_keys_have_one_row_per_token(name: str) -> None:
    model = MODELS[name]()
    view, taps = view_of(model), Recorder()
    view.run(model, view.probe(model), taps)
    for x, attended in taps.attended:
        assert attended.queries.shape == attended.keys.shape
        assert attended.keys.ndim == 4
        assert attended.keys.shape[::2] == x.shape[:2]


@every_model
def test_plugins_are_alive_and_merge(name: str) -> None:
    backbone = MODELS[name]()
    model = pt.adapt(backbone, lora_everywhere(backbone))
    fill(model.plugins)
    plain = pt.merge(model)
    images = model.view.probe(backbone, num_images=3)
    with torch.no_grad():
        adapted, merged, frozen = model(images), model.view.answer(plain, images), model.view.answer(backbone, images)
    assert type(plain) is type(backbone)
    assert (merged - adapted).norm() <= 1e-5 * adapted.norm()
    assert (adapted - frozen).norm() >= 1e-2 * frozen.norm()


@every_model
def test_fact_is_alive_at_every_linear_site(name: str) -> None:
    backbone = MODELS[name]()
    model = pt.adapt(backbone, pt.FacT(rank=2), classes=["cat", "dog"])
    assert [s.name for s in model.taps.plugins[0].sites] == [
        s.name for s in model.view.sites(backbone) if s.kind == "linear"
    ]


@every_model
def test_full_fine_tuning_reaches_every_tensor(name: str) -> None:
    model = pt.adapt(MODELS[name](), pt.Full(), classes=["a", "b"])
    model(model.view.probe(model.backbone)).square().sum().backward()
    trained = dict(model.trained())
    assert len(trained) > 10
    assert all(p.grad is not None for p in trained.values())


@every_model
def test_branch_sites_see_every_token_of_the_batch(name: str) -> None:
    backbone = MODELS[name]()
    witness = Witness()
    model = pt.adapt(backbone, witness)
    model(model.view.probe(backbone, num_images=3))
    assert [site.name for site, *_ in witness.seen] == [site.name for site in witness.sites] != []
    for site, x, flow, residual in witness.seen:
        assert flow.grid is not None
        num_tokens = flow.num_prefix + flow.grid[0] * flow.grid[1]
        assert x.shape == residual.shape == (3, num_tokens, site.width)


@every_model
def test_backbone_stays_as_it_was(name: str) -> None:
    backbone = MODELS[name]()
    backbone.train()
    first = next(iter(backbone.parameters()))
    first.requires_grad_(False)
    state = copy.deepcopy(backbone.state_dict())
    flags = {n: p.requires_grad for n, p in backbone.named_parameters()}
    modes = {n: m.training for n, m in backbone.named_modules()}
    config = str(getattr(backbone, "config", ""))
    model = pt.adapt(backbone, lora_everywhere(backbone))
    model.train()(model.view.probe(backbone)).square().sum().backward()
    torch.optim.SGD([p for _, p in model.trained()], lr=0.1).step()
    pt.merge(model)
    assert all(torch.equal(t, state[n]) for n, t in backbone.state_dict().items())
    assert {n: p.requires_grad for n, p in backbone.named_parameters()} == flags
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    assert all(p.grad is None for p in backbone.parameters())
    assert str(getattr(backbone, "config", "")) == config


@every_model
def test_head_sees_num_features_and_merges_into_the_class(name: str) -> None:
    backbone = MODELS[name]()
    model = pt.adapt(backbone, classes=["cat", "dog", "owl"])
    images = model.view.probe(backbone)
    if not model.view.classifiers(backbone):
        with pytest.raises(pt.MergeError, match="has no classifier to carry the head"):
            pt.merge(model)
        return
    plain = pt.merge(model)
    assert model.view.answer(plain, images).shape == (2, 3)
    assert model.view.classifiers(plain) == model.view.classifiers(backbone)


@every_model
def test_input_config_has_the_keys_of_timm(name: str) -> None:
    model = MODELS[name]()
    view = view_of(model)
    config = view.input_config(model)
    assert {"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"} <= set(config)
    assert view.probe(model).shape == (2, *config["input_size"])
    assert set(view.identify(model)) == {"name", "tag"}


@every_model
def test_drop_path_grows_linearly_or_is_refused(name: str) -> None:
    model = MODELS[name]()
    view = view_of(model)
    view.set_drop_path(model, 0.0)
    if name.startswith(DROP_PATH_FREE):
        with pytest.raises(pt.BackboneError, match=r"has no stochastic depth, asked for drop_path 0\.1"):
            view.set_drop_path(model, 0.1)
        return
    view.set_drop_path(model, 0.1)
    rates = [site.drop_path for site in view.sites(model) if site.kind == "branch"][::2]
    assert rates == pytest.approx([0.1 * i / (len(rates) - 1) for i in range(len(rates))])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BOUND])
def test_reducer_shortens_what_follows(name: str) -> None:
    backbone = MODELS[name]()
    view, halve = view_of(backbone), Halve()
    halve.attach(view.sites(backbone))
    images = view.probe(backbone)
    tokens, flow = view.run(backbone, images, Taps([halve]))
    before, facts = view.run(backbone, images, Taps())
    assert tokens.shape[1] < before.shape[1]
    assert flow == Flow(facts.num_prefix, None)
    assert view.pool(backbone, tokens, flow).shape == (2, view.num_features(backbone))


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [("vit_dynamic", (24, 48), (3, 6)), ("eva_dynamic", (48, 24), (6, 3)), ("hf_dinov2", (24, 40), (3, 5)),
     ("hf_dinov2_registers", (40, 24), (5, 3)), ("swin_dynamic", (48, 40), (6, 5))],
)  # fmt: skip
def test_other_image_sizes_have_their_own_grid(name: str, size: tuple[int, int], grid: tuple[int, int]) -> None:
    model = MODELS[name]()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    _, flow = view_of(model).run(model, images, Taps())
    assert torch.equal(walked(model, images, Taps()), own_answer(model, images))
    assert flow.grid == grid


@pytest.mark.parametrize("name", ["vit_patch_drop", "eva_dynamic", "open_clip"])
def test_dropped_patches_are_no_grid(name: str) -> None:
    model = MODELS[name]()
    view = view_of(model)
    images = view.probe(model)
    assert view.run(model, images, Taps())[1].grid == (4, 4)
    assert view.run(model.train(), images, Taps())[1].grid is None


def test_swin_stages_have_their_own_width_and_grid() -> None:
    backbone = MODELS["swin"]()
    witness = Witness()
    model = pt.adapt(backbone, witness)
    model(model.view.probe(backbone))
    seen = {(site.name.split(".")[1], site.width, flow.grid) for site, _, flow, _ in witness.seen}
    assert seen == {("0", 16, (8, 8)), ("1", 32, (4, 4))}
    assert [site.block for site in witness.sites] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_swin_windows_are_unfolded_to_the_true_batch() -> None:
    model = MODELS["swin_padded"]()
    view, taps = view_of(model), Recorder()
    view.run(model, view.probe(model), taps)
    name, x, _, flow = taps.linears[0]
    # 10 x 6 patches in windows of 4 x 4: padded to 12 x 8
    assert (name[0], tuple(x.shape), flow) == ("layers.0.blocks.0.attn.q", (2, 96, 16), Flow(0, None))


def test_swin_map_is_neither_windowed_nor_shifted() -> None:
    backbone = MODELS["swin"]()
    witness = Witness()
    model = pt.adapt(backbone, witness, prove=False)
    inputs = []
    for block in model.backbone.layers[0].blocks:
        block.norm1.register_forward_hook(lambda m, args, out: inputs.append(out.flatten(1, 2)))
    model(model.view.probe(backbone))
    maps = [x for site, x, _, _ in witness.seen if site.role == "attn" and site.name.startswith("layers.0.")]
    assert all(torch.equal(x, expected) for x, expected in zip(maps, inputs, strict=True))


@pytest.mark.parametrize("name", ["beit", "eva", "eva02"])
def test_plugins_inside_a_bypassed_qkv_module_really_train(name: str) -> None:
    backbone = MODELS[name]()
    model = pt.adapt(backbone, pt.LoRA(rank=2, roles=("q", "k", "v")))
    images = model.view.probe(backbone)
    before = model(images)
    optimiser = torch.optim.SGD([p for _, p in model.trained()], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(images).square().sum().backward()
        optimiser.step()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trained())
    assert not torch.equal(model(images), before)


@pytest.mark.parametrize("name", ["beit", "eva"])
def test_biases_beside_a_fused_map_are_parameters_of_their_own(name: str) -> None:
    model = MODELS[name]()
    biases = {s.role: s.bias and s.bias.name for s in view_of(model).sites(model)[:6] if s.role in "qkv"}
    assert biases == {"q": "blocks.0.attn.q_bias", "k": None, "v": "blocks.0.attn.v_bias"}


def test_changed_block_is_found_by_the_proof() -> None:
    from timm.models.vision_transformer import Block

    class Doubled(Block):
        def forward(self, x: Tensor, **masks: Any) -> Tensor:
            x = x + 2 * self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    model = MODELS["vit_no_bias"]()
    changed = Doubled(WIDTH, 2, proj_bias=False)
    changed.load_state_dict(model.blocks[1].state_dict())
    model.blocks[1] = changed.eval()
    with pytest.raises(pt.ProofError, match=r"first differs at the output of blocks\.1\.norm2"):
        pt.adapt(model, pt.LoRA(rank=2))


def test_block_of_another_kind_is_refused_by_name() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    model = MODELS["vit"]()
    model.blocks[1] = ParallelScalingBlock(WIDTH, 2)
    with pytest.raises(pt.BackboneError, match=r"looked for blocks\.1 of type Block, found ParallelScalingBlock"):
        pt.adapt(model, pt.LoRA(rank=2))


@pytest.mark.parametrize(
    ("name", "part"),
    [("beit", "blocks.0.mlp"), ("eva02", "blocks"), ("swin", "layers.1.blocks.0.attn"), ("hf_vit", "vit.layers"),
     ("hf_dinov2", "dinov2.encoder.layer.1.layer_scale1"), ("hf_clip", "embeddings.patch_embedding"),
     ("torchvision", "encoder.layers.encoder_layer_0.mlp.3"), ("open_clip", "transformer.resblocks.1.attn")],
)  # fmt: skip
def test_missing_part_is_named(name: str, part: str) -> None:
    model = MODELS[name]()
    parent, _, last = part.rpartition(".")
    setattr(model.get_submodule(parent), last, None)
    with pytest.raises(pt.BackboneError, match=f"looked for {part} of type .*, found NoneType"):
        view_of(model)


def test_unknown_attention_kernel_is_refused_by_name() -> None:
    model = MODELS["hf_vit"]()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(pt.BackboneError, match=r"attends by 'flex_attention': looked for 'sdpa', 'eager' or"):
        view_of(model)


def test_unknown_model_is_told_what_was_looked_for() -> None:
    import timm

    for model in (nn.Linear(2, 2), timm.create_model("resnet10t"), timm.create_model("swinv2_cr_tiny_224")):
        with pytest.raises(pt.BackboneError, match="looked for one of these classes") as error:
            view_of(model)
        assert type(model).__qualname__ in str(error.value)
        assert all(known in str(error.value) for known in VIEWS)


def test_open_clip_tower_in_other_shape_is_refused() -> None:
    from models import _open_clip

    for settings, found in (({"qk_norm": True}, "CustomResidualAttentionBlock"), ({"pool_type": "none"}, "pool_type")):
        with pytest.raises(pt.BackboneError, match=found):
            view_of(_open_clip(**settings)())


def test_merge_of_a_bare_model_names_the_class_with_a_classifier() -> None:
    for name, family in (
        ("hf_vit_bare", "ViT"),
        ("hf_dinov2_bare", "Dinov2"),
        ("hf_clip", "CLIP"),
        ("hf_siglip", "Siglip"),
    ):
        model = pt.adapt(MODELS[name](), classes=["cat", "dog"])
        with pytest.raises(pt.MergeError, match=f"load the backbone as {family}ForImageClassification"):
            pt.merge(model)


def test_merged_transformers_model_says_its_number_of_labels() -> None:
    plain = pt.merge(pt.adapt(MODELS["hf_vit"](), classes=["cat", "dog"]))
    assert plain.config.num_labels == plain.num_labels == 2 != CLASSES
