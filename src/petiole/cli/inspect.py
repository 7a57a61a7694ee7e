"""`petiole inspect`: say what a plugin file says."""

from typing import TYPE_CHECKING

from ._options import AsJson, PluginFile

if TYPE_CHECKING:
    from ..files import PluginInfo
    from ..files.ladder import Step


def inspect(file: PluginFile, as_json: AsJson = False) -> None:
    """Print everything a plugin file says, with sizes."""
    from dataclasses import asdict

    from ..files import inspect as read
    from ..files.ladder import ladder
    from . import _show

    info = read(file)
    if as_json:
        sizes = [asdict(step) for step in ladder(info)]
        _show.as_json({**asdict(info), "overhead_bytes": info.overhead_bytes, "ladder": sizes})
        return
    _show.facts(_facts(info))
    rows = [(t.name, t.dtype, " x ".join(map(str, t.shape)), f"{t.num_bytes:,}") for t in info.tensors]
    rows.append((f"{len(rows)} tensors", "", "", f"{info.total_bytes - info.overhead_bytes:,}"))
    _show.table(("tensor", "dtype", "shape", "bytes"), rows)
    if steps := ladder(info):
        _show.table(("at bits a weight", "plugin bytes", "head bytes"), [_row(step) for step in steps])


def _row(step: "Step") -> tuple[str, str, str]:
    plugin, head = (f"{size:,}" if size is not None else "" for size in (step.plugin_bytes, step.head_bytes))
    return str(step.bits), plugin, head


def _facts(info: "PluginInfo") -> list[tuple[str, str]]:
    from . import _show

    own, head, backbone = "the backbone's own", info.head, info.backbone
    name = ".".join(filter(None, (backbone["name"], backbone["tag"])))
    facts = [
        ("file", f"{info.path}, {_show.size(info.total_bytes)} ({_show.size(info.overhead_bytes)} of it overhead)")
    ]
    for plugin in info.plugins:
        settings = ", ".join(f"{key}={value}" for key, value in plugin["settings"].items())
        facts.append(("plugin", f"{plugin['method']}({settings}){_bits(plugin['settings'].get('bits', 32))}"))
    return [
        *facts,
        ("backbone", f"{name} ({backbone['class']}, width {backbone['width']}, {backbone['dtype']})"),
        ("fingerprint", backbone["fingerprint"]),
        ("transform", ", ".join(f"{key} {value}" for key, value in info.input_config.items())),
        ("classes", own if info.classes is None else f"{len(info.classes)}: {', '.join(info.classes)}"),
        ("head", own if head is None else f"{head['in_features']} x {head['out_features']}{_bits(head['bits'])}"),
        ("token budget", "full" if info.token_budget is None else str(info.token_budget)),
        ("check", f"{info.check['num_images']} synthetic image(s), tolerance {info.check['tolerance']:g}"),
        *((f"metric {key}", f"{value:.10g}") for key, value in info.metrics.items()),
        ("notes", info.notes or "none"),
        ("written by", f"petiole {info.petiole}, schema version {info.schema_version}"),
    ]


def _bits(bits: int) -> str:
    return "" if bits == 32 else f", {bits} bit{'s' * (bits > 1)} a weight"
