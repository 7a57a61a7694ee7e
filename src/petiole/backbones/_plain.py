"""Plain pre-norm transformers outside timm: one walk for all whose blocks differ in the names of their parts.

x -> norm1 -> q, k, v -> attention -> proj -> after1 -> + -> norm2 -> fc1 -> act -> fc2 -> after2 -> +
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.attended import Attended
from ..core.flow import Flow
from ..core.site import Site
from ..core.taps import Taps
from ..core.view import View
from ..errors import BackboneError
from ._parts import affine_site, at, linear_site, need, run_linear


@dataclass(frozen=True)
class Wiring:
    """What a family calls the parts of its blocks; dotted names, seen from the block.

    Args:
        blocks: The list of blocks, seen from the model's body.
        norm1: Norm before the attention.
        attn: The attention.
        proj: Its output map.
        after1: What its output passes before it is added.
        norm2: Norm before the MLP.
        fc1: First map of the MLP.
        act: What lies between the maps.
        fc2: Second map of the MLP.
        after2: What its output passes before it is added.
        patches: The patch convolution, seen from the body; empty where the walk cannot call out after it.
        norm: The norm of all tokens after the last block, alike.
    """

    blocks: str
    norm1: str
    attn: str
    proj: str
    after1: tuple[str, ...]
    norm2: str
    fc1: str
    act: tuple[str, ...]
    fc2: str
    after2: tuple[str, ...]
    patches: str = ""
    norm: str = ""


class PlainView(View):
    """Walks blocks by their wiring; a family adds its embedding, attention core and pooling."""

    wiring: ClassVar[Wiring]

    @abstractmethod
    def check_attention(self, model: Any, part: str) -> None:
        """Looks for the parts of one attention, `part` being its dotted name.

        Raises:
            BackboneError: A part is absent or of another type, or a switch is set that the walk does not know.
        """

    @abstractmethod
    def qkv_sites(self, attn: Any, name: str, part: str, block: int, width: int, drop_path: float) -> list[Site]:
        """Returns the sites q, k, v of the attention `name`, whose dotted name in the model is `part`."""

    @abstractmethod
    def run_attention(self, attn: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> tuple[Tensor, Attended]:
        """Returns the attention's output `[B, N, d]`, and its queries and keys."""

    def prefix(self, model: Any) -> str:
        """Returns the dotted name of the body that holds the blocks, with a last dot; empty for the model itself."""
        return ""

    def body(self, model: Any) -> Any:
        """Returns the module that holds embedding, blocks and final norm."""
        name = self.prefix(model)
        return at(model, name[:-1]) if name else model

    def blocks(self, model: Any) -> Iterator[tuple[str, str, Any]]:
        """Yields canonical name, dotted name in the model and module of each block, in the order of the walk."""
        path = self.prefix(model) + self.wiring.blocks
        for i, (child, block) in enumerate(at(model, path).named_children()):
            yield f"blocks.{i}", f"{path}.{child}", block

    def check(self, model: Any) -> None:
        w = self.wiring
        need(model, self.prefix(model) + w.blocks, (nn.ModuleList, nn.Sequential))
        for _, part, block in self.blocks(model):
            for inner in (w.norm1, w.norm2, *w.after1, *w.after2):
                need(model, f"{part}.{inner}")
            self.check_attention(model, f"{part}.{w.attn}")
            need(model, f"{part}.{w.attn}.{w.proj}", nn.Linear)
            for inner in self.mlp_maps(block).values():
                need(model, f"{part}.{inner}", nn.Linear)

    def mlp_maps(self, block: Any) -> dict[str, str]:
        """Returns role and dotted name of the linear maps of a block's MLP, in the order of the walk."""
        return {"fc1": self.wiring.fc1, "fc2": self.wiring.fc2}

    def drop_path(self, block: Any) -> float:
        """Returns the stochastic-depth rate of a block."""
        return 0.0

    def sites(self, model: Any) -> Sequence[Site]:
        sites: list[Site] = []
        for i, (name, part, block) in enumerate(self.blocks(model)):
            attn, inner, rate = at(block, self.wiring.attn), f"{part}.{self.wiring.attn}", self.drop_path(block)
            proj = at(attn, self.wiring.proj)
            width = proj.weight.shape[0]
            sites.append(Site(f"{name}.input", "input", i, width, width, width))
            sites += affine_site(f"{name}.norm1", f"{part}.{self.wiring.norm1}", at(block, self.wiring.norm1), i)
            sites += self.qkv_sites(attn, f"{name}.attn", inner, i, width, rate)
            sites.append(linear_site(f"{name}.attn.proj", f"{inner}.{self.wiring.proj}", proj, i, width, rate))
            sites.append(Site(f"{name}.attn", "branch", i, width, width, width, drop_path=rate))
            sites.append(Site(f"{name}.tokens", "tokens", i, width, width, width))
            sites += affine_site(f"{name}.norm2", f"{part}.{self.wiring.norm2}", at(block, self.wiring.norm2), i)
            for role, linear in self.mlp_maps(block).items():
                sites.append(linear_site(f"{name}.mlp.{role}", f"{part}.{linear}", at(block, linear), i, width, rate))
            sites.append(Site(f"{name}.mlp", "branch", i, width, width, width, drop_path=rate))
        ends = (("patch_embed", self.wiring.patches, 0), ("norm", self.wiring.norm, sites[-1].block))
        first, last = (
            affine_site(name, self.prefix(model) + part, at(self.body(model), part), i) if part else []
            for name, part, i in ends
        )
        return [*first, *sites, *last]

    def run_blocks(self, model: Any, x: Tensor, taps: Taps, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns the residual stream after the last block, and what is now true of it."""
        for name, _, block in self.blocks(model):
            x, flow = taps.block(name, x, flow, partial(self.run_block, block, name, taps))
        return taps.leave(x, flow)

    def run_block(self, block: Any, name: str, taps: Taps, x: Tensor, flow: Flow) -> tuple[Tensor, Flow]:
        """Returns the residual stream after one block, and what is now true of it."""
        w = self.wiring
        h = taps.affine(f"{name}.norm1", at(block, w.norm1)(x), flow)
        y, attended = self.run_attention(at(block, w.attn), f"{name}.attn", h, taps, flow)
        x = taps.branch(f"{name}.attn", x + through(block, w.after1, y), h, flow, residual=x)
        x, flow = taps.tokens(f"{name}.tokens", x, attended, flow)
        del attended  # queries and keys need not live on through the MLP
        h = taps.affine(f"{name}.norm2", at(block, w.norm2)(x), flow)
        y = self.run_mlp(block, f"{name}.mlp", h, taps, flow)
        return taps.branch(f"{name}.mlp", x + through(block, w.after2, y), h, flow, residual=x), flow

    def run_mlp(self, block: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> Tensor:
        """Returns the MLP's output `[B, N, d]`."""
        h = run_linear(at(block, self.wiring.fc1), f"{name}.fc1", x, taps, flow)
        return run_linear(at(block, self.wiring.fc2), f"{name}.fc2", through(block, self.wiring.act, h), taps, flow)

    def set_drop_path(self, model: Any, rate: float) -> None:
        if rate > 0:
            raise BackboneError(
                f"{type(model).__name__} has no stochastic depth, asked for drop_path {rate}: set it to 0"
            )

    def identify(self, model: Any) -> dict[str, str]:
        return {"name": type(model).__name__, "tag": ""}


def through(block: Any, parts: Sequence[str], y: Tensor) -> Tensor:
    """Returns a tensor after it has passed some parts of a block."""
    for part in parts:
        y = at(block, part)(y)
    return y
