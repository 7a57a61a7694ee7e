"""Plugins as pairs of narrow matrices beside a backbone's linear modules, which is the form that PEFT keeps LoRA in.

    site.attn.q  A_q [r, d], B_q [d, r] ─┐                                  A = [A_q]    B = [B_q  0 ]
    site.attn.k  none                    ├─ one module, attn.qkv [3d, d]:       [A_v]        [ 0   0 ]
    site.attn.v  A_v [r, d], B_v [d, r] ─┘                                                   [ 0  B_v]

Sites of one module with the same A need it once: FacT on q, k and v has the rank r, not 3 r.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapted import Adapted
from ..core.plugin import Delta, Plugin, Tuning
from ..core.prove import eval_mode
from ..core.site import Site
from ..core.twin import twin
from ..core.view import View
from ..errors import PluginFileError, nearest
from ..nn.blocks import num_blocks
from ..nn.weights import QuantisedLinear
from ..plugins.fact import FacT
from ..plugins.lora import LoRA

MERGE_INSTEAD = "Fold it into an ordinary checkpoint with `petiole merge`"


@dataclass(frozen=True)
class Pair:
    """A low-rank change `up @ down` of one linear module's weight.

    Args:
        down: A `[r, d_in]`.
        up: B `[d_out, r]`, all scales folded in.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Width of the code between the two."""
        return len(self.down)


def linear_modules(view: View, backbone: nn.Module) -> dict[str, list[Site]]:
    """Returns the linear sites behind each `nn.Linear` of a backbone, by the module's name."""
    found: dict[str, list[Site]] = {}
    for site in view.sites(backbone):
        module, _ = _owner(backbone, site) if site.kind == "linear" else ("", None)
        if module:
            found.setdefault(module, []).append(site)
    return found


def linear_of(backbone: nn.Module, name: str) -> nn.Linear:
    """Returns a module that is known to be linear."""
    module = backbone.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


@torch.no_grad()
def pairs_of(model: Adapted) -> dict[str, Pair]:
    """Returns what the plugins of a model amount to, by the name of the module they change.

    Raises:
        PluginFileError: A plugin is no low-rank change, or sits at a map that is no `nn.Linear`.
    """
    parts: dict[str, list[tuple[slice, Pair]]] = {}
    for plugin in model.taps.plugins:
        if not isinstance(plugin, LoRA | FacT) and (plugin.sites or isinstance(plugin, Tuning)):
            raise PluginFileError(f"{type(plugin).__name__} cannot be written as PEFT's LoRA: {_reason(plugin)}")
        for site in plugin.sites:
            module, found = _owner(model.backbone, site)
            if not module:
                raise PluginFileError(
                    f"{type(plugin).__name__} at {site.name} cannot be written as PEFT's LoRA: that needs an "
                    f"nn.Linear, and {found}. {MERGE_INSTEAD}"
                )
            assert site.weight is not None
            parts.setdefault(module, []).append((slice(site.weight.start, site.weight.stop), _pair(plugin, site)))
    if not parts:
        raise PluginFileError("the model has no LoRA and no FacT, so there is nothing to write for PEFT")
    return {name: _joined(linear_of(model.backbone, name).out_features, found) for name, found in parts.items()}


def check_pairs(pairs: Mapping[str, Pair], modules: Mapping[str, object], backbone: nn.Module, where: str) -> None:
    """Checks that pairs fit the linear modules of a backbone.

    Args:
        pairs: By the name of the module.
        modules: The linear modules, by name.
        backbone: Their model.
        where: What messages call the checkpoint.

    Raises:
        PluginFileError: There is no such module, or it has another shape.
    """
    cls = type(backbone).__name__
    for name, pair in pairs.items():
        if name not in modules:
            raise PluginFileError(
                f"{where} changes {name}, which is no linear map of this {cls} where a plugin can sit"
                f"{nearest(name, modules)}"
            )
        (d_out, d_in), linear = (len(pair.up), pair.down.shape[1]), linear_of(backbone, name)
        if (d_out, d_in) != (linear.out_features, linear.in_features):
            raise PluginFileError(
                f"{where}: {name} maps {d_in} to {d_out} there, {linear.in_features} to {linear.out_features} in this "
                f"{cls}: give the backbone it was trained on"
            )


def take_pairs(pairs: Mapping[str, Pair], modules: Mapping[str, Sequence[Site]]) -> dict[str, Pair]:
    """Returns the pair of each site that pairs of modules change, without the ranks that do not reach it.

    A site that no rank reaches has none. Where nothing was trained yet, all keep all.

    Args:
        pairs: By the name of the module.
        modules: The sites behind each module.
    """
    is_trained = any(pair.up.any() for pair in pairs.values())
    found = {}
    for name, pair in pairs.items():
        for site in modules[name]:
            assert site.weight is not None
            up = pair.up[site.weight.start : site.weight.stop]
            reaches = up.any(dim=0) | (not is_trained)
            if reaches.any():
                found[site.name] = Pair(pair.down[reaches], up[:, reaches])
    return found


@torch.no_grad()
def fill(plugin: LoRA, pairs: Mapping[str, Pair]) -> None:
    """Puts the pairs of sites into an attached LoRA of at least their rank.

    Ranks and sites without a pair keep their random A beside a B of zero: they change nothing, and can be trained.
    """
    for i, site in enumerate(plugin.sites):
        if site.name in pairs:
            pair = pairs[site.name]
            plugin.down[i][: pair.rank] = pair.down
            plugin.up[i][:, : pair.rank] = pair.up


def as_peft_runs(model: Adapted, pairs: Mapping[str, Pair], advice: str) -> nn.Module:
    """Returns an ordinary model with the adapted model's head that runs pairs as PEFT does: beside whole modules.

    Args:
        model: Its backbone's weights are shared, not copied.
        pairs: By the name of the module.
        advice: What to do where PEFT cannot run them.

    Raises:
        PluginFileError: The backbone's own forward never calls a module, so that PEFT's change would be lost.
        MergeError: The backbone's class has no classifier for the head.
    """
    plain = twin(model.backbone).eval()
    if model.head is not None:
        model.view.set_head(plain, model.head.dense() if isinstance(model.head, QuantisedLinear) else model.head)
    called: set[str] = set()
    for name, pair in pairs.items():
        plain.get_submodule(name).register_forward_hook(_Beside(name, pair, called))
    with torch.no_grad(), eval_mode(plain):
        model.view.answer(plain, model.view.probe(plain))
    if dead := [name for name in pairs if name not in called]:
        raise PluginFileError(
            f"PEFT cannot change {dead[0]}: the forward of {type(plain).__name__} reads its weight and never calls the "
            f"module, so the change would be lost without a word. {advice}"
        )
    return plain


class _Beside:
    """A forward hook that adds a pair's change, and notes that the module was called."""

    def __init__(self, name: str, pair: Pair, called: set[str]) -> None:
        self.name, self.pair, self.called = name, pair, called

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.called.add(self.name)
        down, up = self.pair.down.to(output.device), self.pair.up.to(output.device)
        return output + (args[0].to(down.dtype) @ down.mT @ up.mT).to(output.dtype)


def _owner(backbone: nn.Module, site: Site) -> tuple[str, str]:
    """Returns the name of the `nn.Linear` behind a site; nothing and what was found instead where there is none."""
    assert site.weight is not None
    name, _, tensor = site.weight.name.rpartition(".")
    module = backbone.get_submodule(name)
    if isinstance(module, nn.Linear) and tensor == "weight":
        return name, ""
    return "", f"{site.weight.name} belongs to a {type(module).__name__}"


def _reason(plugin: Plugin) -> str:
    if isinstance(plugin, Tuning):
        return f"it trains tensors of the backbone itself. {MERGE_INSTEAD}"
    if isinstance(plugin, Delta):
        return f"its change of weights and biases is no product of two narrow matrices. {MERGE_INSTEAD}"
    return (
        "it is not a linear change of the backbone's weights. Keep it in a plugin file with petiole.save, or choose "
        "LoRA or FacT"
    )


def _pair(plugin: Plugin, site: Site) -> Pair:
    if isinstance(plugin, FacT):
        return _fact(plugin, site)
    assert isinstance(plugin, LoRA)
    i = plugin.index[site.name]
    return Pair(_widened(plugin.down[i]), plugin.scale * _widened(plugin.up[i]))


def _fact(plugin: FacT, site: Site) -> Pair:
    """Returns FacT at one site: U and the cores with V, or the cores with U and V, whichever is narrower."""
    u, v = (_widened(factor[str(site.width)]) for factor in (plugin.u, plugin.v))
    rows, columns = (num_blocks(d, site.width) for d in (site.d_in, site.d_out))
    cores = _widened(plugin.cores(site))
    ins, outs = torch.block_diag(*[u] * rows)[:, : site.d_in], torch.block_diag(*[v] * columns)[: site.d_out]
    return Pair(ins, outs @ cores.mT) if rows <= columns else Pair(cores.mT @ ins, outs)


def _joined(d_out: int, parts: Sequence[tuple[slice, Pair]]) -> Pair:
    """Returns one pair for a module `[d_out, d_in]` from the pairs of its sites, by their rows."""
    groups: list[Pair] = []
    for rows, part in parts:
        group = next((group for group in groups if torch.equal(group.down, part.down)), None)
        if group is None:
            groups.append(group := Pair(part.down, part.up.new_zeros(d_out, part.rank)))
        group.up[rows] += part.up
    return Pair(torch.cat([group.down for group in groups]), torch.cat([group.up for group in groups], dim=1))


def _widened(tensor: Tensor) -> Tensor:
    """Returns a tensor in at least fp32, as PEFT keeps adapters also beside backbones of half precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
