"""The online learner: class means by plain loops, what it keeps and draws, exact resumption, and that it learns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from petiole.continual.exemplars import ClassBalanced, Reservoir
from petiole.continual.learner import Learner, run
from petiole.continual.online.learner import OnlineLearner
from petiole.continual.online.objectives import CrossEntropy, Objective, ProxyNCA
from petiole.continual.online.pairs import Hybrid, MultiSimilarity, SupCon
from petiole.continual.online.rehearsal import AGEM, MIR, DarkExperience, Joint, Rehearsal
from petiole.continual.streams import smooth
from petiole.errors import DivergedError, FitError
from streaming import network, noise, samples, stream

pytest.importorskip("pytorch_metric_learning")


def learner(objective: Objective | None = None, **settings: Any) -> OnlineLearner:
    settings = {"lr": 0.05, "replay": 10, **settings}
    exemplars = settings.pop("exemplars", Reservoir(30))
    return OnlineLearner(network(), ProxyNCA() if objective is None else objective, exemplars, **settings)


def fed(online: OnlineLearner, num: int = 60, batch_size: int = 10) -> OnlineLearner:
    x, y = samples(num)
    for start in range(0, num, batch_size):
        online.observe(x[start : start + batch_size], y[start : start + batch_size])
    return online


class Counted(nn.Module):
    """A network that counts its passes in eval mode, and keeps what it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.passes = network(), 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += not self.training
        self.seen.append(x.detach())
        return self.inner(x)


@pytest.mark.parametrize("renorm", [True, False])
def test_prediction_is_the_nearest_class_mean_of_the_exemplars(renorm: bool) -> None:
    online = fed(learner(renorm=renorm))
    assert online.exemplars is not None
    x, y = online.exemplars.all()
    inner = online.network.eval()
    means = {}
    for c in sorted(set(y.tolist())):
        rows = [inner(row[None])[0] for row, label in zip(x, y, strict=True) if label == c]
        mean = torch.stack([row / row.norm() for row in rows]).mean(0)
        means[c] = mean / mean.norm() if renorm else mean
    expected = []
    for row in samples(50, seed=3)[0]:
        e = inner(row[None])[0]
        expected.append(min(means, key=lambda c: (e / e.norm() - means[c]).square().sum().item()))
    assert len(set(expected)) == 4
    assert online.predict(samples(50, seed=3)[0]).tolist() == expected


def test_means_are_computed_only_after_something_was_learnt() -> None:
    inner = Counted()
    online = OnlineLearner(inner, ProxyNCA(), Reservoir(30), replay=5)
    x, y = samples(10)
    online.observe(x, y)
    assert inner.passes == 0
    online.predict(x)
    assert inner.passes == 2  # the exemplars, and x
    online.predict(x)
    online.predict(x, among=[1])
    assert inner.passes == 4
    online.observe(x, y)
    online.predict(x)
    assert inner.passes == 6


def test_means_follow_the_weights() -> None:
    online = fed(learner())
    x = samples(60, seed=5)[0]
    online.predict(x)
    assert online._means is not None
    old = online._means[0]
    fed(online)
    online.predict(x)
    assert not torch.equal(online._means[0], old)


def test_a_class_without_exemplars_is_never_predicted() -> None:
    online = learner(exemplars=Reservoir(2))
    x, y = samples(40)
    online.observe(x, y)
    assert online.exemplars is not None
    kept = set(online.exemplars.labels.tolist())
    assert len(kept) < 4
    assert set(online.predict(x).tolist()) <= kept
    absent = min({0, 1, 2, 3} - kept)
    assert set(online.predict(x, among=[absent]).tolist()) == {-1}
    assert set(online.predict(x, among=[absent, min(kept)]).tolist()) == {min(kept)}


@pytest.mark.parametrize("classifier", ["ncm", "softmax"])
def test_nothing_is_known_before_something_was_learnt(classifier: str) -> None:
    assert learner(classifier=classifier).predict(samples(3)[0]).tolist() == [-1, -1, -1]


def test_softmax_is_the_largest_logit_among_those_asked_for() -> None:
    online = fed(learner(CrossEntropy(), classifier="softmax"))
    x = samples(40, seed=2)[0]
    with torch.no_grad():
        logits = online.objective.logits(online.network.eval()(x))
    for among in (None, [1, 3], [2]):
        columns = [i for i, c in enumerate(online.objective.classes) if among is None or c in among]
        expected = [online.objective.classes[max(columns, key=lambda i: row[i].item())] for row in logits]
        assert online.predict(x, among).tolist() == expected


def test_a_step_is_sgd_on_the_joint_batch() -> None:
    online = fed(learner(CrossEntropy(), lr=0.3, replay=7))
    reference, head = network(), nn.Linear(5, 4)
    reference.load_state_dict(online.network.state_dict())
    rows = online.objective.rows
    assert isinstance(online.objective, CrossEntropy)
    assert rows is not None
    order = torch.tensor(rows.classes).argsort()
    with torch.no_grad():
        head.weight.copy_(torch.cat([block.weight for block in rows.blocks])[order])
        head.bias.copy_(torch.cat([block.bias for block in rows.blocks])[order])
    assert online.exemplars is not None
    twin = Reservoir(30)
    twin.restore(online.exemplars.state())
    drawn_x, drawn_y = twin.sample(7)
    x, y = samples(10, seed=4)
    online.observe(x, y)
    optimizer = torch.optim.SGD([*reference.parameters(), *head.parameters()], 0.3)
    F.cross_entropy(head(reference.train()(torch.cat([x, drawn_x]))), torch.cat([y, drawn_y])).backward()
    optimizer.step()
    for found, expected in zip(online.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.cat([block.weight for block in rows.blocks])[order], head.weight)


def test_exemplars_are_kept_as_they_came() -> None:
    images = torch.randint(256, (12, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    online = learner(exemplars=Reservoir(12), augment=lambda x, generator: 255 - x, normalize=lambda x: x.float() - 7)
    online.observe(images, torch.arange(12) % 3)
    assert online.exemplars is not None
    assert torch.equal(online.exemplars.all()[0], images)


@pytest.mark.parametrize("normalize", [None, lambda x: x.double() * 2])
def test_integers_are_scaled_unless_told_otherwise(normalize: Callable[[Tensor], Tensor] | None) -> None:
    inner = Counted()
    if normalize is not None:
        inner = inner.double()
    online = OnlineLearner(inner, ProxyNCA(), Reservoir(4), normalize=normalize)
    images = torch.arange(24, dtype=torch.uint8).view(4, 6)
    online.observe(images, torch.arange(4))
    expected = images / 255 if normalize is None else images.double() * 2
    torch.testing.assert_close(inner.seen[0], expected)


def test_views_are_augmented_apart_and_share_their_labels() -> None:
    inner = Counted()
    seen: list[tuple[Tensor, Tensor]] = []

    class Spied(SupCon):
        def forward(self, features: Tensor, labels: Tensor, is_incoming: Tensor) -> Tensor:
            seen.append((labels, is_incoming))
            return super().forward(features, labels, is_incoming)

    online = OnlineLearner(inner, Spied(), Reservoir(20), replay=3, views=2, augment=noise)
    x, y = samples(4)
    online.observe(x, y)
    online.observe(x, y)
    assert [len(batch) for batch in inner.seen] == [8, 14]
    first, second = inner.seen[0].chunk(2)
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, x, atol=0.5, rtol=0)
    labels, is_incoming = seen[1]
    assert torch.equal(labels[:7], labels[7:])
    assert is_incoming.tolist() == [True] * 4 + [False] * 3 + [True] * 4 + [False] * 3


@pytest.mark.parametrize("objective", [Hybrid, ProxyNCA, SupCon, MultiSimilarity])
def test_it_learns_classes_that_come_one_after_the_other(objective: Callable[[], Objective]) -> None:
    *_, last = run(stream(), learner(objective(), lr=0.1))
    assert last.matrix is not None
    assert last.matrix.final_average() > 0.95


def test_it_learns_a_stream_without_boundaries() -> None:
    *_, last = run(smooth(samples(400), samples(80, seed=1), num_checkpoints=3, batch_size=10), learner(Hybrid()))
    assert last.matrix is not None
    assert last.matrix.final_average() > 0.95


def test_class_means_of_features_that_were_not_trained_are_worse() -> None:
    # so that the two tests above show learning
    *_, last = run(stream(), learner(lr=1e-9))
    assert last.matrix is not None
    assert last.matrix.final_average() < 0.8


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "hybrid": lambda: {"objective": Hybrid()},
    "cross-entropy": lambda: {"objective": CrossEntropy(negatives="incoming"), "classifier": "softmax"},
    "projected": lambda: {"objective": SupCon(projection=4), "views": 2},
    "adam": lambda: {"objective": ProxyNCA(), "optimizer": partial(torch.optim.AdamW, weight_decay=0.1), "lr": 0.01},
    "momentum": lambda: {"objective": Hybrid(), "optimizer": partial(torch.optim.SGD, momentum=0.9)},
    "balanced": lambda: {"objective": ProxyNCA(), "exemplars": ClassBalanced(9, seed=4)},
    "interfered": lambda: {"objective": CrossEntropy(), "rehearsal": MIR(candidates=15), "classifier": "softmax"},
    "projected gradients": lambda: {"objective": CrossEntropy(), "rehearsal": AGEM()},
    "dark": lambda: {"objective": CrossEntropy(), "rehearsal": DarkExperience(num_classes=6), "views": 2},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_restored_learner_goes_on_bit_for_bit(parts: Callable[[], dict[str, Any]]) -> None:
    def make() -> OnlineLearner:
        return learner(**{"augment": noise, **parts()})

    batches = [batch for experience in stream(120) for batch in experience.batches()]
    one = make()
    for x, y in batches[:7]:
        one.observe(x, y)
    state, kept = one.state(), one.state()
    other = make()
    other.observe(*samples(10, seed=9))
    other.restore(state)
    for x, y in batches[7:]:
        one.observe(x, y)
        other.observe(x, y)
    assert equal(one.state(), other.state())
    assert torch.equal(one.predict(samples(50)[0]), other.predict(samples(50)[0]))
    # whoever restores from it once more finds it as it was
    assert equal(state, kept)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_state_is_plain_and_does_not_change_with_the_learner(parts: Callable[[], dict[str, Any]]) -> None:
    online = fed(learner(**{"augment": noise, **parts()}))
    state, again = online.state(), online.state()
    check_plain(state)
    fed(online)
    assert equal(state, again)
    assert not equal(state, online.state())


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7)) if isinstance(one, Tensor) else one == other


def check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, inside in value.items():
            assert isinstance(key, str)
            check_plain(inside)
    elif isinstance(value, list):
        for inside in value:
            check_plain(inside)
    else:
        assert isinstance(value, Tensor | int | float | str)


def test_results_do_not_depend_on_the_global_generator() -> None:
    states = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(fed(learner(Hybrid(pairs=SupCon(projection=4)), augment=noise)).state())
    assert equal(*states)


def test_frozen_parameters_stay_and_the_rest_learns() -> None:
    online = learner()
    frozen = next(online.network.parameters())
    frozen.requires_grad_(False)
    online = OnlineLearner(online.network, ProxyNCA(), Reservoir(30))
    before = {name: p.clone() for name, p in online.network.named_parameters()}
    fed(online)
    changed = {name for name, p in online.network.named_parameters() if not torch.equal(p, before[name])}
    assert "0.weight" not in changed
    assert {"3.weight", "1.weight"} <= changed


def test_the_learning_rate_may_change_between_steps() -> None:
    online = fed(learner())
    before = [p.clone() for p in online.network.parameters()]
    online.lr = 1e-30
    fed(online)
    assert all(torch.equal(p, old) for p, old in zip(online.network.parameters(), before, strict=True))


@pytest.mark.slow
def test_a_plugin_on_a_frozen_backbone_learns_online() -> None:
    model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=4), prove=False)
    config = pt.Transform(model.input_config)
    online = OnlineLearner(model, ProxyNCA(), Reservoir(20), lr=0.01, replay=4, normalize=config.normalize)
    images = torch.randint(256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(4):
        online.observe(images, torch.arange(4))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert online.predict(images).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "knn"}, "'ncm' or 'softmax', got 'knn'"),
        ({"exemplars": None}, "class means and replay need exemplars"),
        ({"exemplars": None, "classifier": "softmax"}, "class means and replay need exemplars"),
        ({"objective": SupCon(), "classifier": "softmax"}, "SupCon has no logits"),
        ({"objective": SupCon(), "rehearsal": MIR()}, "SupCon has no logits"),
        ({"lr": 0}, "lr is above 0 and replay is 0 or more, got 0 and 10"),
        ({"replay": -1}, "got 0.05 and -1"),
        ({"views": 2}, "2 views are copies that look different: they need augment"),
        ({"views": 0, "augment": noise}, "0 views"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message):
        learner(**settings)


def test_a_loss_that_is_not_finite_stops_before_anything_changes() -> None:
    online = fed(learner())
    before = [p.clone() for p in online.network.parameters()]
    assert online.exemplars is not None
    kept = online.exemplars.all()[0].clone()
    with pytest.raises(DivergedError, match="the loss is nan: lower lr"):
        online.observe(torch.full((4, 6), torch.nan), torch.arange(4))
    assert all(torch.equal(p, old) for p, old in zip(online.network.parameters(), before, strict=True))
    assert torch.equal(online.exemplars.all()[0], kept)


def test_every_setting_is_kept_under_its_name() -> None:
    import inspect

    parts: list[Learner | Objective | Rehearsal] = [learner(), Hybrid(), MultiSimilarity(), SupCon(), CrossEntropy()]
    parts += [ProxyNCA(), Joint(), MIR(), AGEM(), DarkExperience(num_classes=3)]
    for part in parts:
        assert [name for name in inspect.signature(type(part)).parameters if not hasattr(part, name)] == []
