"""How plugins choose their sites."""

from collections.abc import Sequence

from ..core.plugin import Plugin
from ..core.site import Site
from ..errors import PluginError


def linear_sites(plugin: Plugin, sites: Sequence[Site], roles: Sequence[str] | None) -> list[Site]:
    """Returns the linear sites with one of the roles, all of them for None.

    Raises:
        PluginError: A role is found nowhere in the backbone; says which roles it has.
    """
    linear = [site for site in sites if site.kind == "linear"]
    known = list(dict.fromkeys(site.role for site in linear))
    unknown = [role for role in roles or () if role not in known]
    if unknown or not linear or roles == ():
        asked = ", ".join(unknown or roles or ["a linear site"]) or "no role at all"
        raise PluginError(
            f"{type(plugin).__name__} was asked for {asked}; this backbone has {', '.join(known) or 'none'}"
        )
    return [site for site in linear if roles is None or site.role in roles]
