"""The training loop against hand-written ones, and what it keeps, scores and refuses."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import nn

import petiole as pt
from fitting import CLASSES, make_model, make_split, make_task, vit
from petiole.tasks import Pixels, Split, Transform
from petiole.train import loop
from petiole.train import steps as steps_file
from petiole.train.evaluate import Scores
from petiole.train.steps import Steps, schedule
from petiole.train.world import World

RECIPE = pt.Recipe(epochs=3, batch_size=5, lr=1e-2)


def weights(model: pt.Adapted) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.task_state().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fit(model: pt.Adapted, task: pt.Task, recipe: pt.Recipe = RECIPE, **settings: Any) -> pt.FitResult:
    return loop.fit(model, task, recipe, progress=False, **settings)


def closed_form(step: int, per_epoch: int, recipe: pt.Recipe) -> float:
    """The learning rate the recipe promises."""
    warmup = round(min(recipe.warmup_epochs, recipe.epochs / 10) * per_epoch)
    if step < warmup:
        return recipe.lr * (1e-3 + (1 - 1e-3) * step / warmup)
    through = (step - warmup) / (recipe.epochs * per_epoch - warmup)
    return recipe.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * through)) / 2)


@pytest.mark.parametrize(("epochs", "per_epoch", "warmup_epochs"), [(100, 7, 10), (20, 3, 10), (3, 1, 10), (5, 4, 0)])
def test_learning_rate_follows_the_closed_form(epochs: int, per_epoch: int, warmup_epochs: int) -> None:
    recipe = pt.Recipe(epochs=epochs, warmup_epochs=warmup_epochs, lr=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    rates = schedule(optimizer, recipe, per_epoch)
    for step in range(epochs * per_epoch):
        rates.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(closed_form(step, per_epoch, recipe), rel=1e-9)


def test_training_equals_a_hand_written_loop_bit_for_bit() -> None:
    task, recipe = make_task(), pt.Recipe(epochs=2, batch_size=5, lr=1e-2, select="last", label_smoothing=0.1)
    model, oracle = make_model(pt.FacT(rank=2, dropout=0.0)), make_model(pt.FacT(rank=2, dropout=0.0))
    fit(model, task, recipe)

    transform = Transform(oracle.input_config)
    pixels = torch.stack([transform.pixels(task.train.images[i]) for i in range(13)])
    x, y = transform.normalize(pixels), torch.from_numpy(task.train.labels)
    optimizer = torch.optim.AdamW([p for _, p in oracle.trained()], recipe.lr, weight_decay=1e-4)
    rates = schedule(optimizer, recipe, 3)
    oracle.train()
    for epoch in range(2):
        order = torch.from_numpy(np.random.default_rng((0, epoch)).permutation(13))
        for i, rows in enumerate((order[:5], order[5:10], order[10:])):
            rates.step_update(3 * epoch + i)
            optimizer.zero_grad()
            nn.functional.cross_entropy(oracle(x[rows]), y[rows], label_smoothing=0.1).backward()
            optimizer.step()
    assert equal(weights(model), weights(oracle))


def test_head_on_cached_features_equals_training_through_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    cached, plain = make_model(pt.Linear()), make_model(pt.Linear())
    fit(cached, make_task())
    monkeypatch.setattr(steps_file, "_is_head_only", lambda model: False)
    fit(plain, make_task())
    # another batch size rounds otherwise
    torch.testing.assert_close(weights(cached), weights(plain), rtol=1e-4, atol=1e-6)


def test_history_tells_the_mean_loss_over_images() -> None:
    task = make_task(num_train=5)
    model = make_model(pt.FacT(rank=2, dropout=0.0))
    split = Pixels(task.train, Transform(model.input_config))
    images, labels = split.batch(range(5))
    expected = nn.functional.cross_entropy(model(split.transform.normalize(images)), labels)
    # so small a step that the weights stay: batches of 3 and 2 must not count alike
    result = fit(model, task, pt.Recipe(epochs=1, batch_size=3, lr=1e-12))
    assert result.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_training_learns_the_task() -> None:
    task = make_task(num_train=60, num_val=30, num_test=60)
    result = fit(make_model(pt.Full()), task, pt.Recipe(epochs=8, batch_size=10, lr=2e-3))
    assert result.metrics["test_accuracy"] > 0.9
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_same_seed_gives_the_same_weights_whatever_the_callers_generator() -> None:
    first, second = make_model(), make_model()
    fit(first, make_task())
    torch.manual_seed(99)
    before = torch.get_rng_state()
    fit(second, make_task())
    assert equal(weights(first), weights(second))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_weights() -> None:
    first, second = make_model(), make_model()
    fit(first, make_task())
    fit(second, make_task(), pt.Recipe(epochs=3, batch_size=5, lr=1e-2, seed=1))
    assert not equal(weights(first), weights(second))


def test_equal_runs_write_equal_plugin_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(make_model(), make_task(), out=tmp_path / name)
    files = [(tmp_path / name / "plugin.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_plugin_file_is_the_trained_classifier(tmp_path: Path) -> None:
    model = make_model()
    result = fit(model, make_task(), out=tmp_path)
    loaded = pt.load(tmp_path / "plugin.safetensors", vit())
    assert equal(weights(loaded), weights(model))
    metrics = pt.inspect(tmp_path / "plugin.safetensors").metrics
    assert metrics == {key: value for key, value in result.metrics.items() if key != "seconds"}


class Scripted:
    """Stands in for `evaluate`: validation goes as told, and the weights of each validation are remembered."""

    def __init__(self, *accuracies: float) -> None:
        self.accuracies, self.seen, self.num_tests = accuracies, [], 0

    def __call__(self, model: pt.Adapted, pixels: Pixels, world: object, seen: object = None) -> Scores:
        if len(pixels) == 7:
            self.num_tests += 1
            return Scores(0.25 * self.num_tests, 0.0, 7)
        self.seen.append(weights(model))
        return Scores(self.accuracies[len(self.seen) - 1], 0.0, 6)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    def script(*accuracies: float) -> Scripted:
        told = Scripted(*accuracies)
        monkeypatch.setattr(steps_file, "evaluate", told)
        return told

    return script


def test_best_epoch_on_validation_is_kept_and_the_last_one_reported(scripted: Callable[..., Scripted]) -> None:
    told, model = scripted(0.5, 0.7, 0.6), make_model()
    metrics = fit(model, make_task()).metrics
    assert equal(weights(model), told.seen[1])
    assert (metrics["best_epoch"], metrics["val_accuracy"], metrics["last_val_accuracy"]) == (2, 0.7, 0.6)
    # the last epoch is scored on test first, then the kept one
    assert (metrics["last_test_accuracy"], metrics["test_accuracy"]) == (0.25, 0.5)


def test_of_equally_good_epochs_the_later_is_kept(scripted: Callable[..., Scripted]) -> None:
    told, model = scripted(0.7, 0.7, 0.6), make_model()
    assert fit(model, make_task()).metrics["best_epoch"] == 2
    assert equal(weights(model), told.seen[1])


def test_select_last_keeps_the_last_epoch(scripted: Callable[..., Scripted]) -> None:
    told, model = scripted(0.9, 0.7, 0.6), make_model()
    metrics = fit(model, make_task(), pt.Recipe(epochs=3, batch_size=5, select="last")).metrics
    assert equal(weights(model), told.seen[2])
    assert (metrics["best_epoch"], metrics["val_accuracy"]) == (3, 0.6)


def test_eval_every_validates_seldom_and_at_the_end(scripted: Callable[..., Scripted]) -> None:
    scripted(0.5, 0.6, 0.4)
    result = fit(make_model(), make_task(), pt.Recipe(epochs=5, batch_size=5, eval_every=2))
    assert [row["epoch"] for row in result.history if "val_accuracy" in row] == [2, 4, 5]
    assert result.metrics["best_epoch"] == 4


def test_test_split_never_decides() -> None:
    task = make_task()
    wrong = pt.Task("squares", CLASSES, task.train, task.val, Split(task.test.images, (task.test.labels + 1) % 3))
    first, second = make_model(), make_model()
    fit(first, task)
    fit(second, wrong)
    assert equal(weights(first), weights(second))


class Counter(nn.Module):
    """Counts its forward passes in training, as batch norm's running statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return x


def test_buffers_that_training_moves_belong_to_the_kept_weights(scripted: Callable[..., Scripted]) -> None:
    scripted(0.5, 0.7, 0.6)
    backbone = vit()
    backbone.pos_drop = Counter()
    model = make_model(pt.Full(), backbone)
    fit(model, make_task())
    assert model.backbone.pos_drop.seen == 2 * 3  # two epochs of three batches
    assert backbone.pos_drop.seen == 0


@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        (make_task(num_val=0), RECIPE),
        (make_task(num_test=0), RECIPE),
        (make_task(num_val=0, num_test=0), RECIPE),
        (make_task(num_train=3), RECIPE),
        (make_task(num_train=2), RECIPE),
        (make_task(num_train=1), RECIPE),
        (make_task(), pt.Recipe(epochs=2, batch_size=64)),
        (make_task(num_train=11), RECIPE),
        (make_task(), pt.Recipe(epochs=1, batch_size=5, drop_path=0.5)),
        (make_task(), pt.Recipe(epochs=1, batch_size=5, precision="bf16")),
    ],
    ids=["no val", "no test", "train only", "one image a class", "a class without images", "one image",
         "batch above the set", "last batch of one", "drop path", "bf16"],
)  # fmt: skip
def test_odd_tasks_and_recipes_train(task: pt.Task, recipe: pt.Recipe, tmp_path: Path) -> None:
    model = make_model()
    before, result = weights(model), fit(model, task, recipe, out=tmp_path)
    assert not equal(weights(model), before)
    assert not model.training
    assert len(result.history) == recipe.epochs
    assert ("val_accuracy" in result.metrics) == (task.val is not None)
    assert ("test_accuracy" in result.metrics) == ("last_test_accuracy" in result.metrics) == (task.test is not None)


def test_bf16_is_autocast_and_keeps_fp32_weights() -> None:
    half, full = make_model(pt.FacT(rank=2, dropout=0.0)), make_model(pt.FacT(rank=2, dropout=0.0))
    fit(half, make_task(), pt.Recipe(epochs=1, batch_size=5, precision="bf16"))
    fit(full, make_task(), pt.Recipe(epochs=1, batch_size=5))
    assert all(tensor.dtype == torch.float32 for tensor in weights(half).values())
    assert not equal(weights(half), weights(full))
    # three steps of Adam move a weight by at most 3 lr
    torch.testing.assert_close(weights(half), weights(full), rtol=0, atol=6e-3)


def test_drop_path_is_stochastic_depth_in_training_only() -> None:
    first, second, without = make_model(), make_model(), make_model()
    recipe = pt.Recipe(epochs=3, batch_size=5, lr=1e-2, drop_path=0.9)
    fit(first, make_task(), recipe)
    fit(second, make_task(), recipe)
    fit(without, make_task())
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(without))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first(images), first(images))


def test_backbone_is_untouched() -> None:
    backbone = vit()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    fit(make_model(pt.Full(), backbone), make_task(), pt.Recipe(epochs=1, drop_path=0.1))
    assert equal(backbone.state_dict(), before)
    assert not any(type(block.drop_path1).__name__ == "DropPath" for block in backbone.blocks)


def test_every_image_is_trained_on_once_an_epoch() -> None:
    model = make_model(pt.Linear())
    steps = Steps(model, Pixels(make_split(13, 0), Transform(model.input_config)), RECIPE, World("fp32"))
    epochs = [sorted(i for step in range(3 * e, 3 * e + 3) for i in steps.batch(step)) for e in range(3)]
    assert epochs == [list(range(13))] * 3
    assert steps.batch(0) != steps.batch(3)


def test_loss_that_is_not_finite_stops_with_step_and_learning_rate(tmp_path: Path) -> None:
    recipe = pt.Recipe(epochs=10, batch_size=5, lr=1e30, warmup_epochs=0)
    with pytest.raises(pt.FitError, match=r"the loss became \w+ at step \d+ \(epoch \d\) with learning rate 1.0e\+30"):
        fit(make_model(), make_task(), recipe, out=tmp_path)
    assert not (tmp_path / "plugin.safetensors").exists()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("red", "green"), "the model has 3 classes, the task squares has 2"),
        (("red", "blue", "green"), "class 1 is 'green' in the model and 'blue' in squares: adapt it with"),
    ],
)
def test_other_classes_are_refused(classes: tuple[str, ...], message: str, tmp_path: Path) -> None:
    split = Split(make_split(2, 0).images, [0, 1])
    with pytest.raises(pt.FitError, match=message):
        fit(make_model(), pt.Task("squares", classes, split), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_without_a_head_is_refused() -> None:
    model = pt.adapt(vit(), pt.LoRA(rank=2))
    with pytest.raises(pt.FitError, match=r"no head of its own: adapt it with classes=task\.classes"):
        fit(model, make_task())


def test_unreadable_image_is_named_before_anything_is_written(tmp_path: Path) -> None:
    class Broken:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> NoReturn:
            raise ValueError("bad bytes")

        def describe(self, index: int) -> str:
            return f"scan{index}.png"

    task = pt.Task("squares", CLASSES, make_split(3, 0), test=Split(Broken(), [0, 1]))
    with pytest.raises(pt.TaskError, match=r"scan\d.png cannot be read as an image: bad bytes"):
        fit(make_model(), task, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"lr": math.inf}, "lr must be above 0, got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be 0 or more, got -1"),
        ({"drop_path": 1.0}, "drop_path must be from 0 to below 1, got 1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, got 1.0"),
        ({"precision": "fp8"}, "precision must be auto, fp32 or bf16, got 'fp8'"),
        ({"select": "test"}, "select must be best or last, got 'test'"),
        ({"eval_every": 0}, "eval_every must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_recipe_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pt.FitError) as caught:
        pt.Recipe(**settings)
    assert str(caught.value) == message


def test_tensorboard_events_hold_the_history(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(make_model(), make_task(), out=tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("loss", "lr", "val_accuracy"):
        found = [(event.step, event.value) for event in events.Scalars(key)]
        expected = [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in result.history]
        assert found == expected


def test_tensorboard_that_is_missing_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(pt.FitError, match=r"pip install 'petiole\[track\]'"):
        fit(make_model(), make_task(), out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
