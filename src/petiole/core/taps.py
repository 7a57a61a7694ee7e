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

    def linear(self, names: Sequence[str], x: Tensor, outputs: Sequence[Tensor], flow: Flow) -> Sequence[Tensor]:
        """Returns the outputs of linear maps that share the input `x`, with the plugins' additions.

        Args:
            names: Sites of the maps, e.g. q, k and v.
            x: Shared input `[B, N, d_in]`.
            outputs: One tensor `[B, N, d_out]` per name.
            flow: Facts about the tokens.
        """
        here = [pair for name in names for pair in self.table.get(name, ())]
        if not here:
            return outputs
        total = dict(zip(names, outputs, strict=True))
        for plugin in self.plugins:
            sites = [site for owner, site in here if owner is plugin]
            if sites:
                for site, dy in zip(sites, self.ask(plugin, sites, x, flow), strict=True):
                    total[site.name] = total[site.name] + dy
        return [total[name] for name in names]

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
            y = y + self.ask(plugin, [site], x, flow, residual)[0]
        return y

    def tokens(self, name: str, x: Tensor, keys: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns the token sequence after the reducers at a tokens site, and what is now true of it."""
        for plugin, site in self.table.get(name, ()):
            assert isinstance(plugin, Reducer)
            x, flow = plugin.reduce(site, x, keys, flow)
        return x, flow

    def ask(
        self, plugin: Plugin, sites: Sequence[Site], x: Tensor, flow: Flow, residual: Tensor | None = None
    ) -> Sequence[Tensor]:
        """Asks one plugin for its additions at sites that share one input."""
        assert isinstance(plugin, Bypass)
        if residual is None:
            return plugin.add_group(sites, x, flow)
        return [plugin.add(site, x, flow, residual) for site in sites]
