"""What the timm families share: classifier, transform, attention core, MLPs, blocks."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import DropPath, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from ..core.attended import Attended
from ..core.flow import Flow
from ..core.site import Kind, Site, Slot
from ..core.taps import Taps
from ..core.view import View
from ..errors import MergeError
from ..nn.attention import attend as attention
from ._parts import affine_site, fused_sites, linear_site, need, run_linear, run_linears, thirds
from ._pooling import attention_pool, weighed

Attend = Callable[[Tensor, Flow], tuple[Tensor, Attended]]


class TimmView(View):
    """What every timm image model answers in the same way."""

    stack: ClassVar[str] = "blocks"
    """Where the model keeps its blocks or stages."""

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        if flow.sizes is not None and getattr(model, "attn_pool", None) is not None:
            return model.head_drop(model.fc_norm(attention_pool(model, tokens, flow)))
        return model.forward_head(weighed(model, tokens, flow), pre_logits=True)

    def classify(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        if flow.sizes is not None and getattr(model, "attn_pool", None) is not None:
            return model.head(self.pool(model, tokens, flow))
        return model.forward_head(weighed(model, tokens, flow))

    def answer(self, model: Any, images: Tensor) -> Tensor:
        return model(images)

    def num_features(self, model: Any) -> int:
        return model.head_hidden_size

    def classifiers(self, model: Any) -> Sequence[str]:
        heads = model.get_classifier()
        heads = heads if isinstance(heads, tuple) else (heads,)
        return [name for name, module in model.named_modules() if any(module is head for head in heads)]

    def set_head(self, model: Any, head: nn.Linear) -> None:
        model.reset_classifier(head.out_features)
        names = self.classifiers(model)
        if not names:
            raise MergeError(f"{type(model).__name__} has no classifier to carry the head")
        for name in names:
            model.get_submodule(name).to(head.weight).load_state_dict(head.state_dict())

    def set_drop_path(self, model: Any, rate: float) -> None:
        blocks = list(self.blocks(model))
        for i, (_, block) in enumerate(blocks):
            p = rate * i / max(1, len(blocks) - 1)
            # a new module is in training mode, whatever the block is in
            block.drop_path1, block.drop_path2 = (DropPath(p).train(block.training) for _ in range(2))

    def input_config(self, model: Any) -> dict[str, Any]:
        cfg = resolve_model_data_config(model)
        size = getattr(model.patch_embed, "img_size", None)
        return {**cfg, "input_size": (cfg["input_size"][0], *(size or cfg["input_size"][1:]))}

    def identify(self, model: Any) -> dict[str, str]:
        cfg = getattr(model, "pretrained_cfg", {})
        return {"name": cfg.get("architecture") or type(model).__name__, "tag": cfg.get("tag") or ""}

    def sites(self, model: Any) -> Sequence[Site]:
        sites = [
            site for i, (name, block) in enumerate(self.blocks(model)) for site in self.block_sites(name, block, i)
        ]
        sites = [site for site in sites if site.kind not in self.absent(model)]
        part = "norm" if getattr(model.patch_embed.norm, "weight", None) is not None else "proj"
        patches = affine_site("patch_embed", f"patch_embed.{part}", getattr(model.patch_embed, part), 0)
        return [*patches, *sites, *affine_site("norm", "norm", model.norm, sites[-1].block)]

    def block_sites(self, name: str, block: Any, i: int) -> list[Site]:
        """Returns the sites of one block, in the order of the walk."""
        return block_sites(name, block, i)

    def absent(self, model: Any) -> Sequence[Kind]:
        """Returns the kinds of sites there are none of: `tokens` where the attention needs every patch in its place,
        `input` where it takes no tokens beside the model's own."""
        return ()

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Yields name and module of each block, in the order of the walk."""
        return ((f"blocks.{i}", block) for i, block in enumerate(model.blocks))


def need_blocks(view: TimmView, model: Any, block: tuple[type, ...], attention: tuple[type, ...]) -> None:
    """Looks for the parts of every block of a timm transformer.

    Raises:
        BackboneError: A part is absent or of another type.
    """
    need(model, view.stack, (nn.Sequential, nn.ModuleList))
    for name, _ in view.blocks(model):
        need(model, name, block)
        for part in ("norm1", "drop_path1", "norm2", "drop_path2"):
            need(model, f"{name}.{part}")
        need(model, f"{name}.attn", attention)
        need(model, f"{name}.mlp", (Mlp, GluMlp, SwiGLU))


def patch_grid(model: Any, images: Tensor) -> tuple[int, int]:
    """Returns height and width of the patch grid for these images."""
    if getattr(model, "dynamic_img_size", False):
        return model.patch_embed.dynamic_feat_size(images.shape[-2:])
    return model.patch_embed.grid_size


def drops_patches(model: Any) -> bool:
    """Whether the model drops random patches in this pass, so that the rest is no grid."""
    patch_drop = getattr(model, "patch_drop", None)
    return model.training and patch_drop is not None and not isinstance(patch_drop, nn.Identity)


def biases(flow: Flow, q: Tensor) -> tuple[Tensor, ...]:
    """Returns what the flow adds to the scores of queries `[B, h, N, d_head]`, as masks."""
    return () if flow.bias is None else (flow.bias.to(q.dtype),)


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
    """Returns what the heads attend to `[B, N, d]`, by the model's own kernel.

    Args:
        attn: The attention module, for its switches.
        q: Queries `[B, h, N, d_head]`.
        k: Keys, alike.
        v: Values, alike.
        masks: Added to the scores, one after the other.
    """
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        mask = sum(masks[1:], masks[0]) if masks else None
        y = attention(q, k, v, mask, dropout)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        y = attn.attn_drop(sum(masks, scores).softmax(dim=-1)) @ v
    return y.transpose(1, 2).flatten(2)


def run_qkv(attn: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v `[B, N, d]` with the plugins' additions, from fused or separate maps.

    Args:
        attn: An attention module with `qkv`, or with `q_proj`, `k_proj` and `v_proj`.
        name: Its name.
        x: Normed input `[B, N, d]`.
        taps: Where to call out.
        flow: Facts about the tokens.
    """
    names = (f"{name}.q", f"{name}.k", f"{name}.v")
    if attn.qkv is None:
        q, k, v = run_linears((attn.q_proj, attn.k_proj, attn.v_proj), names, x, taps, flow)
        return q, k, v
    if getattr(attn, "q_bias", None) is None:
        fused = attn.qkv(x)
    else:
        # biases outside the map, so that the host itself reaches past `qkv`: a plugin hung on that module is dead
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        fused = attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)
    q, k, v = taps.linear(names, x, fused, attn.qkv.weight, flow)
    return q, k, v


def run_attention(
    attn: Any, name: str, taps: Taps, turn: Callable[[Tensor, Flow], Tensor] | None, x: Tensor, flow: Flow
) -> tuple[Tensor, Attended]:
    """Returns the attention's output `[B, N, d]`, and its queries and keys.

    Args:
        attn: An attention module with norms of q and k, and perhaps a gate or fewer heads for k and v than for q.
        name: Its name.
        taps: Where to call out.
        turn: Rotation of q and k by position, None for none.
        x: Normed input `[B, N, d]`.
        flow: Facts about the tokens.
    """
    gate = None if getattr(attn, "gate", None) is None else attn.gate(x).sigmoid()
    q, k, v = run_qkv(attn, name, x, taps, flow)
    q, k, v = (t.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for t in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if turn is not None:
        q, k = turn(q, flow).type_as(v), turn(k, flow).type_as(v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    y = attn.norm(attend(attn, q, k, v, *biases(flow, q)))
    y = y if gate is None else y * gate
    return attn.proj_drop(run_linear(attn.proj, f"{name}.proj", y, taps, flow)), Attended(q, k, attn.scale)


def run_block(block: Any, name: str, taps: Taps, attention: Attend, x: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
    """Returns the residual stream after one pre-norm block, and what is now true of it.

    Args:
        block: The block.
        name: Its name.
        taps: Where to call out.
        attention: From normed input and facts to the attention's output, and its queries and keys.
        x: Residual stream `[B, N, d]`.
        flow: Facts about the tokens.
    """
    h = taps.affine(f"{name}.norm1", block.norm1(x), flow)
    y, attended = attention(h, flow)
    x = taps.branch(f"{name}.attn", x + block.drop_path1(scaled(block, 1, y)), h, flow, residual=x)
    x, flow = taps.tokens(f"{name}.tokens", x, attended, flow)
    del attended  # queries and keys need not live on through the MLP
    h = taps.affine(f"{name}.norm2", block.norm2(x), flow)
    y = run_mlp(block.mlp, f"{name}.mlp", h, taps, flow)
    return taps.branch(f"{name}.mlp", x + block.drop_path2(scaled(block, 2, y)), h, flow, residual=x), flow


def scaled(block: Any, branch: int, y: Tensor) -> Tensor:
    """Returns a branch's output times its LayerScale gains: a module `ls1`, a parameter `gamma_1`, or none."""
    if hasattr(block, f"ls{branch}"):
        return getattr(block, f"ls{branch}")(y)
    gamma = getattr(block, f"gamma_{branch}")
    return y if gamma is None else gamma * y


def run_mlp(mlp: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> Tensor:
    """Returns an MLP's output `[B, N, d]`; plain, packed-gated and split-gated MLPs."""
    if isinstance(mlp, SwiGLU):
        gate, value = run_linears((mlp.fc1_g, mlp.fc1_x), (f"{name}.fc1_g", f"{name}.fc1_x"), x, taps, flow)
        h = mlp.act(gate) * value
    else:
        h = run_linear(mlp.fc1, f"{name}.fc1", x, taps, flow)
        if isinstance(mlp, GluMlp):
            first, second = h.chunk(2, dim=-1)
            h = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
        else:
            h = mlp.act(h)
    h = mlp.norm(mlp.drop1(h))
    return mlp.drop2(run_linear(mlp.fc2, f"{name}.fc2", h, taps, flow))


def block_sites(name: str, module: Any, block: int) -> list[Site]:
    """Returns the sites of one timm transformer block, in the order of the walk.

    Args:
        name: The block's name.
        module: The block.
        block: Its index.
    """
    attn, mlp, width = module.attn, module.mlp, module.attn.proj.out_features
    rates = [getattr(drop, "drop_prob", 0.0) or 0.0 for drop in (module.drop_path1, module.drop_path2)]
    names = ("fc1_g", "fc1_x", "fc2") if isinstance(mlp, SwiGLU) else ("fc1", "fc2")
    return [
        Site(f"{name}.input", "input", block, width, width, width),
        *affine_site(f"{name}.norm1", f"{name}.norm1", module.norm1, block),
        *_qkv_sites(attn, f"{name}.attn", block, width, rates[0]),
        linear_site(f"{name}.attn.proj", f"{name}.attn.proj", attn.proj, block, width, rates[0]),
        Site(f"{name}.attn", "branch", block, width, width, width, drop_path=rates[0]),
        Site(f"{name}.tokens", "tokens", block, width, width, width),
        *affine_site(f"{name}.norm2", f"{name}.norm2", module.norm2, block),
        *(linear_site(f"{name}.mlp.{n}", f"{name}.mlp.{n}", getattr(mlp, n), block, width, rates[1]) for n in names),
        Site(f"{name}.mlp", "branch", block, width, width, width, drop_path=rates[1]),
    ]


def _qkv_sites(attn: Any, name: str, block: int, width: int, rate: float) -> list[Site]:
    if attn.qkv is None:
        maps = {role: getattr(attn, f"{role}_proj") for role in "qkv"}
        return [linear_site(f"{name}.{r}", f"{name}.{r}_proj", m, block, width, rate) for r, m in maps.items()]
    d = attn.qkv.out_features // 3
    biases = thirds(None if attn.qkv.bias is None else f"{name}.qkv.bias", d)
    if getattr(attn, "q_bias", None) is not None:
        biases = [Slot(f"{name}.q_bias", 0, d), None, Slot(f"{name}.v_bias", 0, d)]
    return fused_sites(name, d, block, width, rate, f"{name}.qkv.weight", biases)
