"""Every method on every family of backbones: what the matrix in `docs/support.md` is made of.

python tests/support.py    # tries every pair anew and writes the page
"""

import copy
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import petiole as pt
from models import MODELS
from petiole.core.plugin import Plugin

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
# family -> a tiny model with random weights
FAMILIES = {
    "timm ViT": "vit",
    "timm DeiT, distilled": "deit_distilled",
    "timm DeiT-III": "deit3",
    "timm DINOv2 with registers": "dinov2_registers",
    "timm SigLIP": "siglip",
    "timm BEiT": "beit",
    "timm EVA-02": "eva02",
    "timm Swin": "swin",
    "transformers ViT": "hf_vit",
    "transformers DINOv2": "hf_dinov2",
    "transformers CLIP": "hf_clip_classifier",
    "transformers SigLIP": "hf_siglip_classifier",
    "torchvision ViT": "torchvision",
    "open_clip ViT": "open_clip_plain",
}
METHODS: dict[str, Callable[[], Plugin]] = {
    "Linear": pt.Linear,
    "Full": pt.Full,
    "BitFit": pt.BitFit,
    "LayerNorm": pt.LayerNorm,
    "VPT-deep": lambda: pt.VPT(num_prompts=2),
    "VPT-shallow": lambda: pt.VPT(num_prompts=2, deep=False),
    "Adapter, Houlsby": lambda: pt.Adapter(dim=3, placement="houlsby"),
    "Adapter, Pfeiffer": lambda: pt.Adapter(dim=3),
    "AdaptFormer": lambda: pt.AdaptFormer(dim=3),
    "LoRA": lambda: pt.LoRA(rank=2),
    "SSF": pt.SSF,
    "RepAdapter": lambda: pt.RepAdapter(dim=4),
    "FacT-TT": lambda: pt.FacT(rank=2),
    "FacT-TK": lambda: pt.FacT(rank=2, form="tk"),
    "ToCom": lambda: pt.ToCom(groups=2, target=1),
    "ToMe": lambda: pt.ToMe(budget=1),
    "EViT": lambda: pt.EViT(budget=2),
    "Convpass": lambda: pt.Convpass(dim=3),
    "Convpass-attn": lambda: pt.Convpass(dim=3, roles=("attn",)),
}
CLASSES = ("a", "b", "c")


@dataclass(frozen=True)
class Trial:
    """What one method on one family came to.

    Args:
        cell: `merges`, `headless` where all but the head merges, `plugin` for what works and does not merge, `no` for
            what is refused.
        reason: Why not, by the library's own error; empty for `merges`.
    """

    cell: str
    reason: str = ""


def try_out(method: str, family: str, folder: Path) -> Trial:
    """Adapts, proves, trains two steps, saves, loads onto a fresh backbone and merges; asserts what must hold."""
    make = MODELS[FAMILIES[family]]
    backbone = make()
    before = copy.deepcopy(backbone.state_dict())
    try:
        model = pt.adapt(backbone, METHODS[method](), classes=CLASSES)
    except pt.PluginError as error:
        return Trial("no", str(error))
    images = model.view.probe(backbone, num_images=3)
    fresh = model.eval()(images)
    _train(model, images)
    logits = model(images)
    assert not torch.equal(logits, fresh), "two steps must change the answer"
    pt.save(model, folder / "plugin.safetensors")
    assert torch.equal(pt.load(folder / "plugin.safetensors", make())(images), logits), "a file must give it back"
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    return _merge(model, images)


def _train(model: pt.Adapted, images: torch.Tensor) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for _, p in model.trained()], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    model.eval()


def _merge(model: pt.Adapted, images: torch.Tensor) -> Trial:
    cell = "merges"
    if not model.view.classifiers(model.backbone):
        # the class has no place for a head: merge what is below it
        cell, model.head, model.classes = "headless", None, None
    try:
        plain = pt.merge(model)
    except pt.MergeError as error:
        return Trial("plugin", str(error))
    with torch.no_grad():
        expected, found = model(images), model.view.answer(plain, images)
    assert type(plain) is type(model.backbone)
    assert (found - expected).norm() <= 1e-5 * expected.norm(), "a merged model must answer alike"
    return Trial(cell)


def render(trials: dict[tuple[str, str], Trial]) -> str:
    """Returns the page as Markdown."""
    reasons: dict[str, int] = {}
    lines = []
    for part in (list(METHODS)[:6], list(METHODS)[6:12], list(METHODS)[12:]):
        lines += [f"| | {' | '.join(part)} |", "|---|" + "---|" * len(part)]
        for family in FAMILIES:
            cells = []
            for trial in (trials[method, family] for method in part):
                note = f" [{reasons.setdefault(trial.reason, len(reasons) + 1)}]" if trial.reason else ""
                cells.append(trial.cell + note)
            lines.append(f"| {family} | {' | '.join(cells)} |")
        lines.append("")
    notes = [
        textwrap.fill(f"{number}. {reason}.", 118, subsequent_indent="   ", break_on_hyphens=False)
        for reason, number in reasons.items()
    ]
    return "\n".join([_HEAD, *lines, "What the library says:", "", *notes, ""])


_HEAD = """# Methods and backbones

Which method works on which family of backbones. The page is written by `python tests/support.py`, which tries every
pair on a tiny model with random weights and LayerScale gains of 1: adapt and prove, train two steps, save, load onto a
fresh backbone and compare the logits exactly, merge and compare, and compare the backbone bit for bit with what it was.
`tests/test_support.py` repeats each trial and compares it with this page.

- **merges**: works, and `pt.merge` gives an ordinary model of the backbone's class
- **headless**: the same, but that class has no classifier to carry a head
- **plugin**: works, and stays a plugin
- **no**: refused
"""


def main() -> None:
    trials = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            for family in FAMILIES:
                trials[method, family] = try_out(method, family, Path(folder))
    PAGE.write_text(render(trials))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
