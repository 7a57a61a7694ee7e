"""How plugins choose their sites."""

from collections.abc import Sequence

from ..core.plugin import Plugin
from ..core.site import Kind, Site
from ..errors import PluginError


def linear_sites(plugin: Plugin, sites: Sequence[Site], roles: Sequence[str] | None) -> list[Site]:
    """Returns the linear sites with one of the roles, all of them for None.

    Raises:
        PluginError: A role is found nowhere in the backbone; says which roles it has.
    """
    return _choose(plugin, sites, "linear", roles)


def branch_sites(plugin: Plugin, sites: Sequence[Site], roles: Sequence[str] | None) -> list[Site]:
    """Returns the branch sites with one of the roles, `attn` or `mlp`; all of them for None.

    Raises:
        PluginError: A role is found nowhere in the backbone; says which roles it has.
    """
    return _choose(plugin, sites, "branch", roles)


def token_sites(plugin: Plugin, sites: Sequence[Site]) -> list[Site]:
    """Returns the tokens sites, where a sequence can be shortened.

    Raises:
        PluginError: The backbone has none; says why that is so.
    """
    if found := [site for site in sites if site.kind == "tokens"]:
        return found
    raise PluginError(
        f"{type(plugin).__name__} needs a place where tokens can go, and this backbone has none: windows, relative or "
        "rotary positions belong to its whole grid"
    )


def _choose(plugin: Plugin, sites: Sequence[Site], kind: Kind, roles: Sequence[str] | None) -> list[Site]:
    found = [site for site in sites if site.kind == kind]
    known = list(dict.fromkeys(site.role for site in found))
    unknown = [role for role in roles or () if role not in known]
    if unknown or not found or (roles is not None and not roles):
        asked = ", ".join(unknown or roles or [f"a {kind} site"]) or "no role at all"
        raise PluginError(
            f"{type(plugin).__name__} was asked for {asked}; this backbone has {', '.join(known) or 'none'}"
        )
    return [site for site in found if roles is None or site.role in roles]
