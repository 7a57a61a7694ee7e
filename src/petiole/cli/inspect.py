"""`petiole inspect`: say what a plugin file says."""

from ._options import AsJson, PluginFile


def inspect(file: PluginFile, as_json: AsJson = False) -> None:
    """Print everything a plugin file says about itself, with sizes.

    Example: petiole inspect runs/digits-fact/plugin.safetensors
    """
    from dataclasses import asdict

    from ..files import inspect as read
    from . import _show

    info = read(file)
    if as_json:
        _show.as_json({**asdict(info), "overhead_bytes": info.overhead_bytes})
        return
    backbone, transform = info.backbone, info.input_config
    name = ".".join(filter(None, (backbone["name"], backbone["tag"])))
    facts = [
        ("file", f"{info.path}, {_show.size(info.total_bytes)} ({_show.size(info.overhead_bytes)} of it overhead)")
    ]
    for plugin in info.plugins:
        settings = ", ".join(f"{key}={value}" for key, value in plugin["settings"].items())
        facts.append(("plugin", f"{plugin['method']}({settings})"))
    facts += [
        ("backbone", f"{name} ({backbone['class']}, width {backbone['width']}, {backbone['dtype']})"),
        ("fingerprint", backbone["fingerprint"]),
        ("transform", ", ".join(f"{key} {value}" for key, value in transform.items())),
        (
            "classes",
            "the backbone's own" if info.classes is None else f"{len(info.classes)}: {', '.join(info.classes)}",
        ),
        (
            "head",
            "the backbone's own" if info.head is None else f"{info.head['in_features']} x {info.head['out_features']}",
        ),
        ("token budget", "full" if info.token_budget is None else str(info.token_budget)),
        ("check", f"{info.check['num_images']} synthetic image(s), tolerance {info.check['tolerance']:g}"),
        *((f"metric {key}", f"{value:g}") for key, value in info.metrics.items()),
        ("notes", info.notes or "none"),
        ("written by", f"petiole {info.petiole}, schema version {info.schema_version}"),
    ]
    _show.facts(facts)
    rows = [(t.name, t.dtype, " x ".join(map(str, t.shape)), f"{t.num_bytes:,}") for t in info.tensors]
    _show.table(("tensor", "dtype", "shape", "bytes"), rows)
