"""The papers' experiments as data: a plugin's settings and a recipe under a name.

Source of every row: the configuration files that the authors of Convpass (Jie and Deng, 2022, arXiv 2207.07039),
FacT (Jie and Deng, 2023, arXiv 2212.03145) and the binary adapters (Jie, Wang and Deng, 2023, arXiv 2307.16867)
published with their code; table 1 of the first two papers, and the README beside the code of the third. All train a
ViT-B/16 of ImageNet-21k, timm's `vit_base_patch16_224.orig_in21k`, on the 1,000 images of a VTAB-1k task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import FitError, nearest
from .recipe import Recipe

if TYPE_CHECKING:
    from ..core.plugin import Plugin


@dataclass(frozen=True, eq=False)
class Published:
    """One experiment that can be run again.

    Args:
        name: What it is called.
        source: Who published it, and where.
        expected: What came out there, and on which backbone.
        run_time: How long a run is, in a unit that does not depend on the machine.
        method: The plugin's method.
        recipe: How to train.
        settings: The method's settings that every task shares.
        rows: The settings of each task; none where one setting serves every task.
        accuracy: Test accuracy by task as published [%].
        head_bits: Bits per weight of the head, as `adapt` takes them.
    """

    name: str
    source: str
    expected: str
    run_time: str
    method: str
    recipe: Recipe
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    accuracy: Mapping[str, float] = field(default_factory=dict)
    head_bits: int = 32

    def settings_for(self, task: str | None) -> dict[str, Any]:
        """Returns the method's settings for a task; any task will do where one setting serves all.

        Raises:
            FitError: The table has no such row, or none was named.
        """
        if self.rows and task not in self.rows:
            asked = "none was named" if task is None else f"{task!r} is none"
            advice = nearest(task or "", self.rows) or f": name one as the task, {', '.join(self.rows)}"
            raise FitError(f"{self.name} has a row per VTAB-1k task; {asked}{advice}")
        return {**self.settings, **(self.rows[task] if task is not None and self.rows else {})}

    def about(self, task: str | None = None) -> str:
        """Returns source, expected result and run time in a line."""
        known = task in self.accuracy
        expected = f"{self.accuracy[str(task)]} % on {task}, {_HOW}" if known else self.expected
        return f"{self.name}: {self.source}; expected {expected}; {self.run_time}"

    def fixed(self) -> dict[str, Any]:
        """Returns the method's settings that a search on other data leaves as they are."""
        if self.rows:  # what is to be chosen anew stands in these
            return dict(self.settings)
        return {name: value for name, value in self.settings.items() if name not in ("rank", "scale", "init")}


# task -> Convpass: scale, init, accuracy; Convpass beside attention only: the same; FacT-TT: rank, scale, accuracy;
# FacT-TK: the same. Accuracies are the best of ten scores on test
_Conv = tuple[float, str, float]
_Rank = tuple[int, float, float]
_VTAB: dict[str, tuple[_Conv, _Conv, _Rank, _Rank]] = {
    "cifar": ((0.1, "dirac", 72.29), (0.1, "xavier", 71.84), (8, 1.0, 71.3), (32, 0.1, 70.6)),
    "caltech101": ((1.0, "dirac", 91.16), (100.0, "xavier", 90.62), (16, 10.0, 89.6), (32, 10.0, 90.6)),
    "dtd": ((0.01, "xavier", 72.18), (0.1, "xavier", 71.97), (8, 0.01, 70.7), (16, 0.01, 70.8)),
    "oxford_flowers102": ((0.1, "xavier", 99.15), (1.0, "xavier", 99.06), (16, 1.0, 98.9), (32, 1.0, 99.1)),
    "oxford_iiit_pet": ((1.0, "xavier", 90.90), (1.0, "xavier", 90.98), (8, 1.0, 91.0), (16, 10.0, 90.7)),
    "svhn": ((100.0, "xavier", 91.26), (100.0, "xavier", 89.93), (16, 100.0, 87.8), (32, 100.0, 88.6)),
    "sun397": ((0.1, "dirac", 54.87), (0.1, "xavier", 54.25), (8, 1.0, 54.6), (16, 1.0, 54.1)),
    "patch_camelyon": ((10.0, "dirac", 84.19), (10.0, "xavier", 85.17), (8, 10.0, 85.2), (32, 10.0, 84.8)),
    "eurosat": ((10.0, "dirac", 96.13), (10.0, "xavier", 95.57), (8, 100.0, 95.5), (32, 100.0, 96.2)),
    "resisc45": ((10.0, "dirac", 85.32), (100.0, "xavier", 83.43), (8, 0.1, 83.4), (32, 10.0, 84.5)),
    "diabetic_retinopathy": ((1.0, "dirac", 75.60), (0.1, "xavier", 74.76), (8, 1.0, 75.7), (16, 1.0, 75.7)),
    "clevr_count": ((1.0, "dirac", 82.26), (10.0, "xavier", 79.86), (16, 1.0, 82.0), (32, 10.0, 82.6)),
    "clevr_dist": ((0.1, "xavier", 67.86), (1.0, "xavier", 66.97), (4, 10.0, 69.0), (16, 10.0, 68.2)),
    "dmlab": ((10.0, "dirac", 51.31), (10.0, "xavier", 50.31), (16, 10.0, 49.8), (32, 10.0, 49.8)),
    "kitti": ((10.0, "xavier", 80.03), (10.0, "xavier", 79.89), (16, 10.0, 80.0), (32, 10.0, 80.7)),
    "dsprites_loc": ((100.0, "xavier", 85.94), (10.0, "xavier", 84.27), (16, 100.0, 79.2), (32, 100.0, 80.8)),
    "dsprites_ori": ((0.1, "xavier", 53.13), (1.0, "xavier", 53.20), (16, 1.0, 48.4), (32, 1.0, 47.4)),
    "smallnorb_azi": ((100.0, "xavier", 36.43), (100.0, "xavier", 34.81), (16, 100.0, 34.2), (32, 100.0, 33.2)),
    "smallnorb_ele": ((1.0, "xavier", 44.44), (1.0, "xavier", 42.95), (8, 10.0, 41.4), (16, 10.0, 43.0)),
}  # fmt: skip
# task -> scale of Bi-AdaptFormer of dim 1 and of dim 32, then those with a head of 1 bit; of Bi-LoRA the same
_SCALES: dict[str, tuple[float, ...]] = {
    "cifar": (1.0, 0.1, 1.0, 0.1, 1.0, 0.1, 1.0, 0.01),
    "caltech101": (10.0, 10.0, 10.0, 10.0, 100.0, 10.0, 100.0, 10.0),
    "dtd": (1.0, 0.01, 1.0, 0.1, 1.0, 0.01, 1.0, 1.0),
    "oxford_flowers102": (1.0, 1.0, 10.0, 1.0, 100.0, 1.0, 100.0, 1.0),
    "oxford_iiit_pet": (1.0, 0.01, 1.0, 0.01, 1.0, 0.1, 0.1, 0.01),
    "svhn": (100.0, 10.0, 100.0, 10.0, 100.0, 10.0, 100.0, 10.0),
    "sun397": (1.0, 0.1, 10.0, 0.1, 1.0, 0.1, 1.0, 0.01),
    "patch_camelyon": (10.0, 1.0, 10.0, 1.0, 10.0, 10.0, 10.0, 10.0),
    "eurosat": (10.0, 1.0, 10.0, 1.0, 100.0, 10.0, 100.0, 1.0),
    "resisc45": (1.0, 10.0, 1.0, 10.0, 1.0, 10.0, 1.0, 10.0),
    "diabetic_retinopathy": (100.0, 1.0, 10.0, 1.0, 1.0, 10.0, 100.0, 0.1),
    "clevr_count": (10.0, 1.0, 10.0, 1.0, 10.0, 1.0, 10.0, 1.0),
    "clevr_dist": (10.0, 0.1, 10.0, 0.1, 10.0, 0.1, 1.0, 0.1),
    "dmlab": (10.0, 1.0, 100.0, 1.0, 100.0, 10.0, 100.0, 10.0),
    "kitti": (10.0, 1.0, 100.0, 1.0, 100.0, 10.0, 100.0, 10.0),
    "dsprites_loc": (10.0, 1.0, 10.0, 1.0, 100.0, 1.0, 100.0, 1.0),
    "dsprites_ori": (10.0, 0.1, 10.0, 10.0, 100.0, 0.1, 100.0, 10.0),
    "smallnorb_azi": (10.0, 1.0, 100.0, 10.0, 100.0, 10.0, 100.0, 10.0),
    "smallnorb_ele": (10.0, 1.0, 100.0, 1.0, 100.0, 1.0, 100.0, 1.0),
}  # fmt: skip
# classes of the VTAB-1k tasks
NUM_CLASSES = {
    "cifar": 100, "caltech101": 102, "dtd": 47, "oxford_flowers102": 102, "oxford_iiit_pet": 37, "svhn": 10,
    "sun397": 397, "patch_camelyon": 2, "eurosat": 10, "resisc45": 45, "diabetic_retinopathy": 5, "clevr_count": 8,
    "clevr_dist": 6, "dmlab": 6, "kitti": 4, "dsprites_loc": 16, "dsprites_ori": 16, "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}  # fmt: skip

_PAPER = Recipe(
    epochs=100, batch_size=64, lr=1e-3, weight_decay=1e-4, warmup_epochs=10, drop_path=0.1, select="last",
    normalize="imagenet", resize="squash", train_on="train+val",
)  # fmt: skip
_BINARY = replace(_PAPER, normalize="none")
_FEW_SHOT = replace(_PAPER, lr=5e-3, resize="crop", augment="fgvc")
_CONVPASS = "Jie and Deng, 2022, arXiv 2207.07039"
_FACT = "Jie and Deng, 2023, arXiv 2212.03145"
_BITS = "Jie, Wang and Deng, 2023, arXiv 2307.16867, the authors' README"
_HOW = "the best of ten scores on test, ViT-B/16"
_STEPS = "1,600 steps of 64 images of 224x224 a task"
_SHOTS = "with 1, 2, 4, 8 and 16 shots, means of five data sets read off a figure, to 0.1; ViT-B/16"
_AUGMENTED = "100 passes over the shots; one CPU core augments, which a GPU may have to wait for"


def _on_vtab(
    name: str,
    source: str,
    expected: str,
    method: str,
    settings: Mapping[str, Any],
    rows: Mapping[str, tuple[Mapping[str, Any], float]],
) -> Published:
    return Published(
        name,
        f"{source}, table 1",
        f"{expected} as mean of the groups, {_HOW}",
        _STEPS,
        method,
        _PAPER,
        settings,
        {task: row for task, (row, _) in rows.items()},
        {task: accuracy for task, (_, accuracy) in rows.items()},
    )


def _binary(name: str, published: float | None, column: int, dim: int, head_bits: int = 32) -> Published:
    is_lora = name.startswith("bi-lora")
    return Published(
        name,
        _BITS,
        "no published result" if published is None else f"{published} % as mean of the groups, {_HOW}",
        _STEPS,
        "lora" if is_lora else "adaptformer",
        _BINARY,
        {"bits": 1, "dropout": 0.1, **({"rank": dim, "roles": ("q", "v")} if is_lora else {"dim": dim, "bias": False})},
        {task: {"scale": row[column]} for task, row in _SCALES.items()},
        head_bits=head_bits,
    )


def _conv(row: _Conv) -> tuple[dict[str, Any], float]:
    return {"scale": row[0], "init": row[1]}, row[2]


def _rank(row: _Rank) -> tuple[dict[str, Any], float]:
    return {"rank": row[0], "scale": row[1]}, row[2]


# tk in the authors' own layout of its cores: what they published was trained with it
_ALL = (
    _on_vtab(
        "convpass-paper", _CONVPASS, "76.56 % (natural 81.69, specialised 85.31, structured 62.68)", "convpass",
        {"dim": 8, "roles": ("attn", "mlp"), "dropout": 0.1}, {task: _conv(row[0]) for task, row in _VTAB.items()},
    ),
    _on_vtab(
        "convpass-attn-paper", _CONVPASS, "75.83 % (natural 81.24, specialised 84.73, structured 61.53)", "convpass",
        {"dim": 8, "roles": ("attn",), "dropout": 0.1}, {task: _conv(row[1]) for task, row in _VTAB.items()},
    ),
    _on_vtab(
        "fact-tt-paper", _FACT, "75.3 %", "fact",
        {"form": "tt", "dropout": 0.1}, {task: _rank(row[2]) for task, row in _VTAB.items()},
    ),
    _on_vtab(
        "fact-tk-paper", _FACT, "75.6 %", "fact",
        {"form": "tk", "layout": "reference", "dropout": 0.1}, {task: _rank(row[3]) for task, row in _VTAB.items()},
    ),
    _binary("bi-adaptformer-paper", 77.0, column=1, dim=32),
    _binary("bi-adaptformer-1-paper", None, column=0, dim=1),
    _binary("bi-adaptformer-bihead-paper", 76.9, column=3, dim=32, head_bits=1),
    _binary("bi-adaptformer-bihead-1-paper", 73.8, column=2, dim=1, head_bits=1),
    _binary("bi-lora-paper", 76.7, column=5, dim=32),
    _binary("bi-lora-1-paper", None, column=4, dim=1),
    _binary("bi-lora-bihead-paper", 76.3, column=7, dim=32, head_bits=1),
    _binary("bi-lora-bihead-1-paper", 74.6, column=6, dim=1, head_bits=1),
    Published(
        "fgvc-convpass", f"{_CONVPASS}, few-shot learning; its scale is not known, 1 here",
        f"42.9, 52.5, 60.5, 70.2 and 78.5 % {_SHOTS}", _AUGMENTED, "convpass", _FEW_SHOT,
        {"dim": 8, "scale": 1.0, "dropout": 0.1},
    ),
    Published(
        "fgvc-fact-tt", f"{_FACT}, few-shot learning; its scale is not known, 1 here",
        f"43.8, 52.7, 60.7, 69.8 and 77.7 % {_SHOTS}", _AUGMENTED, "fact", _FEW_SHOT,
        {"form": "tt", "rank": 16, "scale": 1.0, "dropout": 0.1},
    ),
    Published(
        "default", "petiole: one setting for every task, the best on validation of docs/results.md",
        "no published result", "1,300 steps of 64 images a task of 800", "convpass", Recipe(lr=3e-3), {"scale": 10.0},
    ),
)  # fmt: skip
PUBLISHED = {entry.name: entry for entry in _ALL}


def recipe(name: str, task: str | None = None) -> "tuple[Plugin, Recipe]":
    """Returns a new plugin and the recipe of a paper's experiment.

    Source, expected result and run time of each stand in `petiole.train.published.PUBLISHED` and in docs/recipes.md;
    so do the bits of the head, 1 for those with `bihead` in their name: `adapt(..., head_bits=1)`.

    Args:
        name: `convpass-paper`, `convpass-attn-paper`, `fact-tt-paper`, `fact-tk-paper`, and `bi-adaptformer-paper` or
            `bi-lora-paper`, also with `-bihead`, `-1` or both before `-paper`: they have a row per VTAB-1k task;
            `fgvc-convpass` or `fgvc-fact-tt`, for few-shot tasks; `default`, one setting for every task.
        task: The row, e.g. `cifar`; not needed by a recipe without rows.

    Raises:
        FitError: There is no recipe or no row of this name.

    Example:
        >>> import petiole as pt
        >>> plugin, recipe = pt.recipe("fact-tt-paper", "clevr_dist")
        >>> plugin.rank, recipe.lr
        (4, 0.001)
    """
    from ..plugins import method  # here, so that the command line's help can list the names without torch

    entry = find(name)
    return method(entry.method, **entry.settings_for(task)), entry.recipe


def find(name: str) -> Published:
    """Returns the experiment of a name.

    Raises:
        FitError: There is none.
    """
    if name not in PUBLISHED:
        raise FitError(f"no recipe is called {name!r}{nearest(name, PUBLISHED)}: choose one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]
