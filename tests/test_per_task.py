"""One plugin for each experience, and a backbone adapted to the first: what is shared stays as it was."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from fitting import make_task, vit
from petiole.continual.adapting import adapt_first, of_classes
from petiole.continual.exemplars import ClassBalanced
from petiole.continual.features import Extractor
from petiole.continual.heads import HeadLearner
from petiole.continual.learner import run
from petiole.continual.per_task import PluginPerTask
from petiole.continual.streams import Stream, class_incremental, smooth
from petiole.continual.taer import TAER
from petiole.tasks import Task

GROUPS = [(4, 1), (3,), (0, 2, 5)]
LORA: dict[str, Any] = {"method": "lora", "settings": {"rank": 2, "dropout": 0.2}, "lr": 1e-2}


def images(num: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy squares of 32x32 whose class is which of six bands is bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(num) % 6
    x = torch.randint(0, 100, (num, 3, 32, 32), generator=generator, dtype=torch.uint8)
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 5 * label : 5 * label + 5] += 120
    return x, y


def stream(epochs: int = 2, seed: int = 0) -> Stream:
    return class_incremental(images(), images(12, 1), groups=GROUPS, batch_size=5, epochs=epochs, seed=seed)


def learner(backbone: nn.Module | None = None, **settings: Any) -> PluginPerTask:
    return PluginPerTask(backbone or vit(), **{**LORA, **settings})


def lead(learner: PluginPerTask, stream: Stream, start: tuple[int, int] = (0, 0)) -> PluginPerTask:
    list(run(stream, learner, is_task_known=True, start=start))
    return learner


def bits(state: Any) -> Any:
    """A state whose tensors are their bytes."""
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return state.numpy().tobytes() if isinstance(state, Tensor) else state


@pytest.fixture(scope="module")
def whole() -> PluginPerTask:
    return lead(learner(), stream())


# one plugin for each experience


def test_backbone_stays_as_it_was() -> None:
    backbone = vit()
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in backbone.modules()]
    before = bits(copy.deepcopy(backbone.state_dict()))
    found = lead(learner(backbone), stream(1))
    assert bits(dict(backbone.state_dict())) == bits(dict(before))
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in backbone.modules()] == flags
    shared = dict(backbone.named_parameters())
    for model in found.models:
        assert all(p.data_ptr() == shared[name].data_ptr() for name, p in model.backbone.named_parameters())


def test_later_experiences_change_no_bit_of_earlier_answers() -> None:
    found, (x, _) = learner(), images(12, 1)
    answers: dict[int, Tensor] = {}
    for event in run(stream(), found, is_task_known=True):
        logits = [model.eval()(found.transform.normalize(x)).detach() for model in found.models]
        for i in range(event.experience):
            assert torch.equal(answers[i], logits[i])
        if event.matrix is not None:
            answers[event.experience] = logits[-1]
    assert event.matrix is not None
    assert event.matrix.forgetting() == 0.0
    assert not torch.equal(answers[0][:, :2], answers[2][:, :2])


def test_told_the_task_it_learns() -> None:
    found = learner()
    *_, last = run(stream(12), found, is_task_known=True)
    # guessing comes to 0.61: the mean of 0.5, 1 and 0.33
    assert last.matrix.final_average() > 0.8
    assert found.groups() == [[1, 4], [3], [0, 2, 5]]


def test_answer_is_the_best_of_its_experiences_head(whole: PluginPerTask) -> None:
    x, _ = images(12, 1)
    logits = whole.models[2].eval()(whole.transform.normalize(x))
    expected = [[0, 2, 5][int(row.argmax())] for row in logits]
    assert whole.predict(x, (5, 2, 0)).tolist() == expected
    among = [[0, 5][int(row[[0, 2]].argmax())] for row in logits]
    assert whole.predict(x, [5, 0]).tolist() == among


def test_class_that_comes_alone_is_its_own_answer(whole: PluginPerTask) -> None:
    assert whole.predict(images(12, 1)[0], [3]).tolist() == [3] * 12


@pytest.mark.parametrize("seed", range(4))
def test_second_row_of_a_class_that_is_alone_never_answers(seed: int) -> None:
    # before anything is learnt, either row may be ahead
    found = learner(seed=seed)
    found.begin(stream()[1])
    assert found.predict(images(6)[0]).tolist() == [3] * 6


def test_answer_leaves_modes_alone(whole: PluginPerTask) -> None:
    whole.models[0].train()
    whole.predict(images(2)[0], (1, 4))
    assert whole.models[0].training


def test_latest_of_the_experiences_with_the_classes_answers() -> None:
    found, x = lead(learner(), class_incremental(images(), groups=[(4, 1), (1, 4, 0)], batch_size=6)), images(12, 1)[0]
    logits = found.models[1].eval()(found.transform.normalize(x))[:, [1, 2]]
    assert found.predict(x, (4, 1)).tolist() == [[1, 4][int(row.argmax())] for row in logits]


def test_nothing_learnt_is_minus_one() -> None:
    assert learner().predict(images(4)[0]).tolist() == [-1] * 4


def test_question_across_experiences_is_refused(whole: PluginPerTask) -> None:
    for among, num in ((None, 6), ((4, 3), 2), ((7,), 1)):
        with pytest.raises(pt.FitError, match=f"no experience has all of {num} classes, .* is_task_known=True to run"):
            whole.predict(images(2)[0], among)


def test_one_experience_needs_no_among() -> None:
    found = lead(learner(), class_incremental(images(), groups=[(4, 1)], batch_size=8))
    assert set(found.predict(images(6)[0]).tolist()) <= {1, 4}


@pytest.mark.parametrize("steps", [0, 3, 7, 12])
def test_restored_learner_goes_on_bit_for_bit(steps: int, whole: PluginPerTask) -> None:
    first, start = learner(), (0, 0)
    for _, event in zip(range(steps), run(stream(), first, is_task_known=True), strict=False):
        start = (event.experience, event.step) if event.matrix is None else (event.experience + 1, 0)
    state = first.state()
    kept = bits(state)
    # twice from the same state: whoever goes on must not write into it
    for _ in range(2):
        second = learner()
        second.restore(state)
        lead(second, stream(), start)
        assert bits(second.state()) == bits(whole.state())
        assert bits(state) == kept
    json.dumps([state["labels"], state["progress"]])


def test_dropout_follows_from_the_seed_alone(whole: PluginPerTask) -> None:
    found = [learner(), learner(seed=1), learner(settings={"rank": 2, "dropout": 0.0})]
    for i, one in enumerate(found):
        torch.manual_seed(i)
        for event in run(stream(), one, is_task_known=True):
            torch.rand(event.step)
    same, other, without = (bits(one.state()) for one in found)
    assert same == bits(whole.state())
    assert other["models"] != same["models"]
    assert without["models"] != same["models"]


def test_dropout_has_a_seed_of_its_own() -> None:
    found = learner(), learner(), learner(seed=1)
    found[0].begin(stream()[0])
    begun = found[0].state()
    for one in found:
        # the same weights for all, of which only the third was given other settings
        one.restore(begun)
        one.observe(images()[0][[1, 4]], torch.tensor([1, 4]))
    same, again, other = (bits(one.state()["models"]) for one in found)
    assert same == again
    assert same != other


def test_every_experience_and_every_seed_starts_from_values_of_its_own() -> None:
    first, second = learner(), learner(seed=10)
    starts = []
    for one in (first, second):
        for _ in range(2):
            one.begin(stream()[0])
            starts.append(one.models[-1].task_state()["head.weight"].tolist())
    assert all(start not in starts[:i] for i, start in enumerate(starts))


def test_steps_draw_nothing_from_the_callers_generator() -> None:
    found = learner()
    found.begin(stream()[0])
    before = torch.get_rng_state()
    found.observe(images()[0][[1, 4]], torch.tensor([1, 4]))
    assert torch.equal(torch.get_rng_state(), before)


def test_step_is_one_of_adamw_along_a_cosine() -> None:
    found, plain = (learner(settings={"rank": 2, "dropout": 0.0}, weight_decay=0.1) for _ in range(2))
    experience = stream(3)[0]
    lead(found, class_incremental(images(), groups=GROUPS[:1], batch_size=5, epochs=3))
    plain.begin(experience)
    model = plain.models[0].train()
    optimizer = torch.optim.AdamW([p for _, p in model.trained()], 1e-2, weight_decay=0.1)
    for step, (x, y) in enumerate(experience.batches()):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / experience.num_steps)) / 2
        optimizer.zero_grad()
        # the same function as the learner's, bit for bit: AdamW blows up what rounds otherwise
        F.cross_entropy(model(plain.transform.normalize(x)), (y == 4).long()).backward()
        optimizer.step()
    assert bits(found.models[0].task_state()) == bits(model.task_state())


def test_normalised_images_are_taken_as_they_are(whole: PluginPerTask) -> None:
    x = images(6)[0]
    assert torch.equal(whole.predict(x, (0, 2, 5)), whole.predict(whole.transform.normalize(x), (0, 2, 5)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"method": "lorra"}, pt.PluginError, "lorra.* lora"),
        ({"method": "lora", "settings": {"rank": 0}}, pt.PluginError, "rank"),
        ({"lr": 0.0}, pt.FitError, r"lr is above 0 and weight_decay 0 or more, got 0.0 and 0.0001"),
        ({"weight_decay": -1.0}, pt.FitError, r"lr is above 0 and weight_decay 0 or more, got 0.01 and -1.0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_learnt(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        learner(**settings)


def test_stream_without_boundaries_is_refused() -> None:
    with pytest.raises(pt.FitError, match="PluginPerTask must be told where experiences begin and end"):
        run(smooth(images()), learner())
    with pytest.raises(pt.FitError, match=r"PluginPerTask must be told .*: call begin\(experience\) first"):
        learner().observe(*images(2))


def test_loss_that_is_not_finite_is_refused_in_its_step() -> None:
    found = learner()
    found.begin(stream()[0])
    found.observe(images()[0][[1, 4]], torch.tensor([1, 4]))
    with pytest.raises(pt.DivergedError, match="the loss is nan in step 1 of experience 0: lower lr"):
        found.observe(torch.full((2, 3, 32, 32), torch.nan), torch.tensor([1, 4]))


# classes of a task


def test_part_of_a_task_is_numbered_in_the_order_given() -> None:
    task = make_task()
    part = of_classes(task, [2, 0])
    assert part.classes == ("blue", "red")
    for name in ("train", "val", "test"):
        split, found = getattr(task, name), getattr(part, name)
        chosen = [i for i, label in enumerate(split.labels) if label != 1]
        assert found.labels.tolist() == [{2: 0, 0: 1}[int(split.labels[i])] for i in chosen]
        for place, i in enumerate(chosen):
            assert np.array_equal(np.asarray(found.images[place]), np.asarray(split.images[i]))


def test_split_without_an_image_of_the_classes_is_left_out() -> None:
    part = of_classes(make_task(num_val=1, num_test=0), [1, 2])
    assert part.val is None
    assert part.test is None
    assert len(part.train)


@pytest.mark.parametrize("absent", [3, 7, -1])
def test_class_without_training_image_is_refused(absent: int) -> None:
    task = make_task(classes=("red", "green", "blue", "grey"))
    with pytest.raises(pt.TaskError, match=f"squares has no training image of class {absent}"):
        of_classes(task, [0, absent])


# a backbone adapted to the first experience


def adapted(backbone: nn.Module, task: Task | None = None, **more: Any) -> pt.Adapted:
    recipe = pt.Recipe(epochs=2, batch_size=4, lr=1e-2, precision="fp32")
    return adapt_first(backbone, [pt.LoRA(rank=2)], task or make_task(), [2, 0], recipe, progress=False, **more)


def features(model: pt.Adapted) -> Tensor:
    return Extractor(model, dtype=torch.float32)(images(6)[0])


def test_adapted_features_are_others_and_the_backbone_stays() -> None:
    backbone = vit()
    before = bits(dict(copy.deepcopy(backbone.state_dict())))
    model = adapted(backbone)
    assert (features(model) - features(pt.adapt(backbone))).abs().max() > 1e-3
    assert bits(dict(backbone.state_dict())) == before
    assert model.classes == ("blue", "red")


def test_first_adaptation_is_a_fit_on_those_classes() -> None:
    task, recipe = make_task(), pt.Recipe(epochs=2, batch_size=4, lr=1e-2, precision="fp32")
    split = task.train
    rows = [i for i, label in enumerate(split.labels) if label != 1]
    labels = np.array([{2: 0, 0: 1}[int(split.labels[i])] for i in rows])
    own = pt.Task("squares", ("blue", "red"), pt.tasks.Split(split.part(rows).images, labels))
    expected = pt.adapt(vit(), pt.LoRA(rank=2), classes=("blue", "red"), seed=recipe.seed)
    pt.fit(expected, own, recipe, progress=False)
    found = adapted(vit(), make_task(num_val=0, num_test=0))
    assert bits(found.task_state()) == bits(expected.task_state())


def test_heads_learnt_later_touch_nothing_of_it() -> None:
    task = make_task(30)
    model = adapted(vit(), task)
    before, seen = bits(dict(copy.deepcopy(model.state_dict()))), features(model)
    transform = pt.Transform(model.input_config)
    tasks = class_incremental(task, groups=[(2, 0), (1,)], batch_size=8, transform=transform)
    head = HeadLearner(TAER(ClassBalanced(per_class=2), epochs=1, min_steps=20), extract=Extractor(model))
    *_, last = run(tasks, head)
    assert bits(dict(model.state_dict())) == before
    assert torch.equal(features(model), seen)
    assert last.matrix.values[-1].isfinite().all()
    # the brightest of three channels: guessing comes to 0.33
    assert last.matrix.final_average() > 0.6


def test_one_class_is_too_few_to_adapt_to() -> None:
    with pytest.raises(pt.PluginError, match="a head needs at least two different classes"):
        adapt_first(vit(), [pt.LoRA(rank=2)], make_task(), [2], progress=False)
