"""Times save, load and inspect of a plugin file, and says what dominates.

Command: `OMP_NUM_THREADS=1 .venv/bin/python benchmarks/files.py --repeat 5`. Random weights; no download.
What dominates on a large backbone is the check's forward pass, then the fingerprint (a hash over all weights); the file
itself takes well under a millisecond to read. `check=False` leaves the forward pass out of a load.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import petiole as pt
from petiole.core.fingerprint import fingerprint
from petiole.core.plugin import Plugin
from petiole.files import inspect, load, save
from petiole.files.codes import unpacked
from petiole.files.container import read
from petiole.files.metadata import NUM_IMAGES
from petiole.files.official import decode, save_official
from petiole.files.stacking import unstack

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "micro": lambda: VisionTransformer(
        img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3, num_classes=0
    ).eval(),
    "vit_b16": lambda: timm.create_model("vit_base_patch16_224", pretrained=False).eval(),
}
PLUGINS: dict[str, Callable[[], Plugin]] = {
    "fact16": lambda: pt.FacT(rank=16),
    "lora8": lambda: pt.LoRA(rank=8),
    "adaptformer32-1bit": lambda: pt.AdaptFormer(dim=32, bias=False, bits=1),
    "fact16-1bit": lambda: pt.FacT(rank=16, bits=1),
}


def median_ms(call: Callable[[], object], repeat: int) -> float:
    """Returns the median time of a call [ms], after one call that does not count."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(name: str, plugin: str, folder: Path, repeat: int) -> None:
    """Prints times and sizes of one plugin on one backbone."""
    torch.manual_seed(0)
    backbone, path = BACKBONES[name](), folder / f"{name}-{plugin}.safetensors"
    classes, is_one_bit = [f"class {i}" for i in range(10)], plugin.endswith("-1bit")
    model = pt.adapt(
        backbone, PLUGINS[plugin](), classes=classes, head_bits=1 if is_one_bit else 32, prove=False
    ).eval()
    metrics = {"val_accuracy": 0.9123, "test_accuracy": 0.9012}
    images = model.view.probe(model.backbone, NUM_IMAGES)
    with torch.no_grad():
        times = {
            "save": median_ms(lambda: save(model, path, metrics=metrics), repeat),
            "load": median_ms(lambda: load(path, backbone), repeat),
            "load, no check": median_ms(lambda: load(path, backbone, check=False), repeat),
            "inspect": median_ms(lambda: inspect(path), repeat),
            "codes into the model": median_ms(lambda: unpacked(model, unstack(read(path)[0]), ""), repeat),
            "adapt alone": median_ms(lambda: pt.adapt(backbone, PLUGINS[plugin](), prove=False), repeat),
            "fingerprint alone": median_ms(lambda: fingerprint(model.view.frozen_weights(backbone)), repeat),
            "check's forward alone": median_ms(lambda: model(images), repeat),
        }
    info = inspect(path)
    if plugin == "adaptformer32-1bit":
        save_official(model, path.with_suffix(".bin"))
        data, width, depth = path.with_suffix(".bin").read_bytes(), model.head.in_features, len(model.plugins[0].sites)
        official = median_ms(lambda: decode(data, "adaptformer-bihead", 10, width=width, depth=depth), repeat)
        times[f"decode of .bin, {len(data)} bytes"] = official
    print(
        f"{name} {plugin}: {info.total_bytes} bytes in {len(info.tensors)} tensors, "
        f"{info.overhead_bytes} of them beside the values"
    )
    for label, value in times.items():
        print(f"  {label:<32}{value:9.2f} ms")
    parts = {label: times[label] for label in ("adapt alone", "fingerprint alone", "check's forward alone")}
    largest = max(parts, key=lambda label: parts[label])
    print(f"  load is mostly {largest}: {parts[largest] / times['load']:.0%}")


def main() -> None:
    """Measures every plugin on every backbone asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=BACKBONES, nargs="*", default=list(BACKBONES), help="which backbones")
    parser.add_argument("--plugin", choices=PLUGINS, nargs="*", default=list(PLUGINS), help="which plugins")
    parser.add_argument("--repeat", type=int, default=5, help="calls per number [5]; the median is printed")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, median of {arguments.repeat}")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.backbone:
            for plugin in arguments.plugin:
                measure(name, plugin, Path(folder), arguments.repeat)


if __name__ == "__main__":
    main()
