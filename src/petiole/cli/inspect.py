"""`petiole inspect`: say what a file says."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._options import AsJson, PluginFile

if TYPE_CHECKING:
    from ..continual.saving import LearnerInfo
    from ..files import PluginInfo, TensorInfo
    from ..files.ladder import Step
    from ..vision_language.eyes_info import EyesInfo


def inspect(file: PluginFile, as_json: AsJson = False) -> None:
    """Print everything a file says, with sizes.

    A file is a plugin, the eyes of a language model, or a learner.
    """
    from ..files.metadata import kind_of

    show = {"eyes": _inspect_eyes, "learner": _inspect_learner}.get(kind_of(file) or "", _inspect_classifier)
    show(file, as_json)


def _inspect_classifier(file: Path, as_json: bool) -> None:
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
    _show_tensors(info.tensors)
    if steps := ladder(info):
        _show.table(("at bits a weight", "plugin bytes", "head bytes"), [_row(step) for step in steps])


def _inspect_eyes(file: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from ..vision_language.eyes_info import inspect_eyes
    from . import _show

    info = inspect_eyes(file)
    if as_json:
        _show.as_json({**asdict(info), "overhead_bytes": info.overhead_bytes})
        return
    _show.facts(_eyes_facts(info))
    _show_tensors(info.tensors)


def _inspect_learner(file: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from ..continual.saving import inspect_learner
    from . import _show

    info = inspect_learner(file)
    if as_json:
        _show.as_json(asdict(info))
        return
    _show.facts(_learner_facts(info))
    _show_tensors(info.tensors)


def _show_tensors(tensors: Iterable["TensorInfo"]) -> None:
    from . import _show

    tensors = list(tensors)
    rows = [(t.name, t.dtype, " x ".join(map(str, t.shape)), f"{t.num_bytes:,}") for t in tensors]
    rows.append((f"{len(rows)} tensors", "", "", f"{sum(t.num_bytes for t in tensors):,}"))
    _show.table(("tensor", "dtype", "shape", "bytes"), rows)


def _row(step: "Step") -> tuple[str, str, str]:
    plugin, head = (f"{size:,}" if size is not None else "" for size in (step.plugin_bytes, step.head_bytes))
    return str(step.bits), plugin, head


def _facts(info: "PluginInfo") -> list[tuple[str, str]]:
    own, head = "the backbone's own", info.head
    return [
        _file(info),
        *(("plugin", _plugin(plugin)) for plugin in info.plugins),
        ("backbone", _backbone(info.backbone)),
        ("fingerprint", info.backbone["fingerprint"]),
        ("transform", _transform(info.input_config)),
        ("classes", own if info.classes is None else f"{len(info.classes)}: {', '.join(info.classes)}"),
        ("head", own if head is None else f"{head['in_features']} x {head['out_features']}{_bits(head['bits'])}"),
        ("token budget", "full" if info.token_budget is None else str(info.token_budget)),
        ("check", f"{info.check['num_images']} synthetic image(s), tolerance {info.check['tolerance']:g}"),
        *_rest(info),
    ]


def _eyes_facts(info: "EyesInfo") -> list[tuple[str, str]]:
    model, eyes = info.language_model, info.eyes
    width = f"width {model['width']}, {model['dtype']}"
    facts = [
        _file(info),
        ("plugin", _plugin(info.plugin)),
        ("language model", f"{model['name']} ({model['class']}, {width})".lstrip()),
        ("fingerprint", model["fingerprint"]),
        ("template", repr(info.template)),
    ]
    if eyes is None or info.input_config is None:
        facts.append(("eyes", f"none: features of width {info.d_image} are given"))
    else:
        facts += [
            ("eyes", f"{_backbone(eyes)}, block {eyes['block']}, scales {', '.join(map(str, eyes['scales']))}"),
            *(("eyes' plugin", _plugin(plugin)) for plugin in eyes["plugins"]),
            ("eyes' fingerprint", eyes["fingerprint"]),
            ("transform", _transform(info.input_config)),
        ]
    facts.append(("class token", "one token in front of the text" if info.class_token else "not read"))
    return [*facts, ("check", f"features and logits, tolerance {info.check['tolerance']:g}"), *_rest(info)]


def _learner_facts(info: "LearnerInfo") -> list[tuple[str, str]]:
    from . import _show

    history = [] if info.journey is None else info.journey["history"]
    far = f"{len(history)} experiences done" if history else "no stream begun"
    return [
        ("file", f"{info.path}, {_show.size(info.total_bytes)}"),
        *_parts("learner", info.learner),
        ("classes", f"{len(info.classes)}: {', '.join(info.classes)}"),
        ("transform", "inputs are no images" if info.input_config is None else _transform(info.input_config)),
        ("journey", far),
        *((f"metric {key}", f"{value:.10g}") for key, value in info.metrics.items()),
        ("notes", info.notes or "none"),
        ("written by", f"petiole {info.petiole}"),
    ]


def _parts(name: str, words: Any) -> Iterator[tuple[str, str]]:
    """Yields what a learner is made of, a part a line."""
    if isinstance(words, Mapping) and "part" in words:
        inner = words["settings"]
        plain = ", ".join(f"{key}={value}" for key, value in inner.items() if not isinstance(value, Mapping))
        yield name, f"{words['part']}({plain})"
        for key, value in inner.items():
            yield from _parts(key, value)
    elif isinstance(words, Mapping) and "extractor" in words:
        yield name, f"features of {_backbone(words['extractor']['backbone'])}"
        for plugin in words["extractor"]["plugins"]:
            yield "plugin", _plugin(plugin)
    elif isinstance(words, Mapping) and "backbone" in words:
        yield name, _backbone(words["backbone"])
    elif isinstance(words, Mapping) and "network" in words:
        about = words["network"]
        yield name, f"{about['name']} ({about['class']}, {about['num_parameters']:,} parameters)".lstrip()


def _file(info: "PluginInfo | EyesInfo") -> tuple[str, str]:
    from . import _show

    return "file", f"{info.path}, {_show.size(info.total_bytes)} ({_show.size(info.overhead_bytes)} of it overhead)"


def _plugin(entry: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in entry["settings"].items())
    return f"{entry['method']}({settings}){_bits(entry['settings'].get('bits', 32))}"


def _backbone(entry: Mapping[str, Any]) -> str:
    name = ".".join(filter(None, (entry["name"], entry["tag"])))
    return f"{name} ({entry['class']}, width {entry['width']}, {entry['dtype']})"


def _transform(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items())


def _rest(info: "PluginInfo | EyesInfo") -> list[tuple[str, str]]:
    return [
        *((f"metric {key}", f"{value:.10g}") for key, value in info.metrics.items()),
        ("notes", info.notes or "none"),
        ("written by", f"petiole {info.petiole}, schema version {info.schema_version}"),
    ]


def _bits(bits: int) -> str:
    return "" if bits == 32 else f", {bits} bit{'s' * (bits > 1)} a weight"
