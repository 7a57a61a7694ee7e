"""What the timm families share: classifier, transform, attention core, MLPs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import DropPath, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from ..core.flow import Flow
from ..core.site import Site, Slot
from ..core.taps import Taps
from ..core.view import View
from ..errors import BackboneError, MergeError


class TimmView(View):
    """What every timm image model answers in the same way."""

    def pool(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        return model.forward_head(tokens, pre_logits=True)

    def classify(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        return model.forward_head(tokens)

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
            block.drop_path1, block.drop_path2 = DropPath(p), DropPath(p)

    def input_config(self, model: Any) -> dict[str, Any]:
        cfg = resolve_model_data_config(model)
        size = getattr(model.patch_embed, "img_size", None)
        return {**cfg, "input_size": (cfg["input_size"][0], *(size or cfg["input_size"][1:]))}

    def identify(self, model: Any) -> dict[str, str]:
        cfg = getattr(model, "pretrained_cfg", {})
        return {"name": cfg.get("architecture") or type(model).__name__, "tag": cfg.get("tag") or ""}

    def blocks(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Yields name and module of each block, in the order of the walk."""
        return ((f"blocks.{i}", block) for i, block in enumerate(model.blocks))


def need(model: Any, part: str, kind: type | tuple[type, ...] = nn.Module) -> Any:
    """Returns a sub-module by its dotted name.

    Raises:
        BackboneError: It is absent or of another type; says which type was looked for and what was found.
    """
    found: object = model
    for step in part.split("."):
        found = getattr(found, step, None)
    if not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise BackboneError(
            f"{type(model).__name__} is not wired as expected: looked for {part} of type {wanted}, "
            f"found {type(found).__name__}"
        )
    return found


def need_blocks(view: TimmView, model: Any, block: tuple[type, ...], attention: tuple[type, ...]) -> None:
    """Looks for the parts of every block of a timm transformer.

    Raises:
        BackboneError: A part is absent or of another type.
    """
    for name, _ in view.blocks(model):
        need(model, name, block)
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


def attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns what the heads attend to `[B, N, d]` for q, k, v `[B, h, N, d_head]`, by the model's own kernel."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        y = attn.attn_drop((scores if mask is None else scores + mask).softmax(dim=-1)) @ v
    return y.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Returns `[B, N, d]` as `[B, h, N, d_head]`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def run_qkv(
    attn: Any, name: str, x: Tensor, taps: Taps, flow: Flow, fused: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v `[B, h, N, d_head]` with the plugins' additions, from fused or separate maps.

    Args:
        attn: An attention module with `qkv`, or with `q_proj`, `k_proj` and `v_proj`.
        name: Its name.
        x: Normed input `[B, N, d]`.
        taps: Where to call out.
        flow: Facts about the tokens.
        fused: How the fused map is applied; None calls `attn.qkv`.
    """
    if attn.qkv is not None:
        outputs: Sequence[Tensor] = (fused or attn.qkv)(x).chunk(3, dim=-1)
    else:
        outputs = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
    q, k, v = taps.linear((f"{name}.q", f"{name}.k", f"{name}.v"), x, outputs, flow)
    return split_heads(q, attn.num_heads), split_heads(k, attn.num_heads), split_heads(v, attn.num_heads)


def run_linear(module: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> Tensor:
    """Returns a linear map's output with the plugins' additions."""
    return taps.linear((name,), x, (module(x),), flow)[0]


def run_mlp(mlp: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> Tensor:
    """Returns an MLP's output `[B, N, d]`; plain, packed-gated and split-gated MLPs."""
    if isinstance(mlp, SwiGLU):
        parts = (mlp.fc1_g(x), mlp.fc1_x(x))
        gate, value = taps.linear((f"{name}.fc1_g", f"{name}.fc1_x"), x, parts, flow)
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


def linear_site(name: str, parameter: str, module: Any, block: int, width: int, drop_path: float) -> Site:
    """Returns the site of a whole linear map.

    Args:
        name: The site's name.
        parameter: The module's name in the state dict.
        module: The map.
        block: Index of its block.
        width: Width of the residual stream.
        drop_path: Stochastic-depth rate of its branch.
    """
    d_out, d_in = module.weight.shape
    bias = None if module.bias is None else Slot(f"{parameter}.bias", 0, d_out)
    return Site(name, "linear", block, width, d_in, d_out, Slot(f"{parameter}.weight", 0, d_out), bias, drop_path)


def fused_sites(
    name: str, d: int, block: int, width: int, drop_path: float, weight: str, biases: Sequence[Slot | None]
) -> list[Site]:
    """Returns the sites q, k, v of a fused map.

    Args:
        name: Name of the attention.
        d: Output width of each of the three.
        block: Index of the block.
        width: Width of the residual stream, which the map sees.
        drop_path: Stochastic-depth rate of the branch.
        weight: Name of the fused weight `[3 d, width]`.
        biases: Where each bias lies, None where there is none.
    """
    return [
        Site(f"{name}.{role}", "linear", block, width, width, d, Slot(weight, j * d, (j + 1) * d), biases[j], drop_path)
        for j, role in enumerate("qkv")
    ]


def block_sites(name: str, module: Any, block: int, qkv: Sequence[Site] | None = None) -> list[Site]:
    """Returns the sites of one timm transformer block, in the order of the walk.

    Args:
        name: The block's name.
        module: The block.
        block: Its index.
        qkv: The sites of q, k and v where the bias does not lie beside the weight.
    """
    attn, mlp = module.attn, module.mlp
    d = width = attn.proj.out_features
    rates = [getattr(drop, "drop_prob", 0.0) or 0.0 for drop in (module.drop_path1, module.drop_path2)]
    if qkv is None and attn.qkv is not None:
        d, parameter = attn.qkv.out_features // 3, f"{name}.attn.qkv"
        slots = [Slot(f"{parameter}.bias", j * d, (j + 1) * d) for j in range(3)]
        biases = slots if attn.qkv.bias is not None else [None, None, None]
        qkv = fused_sites(f"{name}.attn", d, block, width, rates[0], f"{parameter}.weight", biases)
    elif qkv is None:
        qkv = [
            linear_site(f"{name}.attn.{r}", f"{name}.attn.{r}_proj", getattr(attn, f"{r}_proj"), block, width, rates[0])
            for r in "qkv"
        ]
    names = ("fc1_g", "fc1_x", "fc2") if isinstance(mlp, SwiGLU) else ("fc1", "fc2")
    return [
        *qkv,
        linear_site(f"{name}.attn.proj", f"{name}.attn.proj", attn.proj, block, width, rates[0]),
        Site(f"{name}.attn", "branch", block, width, width, width, drop_path=rates[0]),
        Site(f"{name}.tokens", "tokens", block, width, width, width),
        *(linear_site(f"{name}.mlp.{n}", f"{name}.mlp.{n}", getattr(mlp, n), block, width, rates[1]) for n in names),
        Site(f"{name}.mlp", "branch", block, width, width, width, drop_path=rates[1]),
    ]
