"""`petiole doctor`: what a backbone offers, and which methods are alive on it."""

from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AsJson

if TYPE_CHECKING:
    from torch import nn

    from ..core.view import View


def doctor(
    model: Annotated[str, typer.Argument(help="`micro` or a timm name with its tag")],
    pretrained: Annotated[bool, typer.Option(help="Load pretrained weights; random ones do for a proof")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a model's sites; prove every method on it.

    Fails only where no view walks the model as its own forward does; a method that does not fit it is listed with the
    reason.
    """
    from ..backbones import view_of
    from ..backbones.bundled import backbone as build
    from ..core.prove import prove_view
    from . import _show

    host = build(model, pretrained=pretrained or model == "micro")
    view = view_of(host)
    prove_view(view, host)
    sites, proofs = view.sites(host), _proofs(host, view)
    if as_json:
        rows = [{"site": s.name, "kind": s.kind, "d_in": s.d_in, "d_out": s.d_out} for s in sites]
        _show.as_json({"model": model, "view": type(view).__name__, "sites": rows, "methods": proofs})
        return
    print(f"{model}: {type(view).__name__} walks it as its own forward does, bit for bit")
    blocks = {s.block for s in sites}
    _show.table(
        (f"site ({len(sites)} in {len(blocks)} blocks; the first block's)", "kind", "sees", "adds to", "weight"),
        [
            (
                s.name,
                s.kind,
                str(s.d_in),
                str(s.d_out),
                f"{s.weight.name}[{s.weight.start}:{s.weight.stop}]" if s.weight else "",
            )
            for s in sites
            if s.block == min(blocks)
        ],
    )
    settings = [", ".join(f"{key}={value}" for key, value in proof["settings"].items()) for proof in proofs]
    _show.table(
        ("method", "proof", "parameters", "settings"),
        [(p["method"], p["state"], f"{p['parameters']:,}", text) for p, text in zip(proofs, settings, strict=True)],
    )


def _proofs(host: "nn.Module", view: "View") -> list[dict]:  # type: ignore[type-arg]
    """Returns for every method whether it is alive on a backbone, or why it refuses it."""
    from ..core.adapted import Adapted
    from ..core.prove import prove_attached
    from ..errors import PetioleError
    from ..plugins import METHODS, method, settings_of

    proofs = []
    for name in METHODS:
        try:
            # not `adapt`, which would prove the walk again for every method
            adapted = Adapted(host, view, [method(name)], ["a", "b"])
            prove_attached(adapted)
            state, trained = "alive", adapted.trained()
            count = sum(p.numel() for path, p in trained if not path.startswith("head."))
        except PetioleError as error:
            state, count = f"refused: {' '.join(str(error).split())}", 0
        proofs.append({"method": name, "state": state, "parameters": count, "settings": settings_of(name)})
    return proofs
