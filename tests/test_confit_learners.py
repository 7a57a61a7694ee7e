"""Fine-tuning on experience after experience: ConFiT, its stages, and the baselines."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from petiole.continual.confit.baselines import EWC, Anchoring, FineTune, LwF
from petiole.continual.confit.learner import ConFiT
from petiole.continual.confit.network import TaskNetwork
from petiole.continual.confit.tuning import TaskLearner
from petiole.continual.learner import run
from petiole.continual.streams import Stream, class_incremental, domain_incremental
from petiole.errors import BackboneError, DivergedError, FitError

LEARNERS: dict[str, Callable[..., TaskLearner]] = {"confit": ConFiT, "fine-tune": FineTune, "lwf": LwF, "ewc": EWC}
every_learner = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
SIZE = (3, 8, 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(*, dropout: float = 0.0) -> nn.Sequential:
    """Two convolutions with batch norms, and a classifier that is left out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(6, 10),
        )


def data(num: int = 24, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    labels = torch.arange(num) % num_classes
    return random(num, *SIZE) + labels.view(-1, 1, 1, 1) / num_classes, labels


def stream(num_experiences: int = 2, batch_size: int = 4, epochs: int = 2) -> Stream:
    return class_incremental(
        data(), data(), num_experiences=num_experiences, batch_size=batch_size, epochs=epochs, seed=3
    )


def made(make: Callable[..., TaskLearner], **settings: Any) -> TaskLearner:
    return make(network(), **{"input_size": SIZE, "lr": 0.1, **settings})


def taught(learner: TaskLearner, experiences: Any) -> TaskLearner:
    for experience in experiences:
        learner.begin(experience)
        for x, y in experience.batches():
            learner.observe(x, y)
        learner.end(experience)
    return learner


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """Parameters that are no longer what they were."""
    return {name for name, p in module.named_parameters() if name not in before or not torch.equal(p, before[name])}


@every_learner
def test_learner_leads_through_a_stream(make: Callable[..., TaskLearner]) -> None:
    *_, last = run(stream(epochs=20), made(make), is_task_known=True)
    assert last.matrix.learning_accuracy() > 0.9


@every_learner
def test_network_that_was_given_stays_as_it_was(make: Callable[..., TaskLearner]) -> None:
    given = network().train()
    before = tensors(given)
    taught(make(given, input_size=SIZE, lr=0.1), stream())
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in given.modules())
    assert all(p.requires_grad and p.grad is None for p in given.parameters())


@every_learner
def test_settings_are_kept_under_their_names(make: Callable[..., TaskLearner]) -> None:
    learner = made(make, stages=(0.1, 0.4), seed=5)
    settings = {name: getattr(learner, name) for name in inspect.signature(make).parameters}
    again = make(**settings)
    assert {name: getattr(again, name) for name in settings} == settings


@pytest.mark.parametrize("make", [ConFiT, FineTune, EWC])
def test_heads_of_other_experiences_stay_bit_identical(make: Callable[..., TaskLearner]) -> None:
    learner = taught(made(make), stream().experiences[:1])
    head = tensors(learner.tuned.heads[0])
    taught(learner, stream().experiences[1:])
    assert changed(head, learner.tuned.heads[0]) == set()
    assert changed({}, learner.tuned.heads[1]) == {"weight", "bias"}
    assert bool((learner.tuned.heads[1].weight != 0).all())


def test_stages_train_what_they_say() -> None:
    learner, (experience, _) = made(ConFiT, stages=(0.25, 0.5)), stream(epochs=4)
    assert experience.num_steps == 12
    learner.begin(experience)
    found = []
    for x, y in experience.batches():
        before = tensors(learner.tuned)
        learner.observe(x, y)
        found.append(changed(before, learner.tuned))
    norms = {f"body.{i}.{name}" for i in (1, 4) for name in ("weight", "bias")}
    kernels = {"body.0.weight", "body.3.weight"}
    # a batch with as many samples of each class may leave a fresh head's bias alone; a shift in front of a batch norm
    # has no effect, and gradients of rounding errors only
    free = {"heads.0.bias", "body.0.bias"}
    assert [names - free for names in found[:3]] == [{"heads.0.weight"}] * 3
    assert [names - free for names in found[3:6]] == [{"heads.0.weight"} | norms] * 3
    assert [names - free for names in found[6:]] == [{"heads.0.weight"} | norms | kernels] * 6
    assert not any("body.0.bias" in names for names in found[:6])


@pytest.mark.parametrize(("epochs", "last"), [(1, 1), (2, 2)])
def test_short_experiences_train_everything_too(epochs: int, last: int) -> None:
    learner = made(FineTune, stages=(0.2, 0.5))
    before = tensors(learner.tuned)
    experience = stream(batch_size=12, epochs=epochs).experiences[0]
    assert experience.num_steps == last
    learner.begin(experience)
    learner.tuned.heads[0].weight.data.fill_(0.1).mul_(torch.arange(6))  # a head of zeros gives no gradient
    learner.tuned.heads[0].weight.data[0] *= -1
    for x, y in experience.batches():
        learner.observe(x, y)
    assert {"body.0.weight", "body.3.weight", "body.1.weight"} <= changed(before, learner.tuned)


def test_classifier_at_the_end_is_left_out() -> None:
    example = torch.rand(2, 3, 32, 32)
    for given, d in [
        (timm.create_model("resnet10t"), 512),
        (timm.create_model("resnet10t", num_classes=0), 512),
        (torchvision.models.mobilenet_v2(), 1280),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.BatchNorm1d(5)), 5),
    ]:
        tuned = TaskNetwork(given, example)
        assert tuned.d == d
        assert tuned.eval().features(example).shape == (2, d)


@pytest.mark.parametrize("make", [ConFiT, LwF])
def test_one_that_goes_on_ends_bit_for_bit_the_same(make: Callable[..., TaskLearner]) -> None:
    first, second = stream(epochs=3)
    whole = taught(make(network(dropout=0.5), input_size=SIZE, lr=0.1), (first, second))
    part = taught(make(network(dropout=0.5), input_size=SIZE, lr=0.1), (first,))
    part.begin(second)
    for x, y in list(second.batches())[:5]:
        part.observe(x, y)
    state = copy.deepcopy(part.state())
    list(map(part.observe, *zip(*list(second.batches())[5:], strict=True)))  # what follows does not reach the state
    other = make(network(dropout=0.5), input_size=SIZE, lr=0.1)
    other.restore(state)
    torch.manual_seed(7)  # nor does the global generator matter
    for x, y in second.batches(5):
        other.observe(x, y)
    other.end(second)
    assert_same(whole.state(), other.state())
    x, _ = data()
    assert torch.equal(whole.predict(x, [0, 1]), other.predict(x, [0, 1]))


def test_ewc_goes_on_bit_for_bit() -> None:
    first, second = stream()
    whole = taught(made(EWC, num_samples=5), (first, second))
    other = made(EWC, num_samples=5)
    other.restore(taught(made(EWC, num_samples=5), (first,)).state())
    assert_same(whole.state(), taught(other, (second,)).state())


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_earlier_experience_is_answered_with_its_own_statistics() -> None:
    learner = taught(made(ConFiT, variance="rescaled"), stream().experiences[:1])
    x, _ = data()
    with learner.guard.reading(0), torch.no_grad():
        before = learner.tuned.eval()(x, 0)
    learner.tuned.train()
    # twice the kernels, and other statistics and gains: what an experience keeps makes up for all of it
    with torch.no_grad():
        learner.tuned.body[0].weight.mul_(2)
        learner.tuned.body[0].bias.mul_(2)
        learner.tuned.body[3].weight.mul_(2)
        learner.tuned.body[4].weight.mul_(3)
        learner.tuned.body[1].running_mean.add_(3)
    with learner.guard.reading(0), torch.no_grad():
        torch.testing.assert_close(learner.tuned.eval()(x, 0), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(learner.predict(x, [0, 1]), before.argmax(1))


def test_experience_that_is_being_learnt_is_answered_as_the_network_is() -> None:
    learner, experience = made(ConFiT), stream().experiences[0]
    learner.begin(experience)
    for x, y in experience.batches():
        learner.observe(x, y)
    x, _ = data()
    found = learner.predict(x, experience.classes)
    assert all(module.training for module in learner.tuned.modules())
    with torch.no_grad():
        assert torch.equal(found, learner.tuned.eval()(x, 0).argmax(1))


def test_learning_without_forgetting_takes_the_step_of_its_formula() -> None:
    (first, second), third = stream(), stream().experiences[0]
    learner = taught(made(LwF, strength=0.7, temperature=3.0, lr=0.2), (first, second))
    learner.begin(third)
    with torch.no_grad():
        for p in learner.tuned.heads[2].parameters():
            p.copy_(random(*p.shape, seed=4))
    before, now = copy.deepcopy(learner.tuned).eval(), copy.deepcopy(learner.tuned).train()
    # the old network is that before the experience: what moved since does not count
    with torch.no_grad():
        learner.tuned.body[0].weight.mul_(1.1)
        now.body[0].weight.mul_(1.1)
    x, y = next(third.batches())
    learner.observe(x, y)
    loss = F.cross_entropy(now(x, 2), y - third.classes[0])
    features = None
    for head in range(2):
        with torch.no_grad():
            target = (before(x, head) / 3).exp()
            target = target / target.sum(1, keepdim=True)
        features = now.features(x) if features is None else features
        logits = now.heads[head](features) / 3
        loss = loss - 0.7 * (target * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
    loss.backward()
    for (name, p), q in zip(now.named_parameters(), learner.tuned.parameters(), strict=True):
        torch.testing.assert_close(p - 0.2 * p.grad, q, msg=name)


def test_consolidation_is_the_sum_of_the_experiences_penalties() -> None:
    learner = made(EWC, strength=3.0, num_samples=6)
    anchors, penalties = [], []
    for experience in stream():
        taught(learner, (experience,))
        lone = Anchoring(3.0, 6, learner.seed)
        lone.end(learner.tuned, ((x, y) for x, y in list(experience.batches())[3:]))
        penalties.append(lone)
        anchors.append({name: p.detach().clone() for name, p in learner.tuned.body.named_parameters()})
    with torch.no_grad():
        for i, p in enumerate(learner.tuned.body.parameters()):
            p.add_(0.1 * random(*p.shape, seed=i))
    parameters = dict(learner.tuned.body.named_parameters())
    found = torch.autograd.grad(learner.guard.penalty(learner.tuned, None, None), list(parameters.values()))
    for (name, p), gradient in zip(parameters.items(), found, strict=True):
        expected = sum(
            3.0 * lone.fisher[name] * (p - anchor[name]) for lone, anchor in zip(penalties, anchors, strict=True)
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_fisher_information_is_the_expected_square_of_gradients() -> None:
    tuned = TaskNetwork(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.rand(2, 3))
    tuned.grow((0, 1))
    with torch.no_grad():
        tuned.heads[0].weight.copy_(torch.tensor([[1.0, -0.5], [0.3, 0.8]]))
    x = random(1, 3)
    guard = Anchoring(1.0, 2000, 0)
    guard.end(tuned, iter([(x.expand(2500, 3), torch.zeros(2500))]))
    tuned.eval()
    expected = torch.zeros(2, 3)
    for label in range(2):
        loss = F.cross_entropy(tuned(x, 0), torch.tensor([label]))
        (gradient,) = torch.autograd.grad(loss, tuned.body[0].weight)
        expected += tuned(x, 0).softmax(1)[0, label].detach() * gradient.square()
    torch.testing.assert_close(guard.fisher["0.weight"], expected, rtol=0.1, atol=1e-6)


def test_incomplete_batches_are_left_out() -> None:
    learner = made(FineTune)
    (experience,) = class_incremental((data()[0][:9], data()[1][:9]), num_experiences=1, batch_size=4)
    learner.begin(experience)
    batches = list(experience.batches())
    for x, y in batches[:2]:
        learner.observe(x, y)
    before = tensors(learner.tuned)
    learner.observe(*batches[2])
    assert changed(before, learner.tuned) == set()


def test_answer_is_one_of_the_labels_in_question() -> None:
    learner, (x, _) = made(ConFiT), data()
    assert learner.predict(x[:2], [0, 1]).tolist() == [-1, -1]
    taught(learner, stream().experiences[:1])
    assert set(learner.predict(x).tolist()) == {0, 1}
    assert set(learner.predict(x, [1]).tolist()) == {1}
    assert learner.predict(x[:2], [2, 3]).tolist() == [-1, -1]


def test_latest_of_equal_class_sets_answers() -> None:
    domains = [(random(12, *SIZE, seed=i) + data(12, 2)[1].view(-1, 1, 1, 1), data(12, 2)[1]) for i in range(2)]
    learner = taught(made(ConFiT), domain_incremental(domains, batch_size=4, epochs=2))
    with learner.guard.reading(1), torch.no_grad():
        expected = learner.tuned.eval()(domains[0][0], 1).argmax(1)
    assert torch.equal(learner.predict(domains[0][0], [0, 1]), expected)


def test_question_across_experiences_is_refused() -> None:
    learner, (x, _) = taught(made(ConFiT), stream()), data()
    for among in (None, [0, 2], [1, 9]):
        with pytest.raises(FitError, match=r"no single experience has them all.*run\(\.\.\., is_task_known=True\)"):
            learner.predict(x, among)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lr": 0.0}, "lr is above 0, got 0.0"),
        ({"stages": (0.5, 0.2)}, r"two rising shares from 0 to 1, of norms and of everything, got \[0.5, 0.2\]"),
        ({"stages": (0.5,)}, r"got \[0.5\]"),
    ],
)
@every_learner
def test_settings_of_the_loop_are_checked(make: Callable[..., TaskLearner], settings: Any, reason: str) -> None:
    with pytest.raises(FitError, match=reason):
        made(make, **settings)


def test_settings_of_the_baselines_are_checked() -> None:
    with pytest.raises(FitError, match=r"strength is 0 or more and temperature above 0, got 1\.0 and 0"):
        made(LwF, temperature=0)
    with pytest.raises(FitError, match="strength is 0 or more and num_samples at least 1, got -1 and 200"):
        made(EWC, strength=-1)


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"must give features \[B, d\], it gives \[2, 4, 6, 6\] for 2 inputs"):
        FineTune(nn.Conv2d(3, 4, 3), input_size=SIZE)
    with pytest.raises(BackboneError, match="has no batch norm whose statistics could be kept"):
        ConFiT(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), input_size=SIZE)
    lone = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BackboneError, match=r"none of 1 batch norms of Sequential .*0: no convolution.*mean='stale'"):
        ConFiT(lone, input_size=SIZE)
    assert ConFiT(lone, input_size=SIZE, mean="stale").pairing.norms == ("0",)


def test_streams_that_do_not_fit_are_refused() -> None:
    learner, experience = made(FineTune), stream().experiences[0]
    with pytest.raises(FitError, match="must be told where experiences begin"):
        learner.observe(*next(experience.batches()))
    with pytest.raises(FitError, match="batches of at least 2 samples, got 1"):
        learner.begin(stream(batch_size=1).experiences[0])
    learner.begin(experience)
    x, y = next(experience.batches())
    with pytest.raises(FitError, match=r"torch\.uint8, which no network takes: prepare=transform\.normalize"):
        learner.observe(x.to(torch.uint8), y)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 0 of experience 0: lower lr=0\.1"):
        learner.observe(x * torch.nan, y)


def test_inputs_are_prepared_for_training_recording_and_answering() -> None:
    x, y = data()
    pixels = (10 * x + 100).round().to(torch.uint8)
    learner = made(ConFiT, prepare=lambda x: (x.float() - 100) / 10)
    plain = made(ConFiT)
    taught(learner, class_incremental((pixels, y), num_experiences=2, batch_size=4))
    taught(plain, class_incremental(((pixels.float() - 100) / 10, y), num_experiences=2, batch_size=4))
    assert_same(learner.state(), plain.state())
    assert torch.equal(learner.predict(pixels, [0, 1]), plain.predict((pixels.float() - 100) / 10, [0, 1]))
