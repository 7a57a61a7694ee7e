"""The call-outs of a walk: where a view hands over to the plugins."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import PluginError
from .attended import Attended
from .flow import Flow
from .here import Here
from .plugin import Bypass, Plugin, Prompter, Reducer
from .site import Site

Step = Callable[[Tensor, Flow], tuple[Tensor, Flow]]


class Taps:
    """Routes each call-out of a walk to the plugins that sit at that site; without plugins, everything passes through.

    Holds references only: the plugins belong to the adapted model.

    Args:
        plugins: Attached plugins.
        is_checkpointed: Whether blocks are computed again in the backward pass instead of keeping their activations.
    """

    def __init__(self, plugins: Iterable[Plugin] = (), is_checkpointed: bool = False) -> None:
        self.plugins, self.is_checkpointed = tuple(plugins), is_checkpointed
        self.table: dict[str, list[tuple[Plugin, Site]]] = {}
        for plugin in self.plugins:
            for site in plugin.sites:
                self.table.setdefault(site.name, []).append((plugin, site))

    def block(self, name: str, x: Tensor, flow: Flow, run: Step) -> tuple[Tensor, Flow]:
        """Returns the residual stream after one block, and what is now true of it.

        Args:
            name: The block's name; its input site is `NAME.input`.
            x: Residual stream at the block's input `[B, N, d]`.
            flow: Facts about the tokens.
            run: The block's walk; may be called once more in the backward pass, so it must not look at variables that
                change.
        """
        for plugin, site in self.table.get(f"{name}.input", ()):
            assert isinstance(plugin, Prompter)
            x, flow = plugin.enter(site, x, flow)
        if self.is_checkpointed and torch.is_grad_enabled():
            x, flow = checkpoint(run, x, flow, use_reentrant=False)
            return x, flow
        return run(x, flow)

    def leave(self, x: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns the sequence after the last block without prompts, and what is now true of it."""
        if not flow.num_prompts:
            return x, flow
        plain = flow.without_prompts()
        return torch.cat([x[:, : plain.num_prefix], x[:, flow.num_prefix :]], dim=1), plain

    def linear(
        self,
        names: Sequence[str],
        x: Tensor,
        outputs: Tensor | Sequence[Tensor],
        weights: Tensor | Sequence[Tensor],
        flow: Flow,
    ) -> Sequence[Tensor]:
        """Returns the outputs of linear maps that share the input `x`, one per name, with the plugins' additions.

        Args:
            names: Sites of the maps, e.g. q, k and v.
            x: Shared input `[B, N, d_in]`.
            outputs: One tensor `[B, N, d_out]` per name, or one with equally wide outputs side by side, as a fused
                map gives it: a plugin that sits at all of them then adds to all at once.
            weights: Their frozen weights `[d_out, d_in]`, one per name or one above the other, as `outputs`.
            flow: Facts about the tokens.
        """
        total = outputs[0] if len(names) == 1 and not isinstance(outputs, Tensor) else outputs
        here = [pair for name in names for pair in self.table.get(name, ())]
        owners = [plugin for plugin in self.plugins if any(owner is plugin for owner, _ in here)] if here else []
        if owners:
            frozen = total.chunk(len(names), dim=-1) if isinstance(total, Tensor) else total
            rows = weights.chunk(len(names)) if isinstance(weights, Tensor) else weights
        for plugin in owners:
            sites = [site for owner, site in here if owner is plugin]
            places = [names.index(site.name) for site in sites]
            starts = tuple(i * frozen[0].shape[-1] for i in places) if isinstance(total, Tensor) else ()
            seen = Here(flow, None, tuple(frozen[i] for i in places), tuple(rows[i] for i in places if rows), starts)
            assert isinstance(plugin, Bypass)
            is_lone = len(owners) == 1 and (plugin.adds_to_some or len(sites) == len(names))
            if isinstance(total, Tensor) and is_lone:
                total = self.onto(plugin, sites, x, total, seen)
            else:
                additions = side_by_side(self.ask(plugin, sites, x, seen), sites)
                parts = list(total.chunk(len(names), dim=-1) if isinstance(total, Tensor) else total)
                for i, dy in zip(places, additions, strict=True):
                    parts[i] = parts[i] + dy
                total = parts
        return total.chunk(len(names), dim=-1) if isinstance(total, Tensor) else total

    def affine(self, name: str, y: Tensor, flow: Flow) -> Tensor:
        """Returns what a norm or the patch embedding gives, `[B, ..., d]`, with the plugins' additions."""
        if name not in self.table:
            return y
        tokens = y.reshape(len(y), -1, y.shape[-1])
        return self.linear((name,), tokens, (tokens,), (), flow)[0].reshape(y.shape)

    def branch(self, name: str, y: Tensor, x: Tensor, flow: Flow, residual: Tensor) -> Tensor:
        """Returns the residual stream `y` after a branch, with the plugins' additions.

        Args:
            name: The branch's site, e.g. `blocks.3.mlp`.
            y: Residual stream after the branch `[B, N, d]`.
            x: Normed input of the branch `[B, N, d]`.
            flow: Facts about the tokens.
            residual: Residual stream before the norm `[B, N, d]`.
        """
        for plugin, site in self.table.get(name, ()):
            y = y + side_by_side(self.ask(plugin, [site], x, Here(flow, residual)), [site])[0]
        return y

    def tokens(self, name: str, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns the token sequence after the reducers at a tokens site, and what is now true of it.

        Args:
            name: The tokens site, e.g. `blocks.3.tokens`.
            x: Residual stream after attention `[B, N, d]`.
            attended: The attention's queries and keys.
            flow: Facts about the tokens.

        Raises:
            PluginError: A second reducer would shorten what the first has shortened.
        """
        for plugin, site in self.table.get(name, ()):
            assert isinstance(plugin, Reducer)
            if x.shape[1] != attended.keys.shape[2] and plugin.requests[name]:
                raise PluginError(
                    f"{type(plugin).__name__} is the second to shorten the sequence at {name}, where attention has "
                    "not seen what the first left: give each budgets for other blocks, or use one of them"
                )
            x, flow = plugin.reduce(site, x, attended, flow)
        return x, flow

    def onto(self, plugin: Plugin, sites: Sequence[Site], x: Tensor, y: Tensor, here: Here) -> Tensor:
        """Asks one plugin to add to the output of all sites behind `y` at once."""
        assert isinstance(plugin, Bypass)
        return plugin.add_onto(sites, x, y, here)

    def ask(self, plugin: Plugin, sites: Sequence[Site], x: Tensor, here: Here) -> Tensor | Sequence[Tensor]:
        """Asks one plugin for its additions at sites that share one input."""
        assert isinstance(plugin, Bypass)
        return plugin.add_group(sites, x, here)


def spread(additions: Sequence[Tensor], starts: Sequence[int], width: int) -> Tensor:
    """Returns additions to some columns of an output as one to all of them `[B, N, width]`, zero elsewhere."""
    padded = [F.pad(dy, (i, width - i - dy.shape[-1])) for dy, i in zip(additions, starts or (0,), strict=True)]
    return sum(padded[1:], padded[0])


def side_by_side(additions: Tensor | Sequence[Tensor], sites: Sequence[Site]) -> Sequence[Tensor]:
    """Returns additions as one tensor per site, whichever way a plugin gave them."""
    if not isinstance(additions, Tensor):
        return additions
    return additions.split([site.d_out for site in sites], dim=-1) if len(sites) > 1 else (additions,)
