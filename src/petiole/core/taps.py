"""The call-outs of a walk: where a view hands over to the plugins."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from .flow import Flow
from .plugin import Bypass, Plugin, Reducer
from .site import Site


class Taps:
    """Routes each call-out of a walk to the plugins that sit at that site; without plugins, everything passes through.

    Holds references only: the plugins belong to the adapted model.
    """

    def __init__(self, plugins: Iterable[Plugin] = ()) -> None:
        self.plugins = tuple(plugins)
        self.table: dict[str, list[tuple[Plugin, Site]]] = {}
        for plugin in self.plugins:
            for site in plugin.sites:
                self.table.setdefault(site.name, []).append((plugin, site))

    def linear(
        self, names: Sequence[str], x: Tensor, outputs: Tensor | Sequence[Tensor], flow: Flow
    ) -> Sequence[Tensor]:
        """Returns the outputs of linear maps that share the input `x`, one per name, with the plugins' additions.

        Args:
            names: Sites of the maps, e.g. q, k and v.
            x: Shared input `[B, N, d_in]`.
            outputs: One tensor `[B, N, d_out]` per name, or one with equally wide outputs side by side, as a fused
                map gives it: a plugin that sits at all of them then adds to all at once.
            flow: Facts about the tokens.
        """
        total = outputs[0] if len(names) == 1 and not isinstance(outputs, Tensor) else outputs
        here = [pair for name in names for pair in self.table.get(name, ())]
        for plugin in self.plugins if here else ():
            sites = [site for owner, site in here if owner is plugin]
            if not sites:
                continue
            if isinstance(total, Tensor) and len(sites) == len(names):
                total = self.onto(plugin, sites, x, total, flow)
            else:
                additions = side_by_side(self.ask(plugin, sites, x, flow), sites)
                place = {site.name: dy for site, dy in zip(sites, additions, strict=True)}
                parts = total.chunk(len(names), dim=-1) if isinstance(total, Tensor) else total
                total = [y + place[n] if n in place else y for n, y in zip(names, parts, strict=True)]
        return total.chunk(len(names), dim=-1) if isinstance(total, Tensor) else total

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
            y = y + side_by_side(self.ask(plugin, [site], x, flow, residual), [site])[0]
        return y

    def tokens(self, name: str, x: Tensor, keys: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns the token sequence after the reducers at a tokens site, and what is now true of it."""
        for plugin, site in self.table.get(name, ()):
            assert isinstance(plugin, Reducer)
            x, flow = plugin.reduce(site, x, keys, flow)
        return x, flow

    def onto(self, plugin: Plugin, sites: Sequence[Site], x: Tensor, y: Tensor, flow: Flow) -> Tensor:
        """Asks one plugin to add to the output of all linear sites of a group at once."""
        assert isinstance(plugin, Bypass)
        return plugin.add_onto(sites, x, y, flow)

    def ask(
        self, plugin: Plugin, sites: Sequence[Site], x: Tensor, flow: Flow, residual: Tensor | None = None
    ) -> Tensor | Sequence[Tensor]:
        """Asks one plugin for its additions at sites that share one input."""
        assert isinstance(plugin, Bypass)
        if residual is None:
            return plugin.add_group(sites, x, flow)
        return [plugin.add(site, x, flow, residual) for site in sites]


def side_by_side(additions: Tensor | Sequence[Tensor], sites: Sequence[Site]) -> Sequence[Tensor]:
    """Returns additions as one tensor per site, whichever way a plugin gave them."""
    if not isinstance(additions, Tensor):
        return additions
    return additions.split([site.d_out for site in sites], dim=-1) if len(sites) > 1 else (additions,)
