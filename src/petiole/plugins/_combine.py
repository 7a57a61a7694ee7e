"""Arithmetic of plugins, where it is exact: multiples of any change, sums of linear ones."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.plugin import Bypass, Plugin
from ..errors import PluginError
from ..nn.blocks import untile
from .fact import FacT
from .lora import LoRA
from .ssf import SSF

P = TypeVar("P", bound=Plugin)


def combine(plugins: Sequence[Plugin], factors: Sequence[float]) -> Plugin:
    """Returns a plugin whose change is the sum of the plugins' changes, each times its factor; see `pt.combine`."""
    kinds = {type(plugin) for plugin in plugins}
    if not plugins or len(plugins) != len(factors):
        raise PluginError(f"combine takes as many factors as plugins, got {len(factors)} for {len(plugins)}")
    if idle := [type(plugin).__name__ for plugin in plugins if not plugin.sites]:
        raise PluginError(
            f"combine takes plugins of an adapted model, model.plugins; {idle[0]} has no tensors at sites"
        )
    first = plugins[0]
    if any([s.name for s in p.sites] != [s.name for s in first.sites] for p in plugins):
        raise PluginError("the plugins sit at different sites of a backbone: train them with equal roles")
    if len(kinds) == 1 and type(first) in _SUMS:
        return _SUMS[type(first)](plugins, factors)
    if len(plugins) == 1 and isinstance(first, Bypass) and "scale" in first.settings():
        scaled: Any = first.taken()
        scaled.scale *= factors[0]
        return scaled
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    verb = "summed" if len(plugins) > 1 else "multiplied"
    raise PluginError(
        f"{names} cannot be {verb} into one plugin exactly: sums are of LoRA, of FacT or of SSF alone, multiples of "
        "methods with a scale. Give several plugins to one model instead"
    )


def _lora(plugins: Sequence[LoRA], factors: Sequence[float]) -> LoRA:
    # sum of f B A = [f1 B1, f2 B2] [A1; A2]
    tensors = {}
    for i in range(len(plugins[0].sites)):
        tensors[f"down.{i}"] = torch.cat([plugin.down[i] for plugin in plugins])
        ups = [factor * plugin.scale * plugin.up[i] for plugin, factor in zip(plugins, factors, strict=True)]
        tensors[f"up.{i}"] = torch.cat(ups, dim=1)
    rank = sum(plugin.rank for plugin in plugins)
    return _made(LoRA(rank=rank, roles=plugins[0].roles, dropout=plugins[0].dropout), plugins[0], tensors)


def _fact(plugins: Sequence[FacT], factors: Sequence[float]) -> FacT:
    # sum of f U S V^T = [U1, U2] diag(f1 S1, f2 S2) [V1, V2]^T: a tensor train, also of Tucker forms
    tensors = {}
    for key in plugins[0].u:
        sites = [site for site in plugins[0].sites if str(site.width) == key]
        cores = []
        for plugin, factor in zip(plugins, factors, strict=True):
            cores.append(factor * torch.cat([untile(plugin.cores(site), plugin.rank) for site in sites]))
        tensors[f"u.{key}"] = torch.cat([plugin.u[key] for plugin in plugins])
        tensors[f"v.{key}"] = torch.cat([plugin.v[key] for plugin in plugins], dim=1)
        tensors[f"core.{key}"] = torch.stack([torch.block_diag(*each) for each in zip(*cores, strict=True)])
    rank = sum(plugin.rank for plugin in plugins)
    return _made(FacT(rank=rank, roles=plugins[0].roles, dropout=plugins[0].dropout), plugins[0], tensors)


def _ssf(plugins: Sequence[SSF], factors: Sequence[float]) -> SSF:
    # what is stored is gamma - 1 and beta: the changes themselves
    states = [plugin.state_dict() for plugin in plugins]
    sums = {name: sum(f * s[name] for f, s in zip(factors, states, strict=True)) for name in states[0]}
    return _made(SSF(), plugins[0], sums)


def _made(fresh: P, like: Plugin, tensors: dict[str, Tensor]) -> P:
    fresh.attach(like.sites)
    fresh.to(next(like.parameters())).load_state_dict(tensors)
    return fresh.taken()


_SUMS: dict[type[Plugin], Callable[[Any, Sequence[float]], Plugin]] = {LoRA: _lora, FacT: _fact, SSF: _ssf}
