"""The model card of a plugin on the Hugging Face Hub: metadata that the Hub reads, and a page that people read."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from ..nn.weights import FULL
from ..plugins import METHODS
from .metadata import PluginInfo

# What is shown of very many classes.
_MAX_CLASSES = 200
# The last line of a card: a hash of all lines above it, which tells a card as petiole wrote it from an edited one.
_MARK = re.compile(r"\n<!-- card by petiole, sha256 ([0-9a-f]{64}) -->\s*\Z")
_METADATA = re.compile(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)(.*)", re.DOTALL)
# Names of metrics that are the accuracy on a split, and what the Hub calls the split.
_ACCURACIES = {"test_accuracy": "test", "val_accuracy": "validation"}


def write_card(info: PluginInfo, repo: str, *, dataset: str | None = None, license_id: str | None = None) -> str:
    """Returns the model card of a plugin file as text: YAML metadata, Markdown, and a mark.

    Equal arguments give equal text.

    Args:
        info: What the file says about itself.
        repo: Where it is shared, `owner/name`.
        dataset: What it was trained on: a dataset of the Hub, `owner/name` or `owner/name:config`, or any other name.
            Accuracies become results of the model only where it is known.
        license_id: Licence as the Hub calls it, e.g. `apache-2.0`.
    """
    name = dataset.removeprefix("hf:") if dataset else ""
    text = f"---\n{_metadata(info, repo, name, license_id)}\n---\n\n{_page(info, repo, name)}"
    return f"{text}\n<!-- card by petiole, sha256 {_digest(text)} -->\n"


def is_replaceable(text: str) -> bool:
    """Returns whether a card may be replaced without loss.

    It may be where petiole wrote it and nobody edited it since, and where it says no more than a licence, which is
    what the Hub writes into a new repository.
    """
    if mark := _MARK.search(text):
        return _digest(text[: mark.start()]) == mark[1]
    found = _METADATA.fullmatch(text)
    return not (found[2] if found else text).strip() and set(_fields(text)) <= {"license"}


def license_of(text: str) -> str | None:
    """Returns the licence that a card names."""
    found = _fields(text).get("license")
    return found if isinstance(found, str) else None


def base_model(info: PluginInfo) -> str | None:
    """Returns the Hub's name of the backbone a file belongs to, None where it is not known to be there."""
    backbone = info.backbone
    name, tag, library = backbone["name"], backbone["tag"], backbone["class"].partition(".")[0]
    if library == "timm" and name != "micro" and re.fullmatch(r"\w+", name) and re.fullmatch(r"[\w.-]+", tag):
        return f"timm/{name}.{tag}"
    # transformers knows the commit of what it loaded from the Hub; a name without one may be a folder
    if library == "transformers" and tag and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return str(name)
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.replace("\r\n", "\n").rstrip().encode()).hexdigest()


def _fields(text: str) -> dict[str, Any]:
    """Returns a card's metadata, empty where it has none that can be read."""
    import yaml

    found = _METADATA.fullmatch(text)
    try:
        fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        fields = None
    return fields if isinstance(fields, dict) else {}


def _metadata(info: PluginInfo, repo: str, dataset: str, license_id: str | None) -> str:
    """Returns the card's metadata as YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    base, (hub_name, _, config) = base_model(info), dataset.partition(":")
    is_on_hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", hub_name))
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=hub_name if is_on_hub else re.sub(r"[^\w.-]+", "-", dataset),
            dataset_name=hub_name if is_on_hub else dataset,
            dataset_config=config or None if is_on_hub else None,
            dataset_split=split,
            metric_type="accuracy",
            metric_name="accuracy",
            metric_value=info.metrics[metric],
        )
        for metric, split in _ACCURACIES.items()
        if dataset and metric in info.metrics
    ]
    bits = {entry["settings"].get("bits", FULL) for entry in info.plugins} - {FULL}
    tags = ["petiole", *_unique(entry["method"] for entry in info.plugins), *(f"{b}-bit" for b in sorted(bits))]
    data = ModelCardData(
        license=license_id,
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="petiole",
        pipeline_tag="image-classification",
        tags=[*tags, "parameter-efficient-fine-tuning"],
        datasets=[hub_name] if is_on_hub else None,
        metrics=["accuracy"] if results else None,
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml())


def _page(info: PluginInfo, repo: str, dataset: str) -> str:
    """Returns the card's text as Markdown."""
    count = "the backbone's own classes" if info.classes is None else f"{len(info.classes):,} classes"
    trained = f" It was trained on {_plain(dataset)}." if dataset else ""
    parts = [
        f"# {repo.rpartition('/')[2]}",
        f"A plugin of petiole: small trained tensors that turn a frozen pretrained backbone into an image classifier "
        f"for {count}. The backbone's weights are not part of it.{trained}",
        *(["\n".join(f"> {_plain(line)}" for line in info.notes.splitlines())] if info.notes.strip() else []),
        "## How to use it",
        _usage(info, repo),
        "## What it is",
        _table(("", ""), _facts(info)),
        "## Input",
        _table(("transform", ""), ((_code(key), _plain(_value(value))) for key, value in info.input_config.items())),
    ]
    if info.metrics:
        parts += [
            "## Metrics",
            _table(("metric", "value"), ((_code(k), f"{v:.10g}") for k, v in info.metrics.items())),
        ]
    if info.classes is not None:
        parts += ["## Classes", _classes(info.classes)]
    return "\n\n".join(parts) + "\n"


def _usage(info: PluginInfo, repo: str) -> str:
    """Returns lines of Python that fetch the plugin and ask it, and of the shell where they do."""
    kind, is_named = info.backbone["class"], info.backbone["name"] == "micro" or base_model(info) is not None
    is_built = kind.startswith("timm.") and is_named
    lines = ["from PIL import Image", "", "import petiole as pt", ""]
    if not is_built:
        lines += [f"backbone = ...  # a {kind} with the weights named below", ""]
    lines += [
        f'model = pt.load(pt.pull("{repo}"){"" if is_built else ", backbone"})',
        'probabilities = pt.predict(model, [Image.open("photo.jpg")])[0]',
        "print(int(probabilities.argmax()))"
        if info.classes is None
        else "print(model.classes[probabilities.argmax()])",
    ]
    text = "```python\n" + "\n".join(lines) + "\n```"
    if is_built:
        text += f'\n\nOn the command line:\n\n```sh\npetiole predict "$(petiole pull {repo})" photo.jpg\n```'
    return text


def _facts(info: PluginInfo) -> list[tuple[str, str]]:
    backbone, head, base = info.backbone, info.head, base_model(info)
    name = ".".join(filter(None, (backbone["name"], backbone["tag"])))
    title = f"[{base}](https://huggingface.co/{base})" if base else _plain(name)
    bits = [(METHODS[entry["method"]], entry["settings"].get("bits", FULL)) for entry in info.plugins]
    bits += [] if head is None else [("head", head.get("bits", FULL))]
    return [
        *(("method", _code(_call(entry))) for entry in info.plugins),
        ("bits per weight", ", ".join(f"{part} {count}" for part, count in bits)),
        ("file", f"`plugin.safetensors`, {info.total_bytes:,} bytes"),
        ("backbone", f"{title} ({_code(backbone['class'])}, width {backbone['width']}, {_plain(backbone['dtype'])})"),
        ("backbone fingerprint", _code(backbone["fingerprint"])),
        ("head", "the backbone's own" if head is None else f"{head['in_features']} x {head['out_features']}"),
        ("written by", _plain(f"petiole {info.petiole}, schema version {info.schema_version}")),
    ]


def _call(entry: dict[str, Any]) -> str:
    settings = ", ".join(f"{key}={value!r}" for key, value in entry["settings"].items())
    return f"{METHODS[entry['method']]}({settings})"


def _classes(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _MAX_CLASSES:,} more" if len(names) > _MAX_CLASSES else ""
    return f"{len(names):,}: " + ", ".join(map(_plain, names[:_MAX_CLASSES])) + more


def _table(columns: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in (columns, ("---", "---"), *rows))


def _value(value: Any) -> str:
    return (
        " x ".join(map(str, value))
        if isinstance(value, tuple) and all(isinstance(v, int) for v in value)
        else str(value)
    )


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!$&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Returns text in code type, for a table's cell."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", r"\|") + "`"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
