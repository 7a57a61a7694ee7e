"""Token pruning by the class token's attention: against plain loops, the hosts' own attention, and what is refused."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import petiole as pt
from models import MODELS, randomised
from petiole.backbones import view_of
from petiole.core.attended import Attended
from petiole.core.flow import Flow
from petiole.core.site import Site
from petiole.core.taps import Taps
from test_tokens import SHORTENED, UNWEIGHED

CLASSES = ["a", "b", "c"]
CLASSED = [name for name in SHORTENED if "siglip" not in name]
# one block keeps three quarters of 16 patches, the next removes 4
BUDGET, KEPT = [0.75, 4], [12, 8]


class Watch(pt.EViT):
    """Keeps what it sees."""

    seen: list[tuple[Tensor, Flow, Tensor, Flow]]

    def reduce(self, site: Site, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        y, after = super().reduce(site, x, attended, flow)
        self.seen.append((x, flow, y, after))
        return y, after


class Scores(Taps):
    """Taps that keep the class token's attention in each block."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def tokens(self, name: str, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        self.scores.append(attended.class_attention(flow))
        return x, flow


def watched(backbone: nn.Module, *plugins: Any, budget: Any) -> tuple[Tensor, Flow, list[Any]]:
    """Final tokens, the facts about them, and what the reducer saw."""
    watch = Watch(budget=budget)
    watch.seen = []
    model = pt.adapt(backbone, *plugins, watch, prove=False).eval()
    tokens, flow = model.view.run(model.backbone, model.view.probe(backbone), model.taps)
    return tokens, flow, watch.seen


def softmax_by_loop(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def pruned_by_loop(x: Tensor, scores: Tensor, num_kept: int, num_protected: int) -> Tensor:
    """One sequence `[N, d]` after pruning to `num_kept` patches, the fused one among them, token by token."""
    order = sorted(range(num_protected, len(x)), key=lambda i: (-scores[i].item(), i))
    dropped = order[num_kept - 1 :]
    fused = sum(scores[i] * x[i] for i in dropped) / sum(scores[i] for i in dropped)
    return torch.stack([*(x[i] for i in range(len(x)) if i not in dropped), fused])


def timm_blocks(model: Any) -> list[tuple[Callable[..., Any], ...]]:
    return [
        (b.norm1, lambda h, b=b: b.attn.qkv(h).chunk(3, dim=-1), lambda y, b=b: b.ls1(b.attn.proj(y)), b.norm2,
         lambda h, b=b: b.ls2(b.mlp(h)))
        for b in model.blocks
    ]  # fmt: skip


def hf_blocks(model: Any) -> list[tuple[Callable[..., Any], ...]]:
    maps = ("q_proj", "k_proj", "v_proj")
    return [
        (b.layernorm_before, lambda h, a=b.attention: [getattr(a, name)(h) for name in maps], b.attention.o_proj,
         b.layernorm_after, b.mlp)
        for b in model.vit.layers
    ]  # fmt: skip


def answered_by_loop(name: str, model: Any, images: Tensor, num_protected: int) -> Tensor:
    """Logits of a model with two heads whose blocks prune, from the full matrix of attention."""
    is_hf = name.startswith("hf_")
    x = model.vit.embeddings(images) if is_hf else model._pos_embed(model.patch_embed(images))
    for (norm1, qkv, proj, norm2, mlp), kept in zip((hf_blocks if is_hf else timm_blocks)(model), KEPT, strict=True):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in qkv(norm1(x)))
        attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + proj((attention @ v).transpose(1, 2).flatten(2))
        scores = attention[:, :, 0].mean(dim=1)
        x = torch.stack([pruned_by_loop(*row, kept, num_protected) for row in zip(x, scores, strict=True)])
        x = x + mlp(norm2(x))
    return model.classifier(model.vit.layernorm(x)[:, 0]) if is_hf else model.forward_head(model.norm(x))


@pytest.mark.parametrize(
    ("name", "num_protected"), [("vit", 1), ("deit_distilled", 2), ("dinov2_registers", 5), ("hf_vit", 1)]
)
def test_answer_and_gradient_are_those_of_the_loop(name: str, num_protected: int) -> None:
    backbone = MODELS[name]().eval().double()
    images = view_of(backbone).probe(backbone).requires_grad_()
    found = pt.adapt(backbone, pt.EViT(budget=BUDGET))(images)
    expected = answered_by_loop(name, backbone, images, num_protected)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, pt.adapt(backbone)(images), rtol=1e-3)
    grads = [torch.autograd.grad(logits.square().sum(), images)[0] for logits in (found, expected)]
    torch.testing.assert_close(*grads)


def test_class_attention_is_that_of_the_loop_with_what_the_flow_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 5, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(2, 1, 1, 5, generator=generator, dtype=torch.float64)
    for flow, added in ((Flow(1, None), torch.zeros_like(bias)), (Flow(1, None, bias=bias), bias)):
        found = Attended(q, k, 0.3).class_attention(flow)
        for b in range(2):
            rows = [
                softmax_by_loop([0.3 * float(q[b, h, 0].dot(k[b, h, j])) + float(added[b, 0, 0, j]) for j in range(5)])
                for h in range(3)
            ]
            assert found[b].tolist() == pytest.approx([sum(column) / 3 for column in zip(*rows, strict=True)])


def test_class_attention_of_half_precision_is_taken_in_float32_also_under_autocast() -> None:
    q, k = torch.randn(2, 1, 2, 7, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = Attended(q.float(), k.float(), 0.25).class_attention(Flow(1, None))
    with torch.autocast("cpu", torch.bfloat16):
        found = Attended(q, k, 0.25).class_attention(Flow(1, None))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def host_attention(model: Any, images: Tensor) -> list[Tensor]:
    """The matrices of attention `[B, h, N, N]` of each block, from the host library itself."""
    found: list[Tensor] = []
    if hasattr(model, "config"):
        model.set_attn_implementation("eager")
        return list(model(images, output_attentions=True).attentions)

    def ask(attn: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query = args[0] if args else kwargs["query"]
        found.append(attn.forward(query, query, query, need_weights=True, average_attn_weights=False)[1])

    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(ask, with_kwargs=True)
        elif hasattr(module, "fused_attn"):
            module.fused_attn = False
        elif name.endswith("attn_drop"):
            module.register_forward_hook(lambda _, args, y: found.append(args[0]))
    model(images)
    return found


@pytest.mark.parametrize(
    "name",
    ["vit", "vit_qk_norm", "eva", "eva02_post_norm", "hf_vit", "hf_dinov2", "hf_dinov2_registers", "hf_clip",
     "torchvision", "open_clip_plain"],
)  # fmt: skip
def test_class_attention_is_the_hosts_own(name: str) -> None:
    model, taps = MODELS[name](), Scores()
    view = view_of(model)
    images = view.probe(model)
    view.run(model, images, taps)
    expected = [matrix[:, :, 0].mean(dim=1) for matrix in host_attention(model, images)]
    assert len(expected) == 2
    for scores, wanted in zip(taps.scores, expected, strict=True):
        torch.testing.assert_close(scores, wanted)


@pytest.mark.parametrize("name", CLASSED)
def test_budget_of_nothing_changes_no_bit(name: str) -> None:
    backbone = MODELS[name]().eval()
    images = view_of(backbone).probe(backbone)
    assert torch.equal(pt.adapt(backbone, pt.EViT(budget=0))(images), pt.adapt(backbone)(images))


@pytest.mark.parametrize("name", CLASSED)
def test_prefix_tokens_stay_and_sizes_add_up(name: str) -> None:
    _, flow, seen = watched(MODELS[name]().eval(), budget=3)
    assert len(seen) == 2
    total = seen[0][0].shape[1]
    for x, before, y, after in seen:
        assert torch.equal(y[:, : before.num_prefix], x[:, : before.num_prefix])
        assert x.shape[1] - y.shape[1] == 3
        assert after.sizes.sum(dim=1).tolist() == [total] * len(x)
        assert (after.grid, after.bias, after.has_class) == (None, None, True)
    assert flow.has_class


def test_fused_token_is_a_token_like_others_afterwards() -> None:
    _, _, seen = watched(MODELS["vit"]().eval(), budget=[6, 6])
    sizes = [after.sizes for *_, after in seen]
    assert sizes[0].tolist() == [[1] * 10 + [7]] * 2
    # in the second block it is kept, or fused with six others
    assert {tuple(row) for row in sizes[1].int().tolist()} <= {(1, 1, 1, 7, 7), (1, 1, 1, 1, 13)}


def test_budget_of_the_paper_shortens_as_its_docstring_says() -> None:
    backbone = VisionTransformer(img_size=56, patch_size=4, embed_dim=8, depth=12, num_heads=2, num_classes=0)
    _, _, seen = watched(backbone.eval(), budget=[0, 0, 0, 0.7, 0, 0, 0.7, 0, 0, 0.7])
    # of 196 patches 138 are left, of these 97, of these 68; beside them the class token
    assert [y.shape[1] for _, _, y, _ in seen] == [197] * 3 + [139] * 3 + [98] * 3 + [69] * 3


def test_gradient_reaches_plugins_through_the_scores_too() -> None:
    backbone = MODELS["vit"]().eval().double()
    model = pt.adapt(backbone, pt.LoRA(rank=2, roles=("k",)), pt.EViT(budget=BUDGET))
    generator, parameters = torch.Generator().manual_seed(0), list(model.plugins.parameters())
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.3 * draw(p.shape))
    images = model.view.probe(backbone)

    def loss() -> Tensor:
        return model(images).square().sum()

    direction, step = [draw(p.shape) for p in parameters], 1e-6
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), parameters), direction, strict=True))
    ends = []
    with torch.no_grad():
        for way in (step, -2 * step):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=way)
            ends.append(loss())
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=1e-6, atol=1e-6)


def test_pruned_model_trains_with_lora_and_comes_back_from_its_file(tmp_path: Any) -> None:
    model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=2), pt.EViT(budget=4), classes=CLASSES)
    images = model.view.probe(model.backbone)
    before = model.eval()(images)
    model.train()(images).square().sum().backward()
    torch.optim.SGD([p for _, p in model.trained()], lr=0.1).step()
    assert not torch.equal(model.eval()(images), before)
    pt.save(model, tmp_path / "fast.safetensors")
    assert torch.equal(pt.load(tmp_path / "fast.safetensors", pt.backbone("micro"))(images), model(images))


def test_pruned_model_is_exported() -> None:
    backbone = MODELS["vit"]().eval()
    model = pt.adapt(backbone, pt.EViT(budget=BUDGET))
    images = model.view.probe(backbone)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


def test_merging_and_pruning_share_a_model_in_blocks_of_their_own() -> None:
    backbone = MODELS["vit"]().eval()
    _, flow, seen = watched(backbone, pt.ToMe(budget=[4]), budget=[0, 5])
    assert [y.shape[1] for _, _, y, _ in seen] == [13, 8]
    assert flow.sizes.sum(dim=1).tolist() == [17, 17]
    torch.testing.assert_close(flow.bias, flow.sizes.log()[:, None, None])
    for first, second in ((pt.ToMe(budget=4), pt.EViT(budget=4)), (pt.EViT(budget=4), pt.ToMe(budget=4))):
        with pytest.raises(pt.PluginError, match=r"is the second to shorten the sequence at blocks\.0\.tokens"):
            pt.adapt(backbone, first, second)


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_stay_and_are_not_counted(deep: bool) -> None:
    backbone = MODELS["vit"]().eval()
    tokens, flow, seen = watched(backbone, pt.VPT(num_prompts=3, deep=deep), budget=4)
    assert [(x.shape[1], y.shape[1]) for x, _, y, _ in seen] == [(20, 16), (16, 12)]
    assert all(torch.equal(y[:, :4], x[:, :4]) for x, _, y, _ in seen)
    assert tokens.shape[1] == 9
    assert flow.sizes.sum(dim=1).tolist() == [17, 17]
    with pytest.raises(pt.PluginError, match="no class token"):
        pt.adapt(MODELS["siglip"](), pt.VPT(num_prompts=3, deep=deep), pt.EViT(budget=4))


def test_sizes_and_bias_of_merged_tokens_outlive_deep_prompts() -> None:
    _, flow, seen = watched(MODELS["vit"]().eval(), pt.VPT(num_prompts=3), pt.ToMe(budget=[4]), budget=[0, 4])
    assert torch.equal(seen[1][1].sizes[:, 1:4], torch.ones(2, 3))
    torch.testing.assert_close(seen[1][1].bias, seen[1][1].sizes.log()[:, None, None])
    assert flow.sizes.sum(dim=1).tolist() == [17, 17]


def test_pooling_over_patches_weighs_the_fused_token_by_its_size() -> None:
    tokens, flow, _ = watched(backbone := MODELS["vit_avg_pool"]().eval(), budget=3)
    patches, sizes = tokens[:, 1:], flow.sizes[:, 1:, None]
    expected = backbone.fc_norm((patches * sizes).sum(dim=1) / 16)
    torch.testing.assert_close(view_of(backbone).pool(backbone, tokens, flow), expected)


def test_model_without_a_class_token_is_refused() -> None:
    registers = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        class_token=False,
        reg_tokens=4,
        global_pool="avg",
    )
    for backbone in (MODELS["siglip"](), randomised(registers)):
        for budget in (0, 2):
            with pytest.raises(pt.PluginError, match=r"EViT keeps .* this backbone has no class token: use ToMe"):
                pt.adapt(backbone, pt.EViT(budget=budget))


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(pt.PluginError, match="EViT needs a place where tokens can go"):
        pt.adapt(MODELS["swin"](), pt.EViT())
    with pytest.raises(pt.PluginError, match="Convpass needs the whole patch grid, which EViT takes apart"):
        pt.adapt(pt.backbone("micro"), pt.Convpass(), pt.EViT())
    with pytest.raises(pt.PluginError, match=r"0 or more, .* got -1"):
        pt.EViT(budget=-1)
    for name in UNWEIGHED:
        with pytest.raises(pt.PluginError, match="token compression"):
            pt.adapt(MODELS[name](), pt.EViT(budget=2))
