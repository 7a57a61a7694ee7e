"""What a recipe says about the input: from the pixels to the plugin file, and in a run that is continued."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import petiole as pt
from fitting import make_model, make_task, vit
from petiole.core.plugin import Plugin
from petiole.tasks import Pixels, Transform
from petiole.tasks.augment import Augmented
from petiole.train.evaluate import evaluate, predict
from petiole.train.loop import fit
from petiole.train.steps import schedule

OWN = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"}
SHORT = {"epochs": 1, "batch_size": 5, "lr": 1e-2}


def train(recipe: pt.Recipe, plugin: Plugin | None = None, task: pt.Task | None = None, **settings: Any) -> pt.Adapted:
    model = make_model(plugin)
    fit(model, task or make_task(), recipe, progress=False, **settings)
    return model


def equal(a: pt.Adapted, b: pt.Adapted) -> bool:
    first, second = a.task_state(), b.task_state()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {}),
        ({"normalize": "imagenet"}, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}),
        ({"normalize": "half"}, {}),
        ({"normalize": "none"}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({"resize": "squash"}, {}),
        ({"resize": "crop"}, {"crop_mode": "center", "crop_pct": 0.875}),
    ],
)
def test_fit_writes_what_the_recipe_says_into_the_model(asked: dict[str, Any], expected: dict[str, Any]) -> None:
    model = train(pt.Recipe(**SHORT, **asked))
    assert model.input_config == {"input_size": (3, 32, 32), **OWN, **expected}


def test_asking_for_the_backbones_own_input_undoes_an_earlier_recipe() -> None:
    model = make_model()
    fit(model, make_task(), pt.Recipe(**SHORT, normalize="none", resize="crop"), progress=False)
    fit(model, make_task(), pt.Recipe(**SHORT), progress=False)
    assert model.input_config == {"input_size": (3, 32, 32), **OWN}


@pytest.mark.parametrize("normalize", ["imagenet", "half", "none"])
def test_values_are_those_of_the_name(normalize: str) -> None:
    mean, std = {
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3),
        "none": ((0.0,) * 3, (1.0,) * 3),
    }[normalize]  # fmt: skip
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    config = pt.Recipe(normalize=normalize).input_config(OWN)
    found = Transform({"input_size": (3, 16, 16), **config}).normalize(pixels)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))


def pixels_of(resize: str) -> np.ndarray:
    config = pt.Recipe(resize=resize).input_config(OWN | {"crop_pct": 0.9, "interpolation": "nearest"})
    return Transform({"input_size": (3, 224, 224), **config}).pixels(photo()).permute(1, 2, 0).numpy()


def test_squash_is_one_bicubic_resize() -> None:
    assert np.array_equal(pixels_of("squash"), photo().resize((224, 224), Image.Resampling.BICUBIC))


def test_crop_is_the_centre_of_the_shorter_edge_at_256() -> None:
    large = photo().resize((341, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels_of("crop"), large.crop((58, 16, 58 + 224, 16 + 224)))


def test_plugin_file_keeps_the_input(tmp_path: Path) -> None:
    model = train(pt.Recipe(**SHORT, normalize="none", resize="crop"), out=tmp_path)
    loaded = pt.load(tmp_path / "plugin.safetensors", vit())
    assert loaded.input_config == model.input_config
    assert loaded.input_config["std"] == (1.0, 1.0, 1.0)
    images = [photo(), photo().rotate(90)]
    assert torch.equal(predict(loaded, images), predict(model, images))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["transform"]["crop_mode"], config["recipe"]["resize"]) == ("center", "crop")


def test_another_input_is_another_run(tmp_path: Path) -> None:
    train(pt.Recipe(**SHORT), out=tmp_path)
    with pytest.raises(pt.FitError, match=r"transform\.std .* -> \[1\.0, .*; recipe\.normalize backbone -> none\)"):
        train(pt.Recipe(**SHORT, normalize="none"), out=tmp_path)


class Killed(BaseException):
    """Stands in for the end of the process: nothing catches it."""


def test_augmented_run_that_dies_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pt.Recipe(epochs=2, batch_size=5, lr=1e-2, normalize="imagenet", resize="crop", augment="fgvc")
    train(recipe, out=tmp_path / "whole")
    adamw, count = torch.optim.AdamW.step, iter(range(4))

    def die(*args: Any, **kwargs: Any) -> Any:
        if next(count, None) is None:
            raise Killed
        return adamw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", die)
        with pytest.raises(Killed):
            train(recipe, out=tmp_path / "killed", save_every=0)
    train(recipe, out=tmp_path / "killed")
    for name in ("plugin.safetensors", "metrics.jsonl", "config.yaml"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("plugin", [lambda: pt.FacT(rank=2, dropout=0.0), pt.Linear], ids=["fact", "linear"])
def test_augmented_training_equals_a_hand_written_loop(plugin: Any) -> None:
    recipe = pt.Recipe(epochs=2, batch_size=5, lr=1e-2, select="last", augment="fgvc", seed=4)
    model, oracle, task = train(recipe, plugin()), make_model(plugin()), make_task()
    images = Augmented(task.train, Transform(oracle.input_config), seed=4)
    optimizer = torch.optim.AdamW([p for _, p in oracle.trained()], recipe.lr, weight_decay=1e-4)
    rates = schedule(optimizer, recipe, 3)
    for step in range(6):
        order = np.random.default_rng((4, step // 3)).permutation(13)
        x, y = images.batch(order[step % 3 * 5 : step % 3 * 5 + 5].tolist(), step)
        rates.step_update(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(oracle(images.transform.normalize(x)), y).backward()
        optimizer.step()
    assert equal(model, oracle)


def test_head_alone_sees_the_backbone_in_eval_mode_though_images_change() -> None:
    recipe = pt.Recipe(**SHORT, augment="fgvc")
    wild = pt.Recipe(**SHORT, augment="fgvc", drop_path=0.9)
    assert equal(train(recipe, pt.Linear()), train(wild, pt.Linear()))


def test_scores_are_of_plain_images() -> None:
    model, task = make_model(), make_task(num_val=40)
    recipe = pt.Recipe(epochs=1, batch_size=5, lr=1e-12, augment="fgvc")
    metrics = fit(model, task, recipe, progress=False).metrics
    for name in ("val", "test"):
        plain = evaluate(model, Pixels(getattr(task, name), Transform(model.input_config)))
        assert metrics[f"{name}_accuracy"] == plain.accuracy


def test_augmentation_changes_training() -> None:
    assert not equal(train(pt.Recipe(**SHORT)), train(pt.Recipe(**SHORT, augment="fgvc")))


def test_train_and_val_is_training_on_the_joined_task() -> None:
    recipe = pt.Recipe(epochs=2, batch_size=5, lr=1e-2, train_on="train+val")
    model, joined = make_model(), train(pt.Recipe(epochs=2, batch_size=5, lr=1e-2), task=make_task().joined())
    result = fit(model, make_task(), recipe, progress=False)
    assert equal(model, joined)
    # nothing is left to validate on, so the last epoch is kept
    assert result.metrics["best_epoch"] == 2
    assert not any("val_accuracy" in key for key in result.metrics)


def test_train_and_val_of_a_task_without_val_is_train() -> None:
    task = make_task(num_val=0)
    assert equal(train(pt.Recipe(**SHORT, train_on="train+val"), task=task), train(pt.Recipe(**SHORT), task=task))


def test_checkpointing_trains_to_the_same_weights() -> None:
    assert equal(train(pt.Recipe(**SHORT, checkpoint=True)), train(pt.Recipe(**SHORT)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalize": "Imagenet"}, "normalize must be backbone, imagenet, half or none, got 'Imagenet'"),
        ({"resize": "pad"}, "resize must be backbone, squash or crop, got 'pad'"),
        ({"augment": "mixup"}, "augment must be none or fgvc, got 'mixup'"),
        ({"train_on": "all"}, "train_on must be train or train+val, got 'all'"),
    ],
)
def test_unknown_input_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pt.FitError) as caught:
        pt.Recipe(**settings)
    assert str(caught.value) == message
