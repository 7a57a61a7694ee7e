"""Learners by name, plans of streams, and the choice on validation."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import petiole as pt
from fitting import make_task, vit
from petiole.cli import _stream
from petiole.continual import TAER, ConFiT, HeadLearner, OnlineLearner, Plan, class_incremental, smooth
from petiole.continual.catalogue import (
    LEARNERS,
    POLICIES,
    Rest,
    headless,
    input_of,
    on_features,
    on_network,
    settings_of,
)
from petiole.continual.choosing import CANDIDATES, choose
from petiole.continual.learner import Learner
from petiole.continual.online.baselines import GDumb
from petiole.continual.parts import PARTS
from petiole.continual.per_task import PluginPerTask
from petiole.continual.samples import Arrays, of_classes
from petiole.continual.saving import load_learner, save_learner
from petiole.continual.scoring import labels_of, score
from petiole.continual.sources import parted, samples_of, transform_of

HEADS = [name for name, found in LEARNERS.items() if found.kind == "head"]
NETWORKS = [name for name, found in LEARNERS.items() if found.kind != "head"]


def network() -> torch.nn.Module:
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("resnet10t", num_classes=4).eval()


def seer() -> pt.Adapted:
    return pt.adapt(vit(), prove=False)


def rest(**settings: Any) -> Rest:
    return Rest(**{"num_classes": 3, "per_class": 2, **settings})


# the table


def test_every_learner_of_the_table_of_files_can_be_asked_for_by_name() -> None:
    asked = {(found.module, found.maker) for found in LEARNERS.values()}
    learners = {
        name
        for name, (module, maker) in PARTS.items()
        if module.split(".")[0] in ("closed_form", "trained", "replay", "taer", "per_task")
        or (module, maker) in (("confit.learner", "ConFiT"), ("online.baselines", "GDumb"))
        or module == "confit.baselines"
    }
    assert {PARTS[name] for name in learners} <= asked
    functions = importlib.import_module("petiole.continual.online.baselines")
    made = {name for name, f in vars(functions).items() if inspect.isfunction(f) and f.__module__ == functions.__name__}
    # without exemplars there is nothing that a command could set
    assert made - {maker for _, maker in asked} == {"fine_tune"}


def test_help_names_every_learner_in_order() -> None:
    assert list(LEARNERS) == sorted(LEARNERS)
    assert ", ".join(LEARNERS) == _stream.NAMES


@pytest.mark.parametrize("name", LEARNERS)
def test_settings_are_plain_values_that_the_maker_takes(name: str) -> None:
    kinds = (bool, int, float, str, list, tuple, type(None))
    assert all(isinstance(value, kinds) for value in settings_of(name).values())


@pytest.mark.parametrize("name", HEADS)
def test_head_of_a_name_learns_and_comes_back_from_a_file(name: str, tmp_path: Any) -> None:
    learner = on_features(
        name, seer(), rest(), {**settings_of(name), **({"num_projections": 20} if "random" in name else {})}
    )
    images = samples_of(learner, make_task().train)
    (experience,) = class_incremental(images, num_experiences=1)
    for x, y in experience.batches():
        learner.observe(x, y)
    learner.end(experience)
    save_learner(learner, tmp_path / "it.safetensors", classes=["red", "green", "blue"])
    again = load_learner(tmp_path / "it.safetensors", backbone=vit())
    x = images.batch(range(5))[0]
    assert torch.equal(again.predict(x), learner.predict(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_a_name_is_left_as_it_was(name: str) -> None:
    net = vit() if name == "plugins" else network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    small = {"epochs": 1} if name == "gdumb" else {}
    learner = on_network(name, net, input_of(net, None if name == "plugins" else 32), rest(augment="shift"), small)
    x, y = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6) % 3
    (experience,) = class_incremental((x, y), num_experiences=1, batch_size=6)
    learner.begin(experience)
    learner.observe(x, y)
    learner.end(experience)
    assert set(learner.predict(x, [0, 1, 2]).tolist()) <= {0, 1, 2}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_kinds_are_what_they_say() -> None:
    net = network()
    kinds = {"confit": ConFiT, "generative": OnlineLearner, "gdumb": GDumb}
    for name, kind in kinds.items():
        assert type(on_network(name, net, input_of(net, 32), rest(), {})) is kind
    assert type(on_network("plugins", vit(), input_of(vit()), rest(), {})) is PluginPerTask
    taer = on_features("taer", seer(), rest(), {"lr": 0.5})
    assert isinstance(taer.head, TAER)
    assert (taer.head.lr, taer.head.exemplars.per_class) == (0.5, 2)


def test_exemplars_are_bounded_as_asked() -> None:
    for policy, kind in POLICIES.items():
        found = rest(policy=policy, capacity=9).exemplars()
        assert type(found) is kind
        assert found.capacity == 9
    # a reservoir knows no classes: as many in all
    assert rest(policy="reservoir").exemplars().capacity == 6
    assert rest(policy="ring").exemplars().per_class == 2


def test_classifier_is_left_out() -> None:
    net = network()
    features = headless(net)(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, net.num_features)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    bare = torch.nn.Linear(3, 3)
    with pytest.raises(pt.BackboneError, match="Linear has no classifier that could be left out"):
        headless(bare)


def test_size_is_the_models_own_or_the_one_asked_for() -> None:
    assert input_of(vit()).input_size == (3, 32, 32)
    assert input_of(network(), 48).input_size == (3, 48, 48)
    with pytest.raises(pt.BackboneError, match="takes images of 32 pixels only"):
        input_of(vit(), 48)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "online-er",
            {"policy": "rings"},
            "exemplars are kept by class-balanced, herding, reservoir, ring, got 'rings'",
        ),
        ("online-er", {"augment": "shear"}, "images are augmented by none, shift, crop, got 'shear'"),
        ("taerr", {}, r"no learner is called 'taerr' \(did you mean 'taer'\?\): choose a-gem, confit"),
    ],
)
def test_unknown_words_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pt.FitError, match=message):
        on_network(name, network(), input_of(network(), 32), rest(**settings), {})


# plans


def test_plan_makes_the_streams_of_the_functions() -> None:
    data = torch.randn(40, 3), torch.arange(40) % 8
    cut = Plan(num_experiences=3, first=4, order=5, batch_size=7, epochs=2, seed=9)
    by_hand = class_incremental(data, num_experiences=3, first=4, order=5, batch_size=7, epochs=2, seed=9)
    for mine, theirs in zip(cut.stream(data), by_hand, strict=True):
        assert mine.classes == theirs.classes
        for (x, y), (a, b) in zip(mine.batches(), theirs.batches(), strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
    flowing = Plan(num_experiences=4, sigma=0.2, seed=3)
    assert not flowing.has_boundaries
    theirs = smooth(data, sigma=0.2, num_checkpoints=4, batch_size=32, seed=3)
    assert [e.classes for e in flowing.stream(data)] == [e.classes for e in theirs]


def test_plan_tells_the_classes_without_the_samples() -> None:
    labels = torch.arange(40) % 8
    plan = Plan(num_experiences=3, order=2)
    told = plan.labels(labels)
    assert [sorted(group) for group in told] == [list(e.classes) for e in plan.stream((torch.randn(40, 3), labels))]


@pytest.mark.parametrize("settings", [{"first": 2}, {"epochs": 2}])
def test_smooth_plan_takes_nothing_of_boundaries(settings: dict[str, int]) -> None:
    with pytest.raises(pt.TaskError, match="a smooth stream passes once and has no first experience"):
        Plan(sigma=0.1, **settings)


# choosing


class Fixed(Learner):
    """Is right on a share of the classes."""

    def __init__(self, known: Sequence[int], needs_boundaries: bool = False) -> None:
        self.known = list(known)
        self.needs_boundaries = needs_boundaries  # type: ignore[misc]

    def observe(self, x: Tensor, y: Tensor) -> None:
        if 99 in self.known:
            raise pt.DivergedError("gone")

    def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
        labels = x[:, 0].long()
        return torch.where(torch.isin(labels, torch.tensor(self.known)), labels, -1)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None: ...


def samples() -> tuple[Tensor, Tensor]:
    labels = torch.arange(24) % 4
    return labels[:, None].float(), labels


def test_best_on_validation_comes_first_and_ties_keep_their_order() -> None:
    known = {"none": [], "half": [0, 1], "all": [0, 1, 2, 3], "other half": [2, 3], "gone": [99]}
    stream, done = class_incremental(samples(), samples(), num_experiences=2), []
    tried = choose({key: {} for key in known}, lambda name, settings: Fixed(known[name]), stream, done.append)
    assert [item.name for item in tried] == ["all", "half", "other half", "none"]
    assert [item.final_average for item in tried] == [1.0, 0.5, 0.5, 0.0]
    assert done == [1, 2, 3, 4, 5]


def test_candidates_that_need_boundaries_are_left_out_without() -> None:
    stream = smooth(samples(), samples(), num_checkpoints=2)
    tried = choose({"a": {}, "b": {}}, lambda name, settings: Fixed([0], name == "a"), stream)
    assert [item.name for item in tried] == ["b"]
    with pytest.raises(pt.FitError, match="none of a can learn from this stream"):
        choose({"a": {}}, lambda name, settings: Fixed([0], True), stream)


def test_nothing_is_chosen_without_validation() -> None:
    with pytest.raises(pt.FitError, match="chosen on validation samples, and there are none: name one"):
        choose({"a": {}}, lambda name, settings: Fixed([]), class_incremental(samples(), num_experiences=2))


def test_candidates_are_heads_of_the_table() -> None:
    for name, settings in CANDIDATES.items():
        assert LEARNERS[name].kind == "head"
        assert set(settings) <= set(settings_of(name))


# sources and scores


def test_images_become_what_the_learner_takes() -> None:
    task = make_task()
    head = on_features("ncm", seer(), rest(), {})
    assert samples_of(head, task.train).batch([0])[0].shape == (1, 32)
    online = on_network("online-er", vit(), input_of(vit()), rest(), {})
    assert samples_of(online, task.train).batch([0])[0].shape == (1, 3, 32, 32)
    assert transform_of(online) == transform_of(head)


def test_joined_samples_come_apart_again() -> None:
    task = make_task()
    train, val = parted(
        samples_of(on_network("online-er", vit(), input_of(vit()), rest(), {}), task.joined().train), task
    )
    assert train.labels.tolist() == task.train.labels.tolist()
    assert val is not None
    assert val.labels.tolist() == task.val.labels.tolist()
    assert torch.equal(
        val.batch([1])[0][0], transform_of(on_features("ncm", seer(), rest(), {})).pixels(task.val.images[1])
    )


def test_score_is_that_of_a_plain_count() -> None:
    x, y = samples()
    found = score(Fixed([0, 2]), Arrays(x[:21], y[:21]), batch_size=4)
    assert found.accuracy == 11 / 21
    assert found.by_class == {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}
    assert found.mean_class_accuracy == 0.5
    assert (found.num_samples, found.is_task_known) == (21, False)


def test_heads_of_their_own_are_asked_with_their_classes() -> None:
    class Grouped(Fixed):
        def groups(self) -> Sequence[Sequence[int]]:
            return [[0, 1], [1, 2]]

        def predict(self, x: Tensor, among: Sequence[int] | None = None) -> Tensor:
            asked.append((tuple(among or ()), len(x)))
            return x[:, 0].long()

    asked: list[tuple[tuple[int, ...], int]] = []
    x, y = samples()
    three = of_classes(Arrays(x, y), torch.tensor([0, 1, 2]))
    found = score(Grouped([]), three)
    assert (found.accuracy, found.is_task_known) == (1.0, True)
    # the latest experience that brought a class answers for it
    assert asked == [((0, 1), 6), ((1, 2), 12)]
    with pytest.raises(pt.FitError, match="no experience has brought class 3"):
        score(Grouped([]), Arrays(x, y))


def test_classes_are_found_by_name() -> None:
    assert labels_of(["dog", " cat"], ["cat", "dog"]) == [1, 0]
    with pytest.raises(pt.TaskError, match=r"no class is called 'cot' \(did you mean 'cat'\?\): there are 2"):
        labels_of(["cot"], ["cat", "dog"])


def test_learners_name_their_heads() -> None:
    learner = on_network("plugins", vit(), input_of(vit()), rest(), {})
    data = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6) % 3
    for experience in class_incremental(data, groups=[[0, 2], [1]], batch_size=6):
        learner.begin(experience)
        learner.end(experience)
    assert [list(group) for group in learner.groups()] == [[0, 2], [1]]
    assert list(HeadLearner(TAER(rest().exemplars())).groups()) == []
