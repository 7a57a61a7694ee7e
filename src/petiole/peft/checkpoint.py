"""A folder of PEFT's LoRA: `adapter_config.json` and `adapter_model.safetensors`, read strictly and written whole."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import PluginFileError
from ..files import atomic_write
from ..files.container import one_line, read_bytes
from .lora_form import Pair

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# how PEFT calls the model inside its wrappers
_PREFIX = "base_model.model."
# settings that say where LoRA sits, how it starts or how it is trained; `peft_type`, `bias` and `init_lora_weights`
# are looked at apart, and any other setting that is not at its empty value changes what the tensors mean
_INERT = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
})  # fmt: skip
# starts that leave the backbone's weights as they are; PiSSA and its like take their start out of them
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder of PEFT's LoRA holds.

    Args:
        pairs: The change of each linear module, by its name in the backbone; scaling folded in.
        heads: Tensors of the modules that were trained as a whole, by the module's name and theirs.
        dropout: Dropout rate of its training.
        provenance: What petiole says of a checkpoint it wrote, None for others.
    """

    pairs: dict[str, Pair]
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    dropout: float = 0.0
    provenance: dict[str, Any] | None = None


def write_checkpoint(folder: Path, checkpoint: Checkpoint, base: str | None, auto_mapping: Mapping[str, str]) -> None:
    """Writes config and weights into a folder.

    Args:
        folder: Where to; it must exist.
        checkpoint: What to write.
        base: What it calls the backbone, None for nothing.
        auto_mapping: `base_model_class` and `parent_library` of the backbone.

    Raises:
        PluginFileError: A file cannot be written.
    """
    ranks = {name: pair.rank for name, pair in checkpoint.pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # the names of whole modules, from their first letter on: `proj` alone would also hit `patch_embed.proj`
    others = {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": dict(auto_mapping),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        # alpha / r is 1 everywhere: scales are in the weights
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": checkpoint.dropout,
        "target_modules": "|".join(re.escape(name) for name in ranks),
        "modules_to_save": list(checkpoint.heads) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = dict[str, Tensor]()
    for name, pair in checkpoint.pairs.items():
        tensors |= {f"{name}.lora_A.weight": pair.down, f"{name}.lora_B.weight": pair.up}
    for name, head in checkpoint.heads.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in head.items()}
    # a copy each: safetensors refuses tensors that share memory
    owned = {f"{_PREFIX}{name}": t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    text = json.dumps(checkpoint.provenance, ensure_ascii=False, sort_keys=True)
    atomic_write(folder / WEIGHTS, save(owned, metadata={"format": "pt", "petiole": text}))
    atomic_write(folder / CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Returns what a folder of PEFT's LoRA holds, on the CPU.

    Raises:
        PluginFileError: A file is missing or malformed, or the checkpoint is something else than plain LoRA.
    """
    where = os.fspath(folder)
    config = _read_config(where)
    tensors, provenance = _read_weights(where)
    pairs, heads = dict[str, Pair](), dict[str, dict[str, Tensor]]()
    for key, tensor in tensors.items():
        module, _, last = key.removeprefix(_PREFIX).rpartition(".")
        module, _, part = module.rpartition(".") if module.endswith((".lora_A", ".lora_B")) else (module, "", "")
        if "lora_" in module or (part and last != "weight") or last not in ("weight", "bias"):
            raise PluginFileError(f"{where} holds {key}, which plain LoRA does not have: petiole cannot read it")
        if not torch.isfinite(tensor).all():
            raise PluginFileError(f"{where}: {key} is not finite everywhere, so its training diverged")
        if not part:
            heads.setdefault(module, {})[last] = tensor
        elif part == "lora_A":
            up = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if up is None or tensor.ndim != 2 or up.ndim != 2 or up.shape[1] != len(tensor):
                found = "nothing" if up is None else list(up.shape)
                raise PluginFileError(
                    f"{where}: {module} needs lora_A [r, d_in] and lora_B [d_out, r], found {list(tensor.shape)} and "
                    f"{found}: petiole reads LoRA of linear modules"
                )
            pairs[module] = Pair(tensor, up * _scaling(config, module, len(tensor), where))
        elif key.replace(".lora_B.", ".lora_A.") not in tensors:
            raise PluginFileError(f"{where}: {module} has lora_B without lora_A")
    if not pairs:
        raise PluginFileError(f"{where} holds no LoRA at all: looked for tensors named lora_A and lora_B")
    if config.get("modules_to_save") and not heads:
        raise PluginFileError(f"{where}: its config saves {config['modules_to_save']}, its weights hold none of them")
    return Checkpoint(pairs, heads, _number(config, "lora_dropout", 0, where), provenance)


def _read_config(where: str) -> dict[str, Any]:
    """Returns a config of plain LoRA.

    Raises:
        PluginFileError: It is absent or malformed, or says that the tensors are something else; names the setting.
    """
    path = Path(where)
    if not path.is_dir():
        raise PluginFileError(f"{where} is no folder: download the checkpoint first and give the folder with {CONFIG}")
    if not (path / CONFIG).exists():
        raise PluginFileError(f"{where} has no {CONFIG}: give the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(read_bytes(path / CONFIG))
    except ValueError as error:
        raise PluginFileError(f"{path / CONFIG} is no JSON: {one_line(error)}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise PluginFileError(f"{where} is a PEFT checkpoint of type {str(found)[:40]!r}: petiole reads LORA")
    if config.get("bias", "none") != "none":
        raise PluginFileError(f"{where} was trained with bias={config['bias']!r}: petiole's LoRA changes weights only")
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in _STARTS):
        raise PluginFileError(
            f"{where} was started with init_lora_weights={start!r}, which changes the backbone's weights: convert it "
            "to plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )
    if other := sorted(key for key, value in config.items() if key not in _INERT and value):
        raise PluginFileError(
            f"{where} sets {other[0]} to {str(config[other[0]])[:40]}: petiole reads plain LoRA, without that variant"
        )
    return config


def _read_weights(where: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Returns the tensors, sorted by name, and what petiole says of them where it wrote them."""
    path = Path(where) / WEIGHTS
    if not path.exists():
        pickled = (Path(where) / "adapter_model.bin").exists()
        found = "a pickle adapter_model.bin, which petiole never opens because it can run code" if pickled else "none"
        raise PluginFileError(f"{where} has no {WEIGHTS}, found {found}: save it with PEFT's safe_serialization")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
            text = (file.metadata() or {}).get("petiole")
        provenance = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise PluginFileError(f"{path} cannot be read: {one_line(error)}. Copy or download it again") from error
    return tensors, provenance


def _scaling(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Returns what PEFT multiplies a module's change by."""
    own, alpha = (_number(config, key, 8, where, module) for key in ("r", "lora_alpha"))
    if own != rank or rank < 1:
        raise PluginFileError(f"{where}: {module} has rank {rank} in the weights and {own:g} in the config")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _number(config: Mapping[str, Any], key: str, default: float, where: str, module: str = "") -> float:
    """Returns a number of the config, a module's own where a regular expression fits its name from some dot on."""
    patterns = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}.get(key, "")) or {}
    try:
        own = [value for p, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{p})", module)]
        return float([*own, config.get(key, default)][0])
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise PluginFileError(f"{where}: {key} in {CONFIG}, or its pattern, is malformed: {one_line(error)}") from error
