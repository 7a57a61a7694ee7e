"""`petiole doctor`: what a backbone offers, and which methods are alive on it."""

from typing import Annotated

import typer

from ._options import AsJson


def doctor(
    model: Annotated[str, typer.Argument(help="`micro` or a timm name with its tag")],
    pretrained: Annotated[bool, typer.Option(help="Load pretrained weights; random ones do for a proof")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a backbone's sites and prove every method on it.

    Example: petiole doctor vit_small_patch16_224
    """
    from ..adapt import adapt
    from ..backbones import view_of
    from ..backbones.bundled import backbone as build
    from ..core.prove import prove_view
    from ..errors import PetioleError
    from ..plugins import METHODS, method
    from . import _show

    host = build(model, pretrained=pretrained or model == "micro")
    view = view_of(host)
    prove_view(view, host)
    sites = view.sites(host)
    proofs = []
    for name in METHODS:
        try:
            adapted = adapt(host, method(name), classes=["a", "b"])
            count = sum(p.numel() for path, p in adapted.trained() if not path.startswith("head."))
            proofs.append((name, "alive", count))
        except PetioleError as error:
            proofs.append((name, f"refused: {error}", 0))
    if as_json:
        rows = [{"site": s.name, "kind": s.kind, "d_in": s.d_in, "d_out": s.d_out} for s in sites]
        methods = [{"method": n, "state": state, "parameters": count} for n, state, count in proofs]
        _show.as_json({"model": model, "view": type(view).__name__, "sites": rows, "methods": methods})
        return
    _show.say(f"{model}: {type(view).__name__} walks it as its own forward does, bit for bit")
    blocks = {s.block for s in sites}
    first = [s for s in sites if s.block == min(blocks)]
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
            for s in first
        ],
    )
    _show.table(("method", "proof", "parameters"), [(n, state, f"{count:,}") for n, state, count in proofs])
