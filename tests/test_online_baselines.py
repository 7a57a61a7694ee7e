"""Rehearsals and baselines against their formulas, and the parts around them: augmentation and networks."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from petiole.continual.exemplars import ClassBalanced, Reservoir
from petiole.continual.learner import Learner, run
from petiole.continual.online import baselines
from petiole.continual.online.augment import CropColour, ShiftFlip
from petiole.continual.online.baselines import GDumb
from petiole.continual.online.learner import OnlineLearner
from petiole.continual.online.networks import small_resnet
from petiole.errors import FitError
from streaming import network, noise, samples, stream

METHODS: dict[str, Callable[..., OnlineLearner]] = {
    "fine-tune": lambda net, exemplars, **more: baselines.fine_tune(net, **more),
    "ER": baselines.er,
    "ER-ACE": baselines.er_ace,
    "MIR": baselines.mir,
    "A-GEM": baselines.a_gem,
    "DER++": lambda net, exemplars, **more: baselines.dark_experience(net, exemplars, num_classes=5, **more),
}
METRIC: dict[str, Callable[..., OnlineLearner]] = {"generative": baselines.generative, "SCR": baselines.scr}


def parameters(online: OnlineLearner) -> list[Tensor]:
    return [p.detach().clone() for p in online.trained.values()]


def warm(method: Callable[..., OnlineLearner], num: int = 60, **settings: Any) -> OnlineLearner:
    """A learner without batch norm, behind some steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    online = method(inner, Reservoir(30), **{"lr": 0.1, "replay": 8, **settings})
    x, y = samples(num)
    for start in range(0, num, 10):
        online.observe(x[start : start + 10], y[start : start + 10])
    return online


def losses(online: OnlineLearner, x: Tensor, y: Tensor, values: list[Tensor] | None = None) -> Tensor:
    """Cross-entropy of each sample, as the weights are or as they are given."""
    names = list(online.trained)
    given = dict(zip(names, parameters(online) if values is None else values, strict=True))
    inner = {name.removeprefix("network."): p for name, p in given.items() if name.startswith("network.")}
    head = [p for name, p in given.items() if name.startswith("objective.")]
    features = torch.func.functional_call(online.network, inner, (x,))
    logits = features @ torch.cat(head[::2]).T + torch.cat(head[1::2])
    return F.cross_entropy(
        logits, torch.tensor([online.objective.classes.index(c) for c in y.tolist()]), reduction="none"
    )


def gradients(online: OnlineLearner, loss: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    values = [p.requires_grad_() for p in parameters(online)]
    return list(torch.autograd.grad(loss(values), values))


def direction(online: OnlineLearner, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the mean loss, as one vector."""
    return torch.cat([g.flatten() for g in gradients(online, lambda values: losses(online, x, y, values).mean())])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_learns_what_comes_shuffled(method: Callable[..., OnlineLearner]) -> None:
    online = method(network(), Reservoir(40), lr=0.2, replay=10)
    x, y = samples(1000)
    for start in range(0, 1000, 10):
        online.observe(x[start : start + 10], y[start : start + 10])
    test_x, test_y = samples(100, seed=1)
    assert (online.predict(test_x) == test_y).float().mean() > 0.9


@pytest.mark.parametrize("method", METRIC.values(), ids=METRIC)
def test_metric_methods_learn_classes_that_come_one_after_the_other(method: Callable[..., OnlineLearner]) -> None:
    pytest.importorskip("pytorch_metric_learning")
    *_, last = run(stream(), method(network(), Reservoir(40), lr=0.1, replay=20, augment=noise, views=2))
    assert last.matrix is not None
    assert last.matrix.final_average() > 0.85


def test_fine_tuning_forgets_what_replay_keeps() -> None:
    finals = {}
    for name in ("fine-tune", "ER"):
        *_, last = run(stream(), METHODS[name](network(), Reservoir(40), lr=0.1, replay=10))
        assert last.matrix is not None
        finals[name] = last.matrix.rows[-1][0]
    assert finals["fine-tune"] < 0.1
    assert finals["ER"] > finals["fine-tune"] + 0.3


def test_mir_replays_what_a_step_on_the_batch_would_harm_most() -> None:
    online = warm(lambda *args, **more: baselines.mir(*args, candidates=20, **more))
    assert online.exemplars is not None
    twin = Reservoir(30)
    twin.restore(online.exemplars.state())
    candidates, labels = twin.sample(20)
    x, y = samples(10, seed=6)
    own = gradients(online, lambda values: losses(online, x, y, values).mean())
    ahead = [p - 0.1 * g for p, g in zip(parameters(online), own, strict=True)]
    harm = losses(online, candidates, labels, ahead) - losses(online, candidates, labels)
    worst = harm.argsort(descending=True)[:8]
    joint = torch.cat([x, candidates[worst]]), torch.cat([y, labels[worst]])
    step = gradients(online, lambda values: losses(online, *joint, values).mean())
    expected = [p - 0.1 * g for p, g in zip(parameters(online), step, strict=True)]
    online.observe(x, y)
    torch.testing.assert_close(parameters(online), expected)


def test_a_gem_takes_out_of_the_gradient_what_would_harm_exemplars() -> None:
    online = warm(baselines.a_gem)
    assert online.exemplars is not None
    num_projected = 0
    for seed in range(12):
        twin = Reservoir(30)
        twin.restore(online.exemplars.state())
        replayed = twin.sample(8)
        x, y = samples(10, seed=seed)
        y = (y + seed) % 4  # wrong labels, against which exemplars speak
        own, kept = direction(online, x, y), direction(online, replayed[0], replayed[1])
        if own @ kept < 0:
            own = own - (own @ kept) / (kept @ kept) * kept
            num_projected += 1
        before = torch.cat([p.flatten() for p in parameters(online)])
        online.observe(x, y)
        torch.testing.assert_close(torch.cat([p.flatten() for p in parameters(online)]), before - 0.1 * own)
    assert 0 < num_projected < 12


def test_dark_experience_holds_exemplars_to_what_was_said_of_them() -> None:
    online = warm(lambda *args, **more: baselines.dark_experience(*args, num_classes=6, alpha=0.3, beta=0.7, **more))
    assert online.exemplars is not None
    twin = Reservoir(30)
    twin.restore(online.exemplars.state())
    past, again = twin.sample(8), twin.sample(8)
    x, y = samples(10, seed=7)

    def loss(values: list[Tensor]) -> Tensor:
        inner = dict(zip(dict(online.network.named_parameters()), values, strict=False))
        head = values[len(inner) :]
        logits = torch.func.functional_call(online.network, inner, (past[0],)) @ torch.cat(head[::2]).T
        gaps = logits + torch.cat(head[1::2]) - past[2][:, :4]
        return (
            losses(online, x, y, values).mean()
            + 0.3 * gaps.square().mean()
            + 0.7 * losses(online, again[0], again[1], values).mean()
        )

    expected = [p - 0.1 * g for p, g in zip(parameters(online), gradients(online, loss), strict=True)]
    said = online.objective.logits(online.features(x)).detach()
    online.observe(x, y)
    torch.testing.assert_close(parameters(online), expected)
    kept, _, logits = online.exemplars.all()
    slots, items = (kept[:, None] == x).all(2).nonzero(as_tuple=True)
    assert len(slots)
    torch.testing.assert_close(logits[slots, :4], said[items])


def test_dark_experience_forgets_nothing_about_classes_that_came_later() -> None:
    online = baselines.dark_experience(network(), Reservoir(40), num_classes=3, replay=10)
    x, y = samples(20, num_classes=1)
    online.observe(x, y)
    assert online.exemplars is not None
    assert online.exemplars.all()[2].isnan().tolist() == [[False, True, True]] * 20
    online.observe(x, y + 1)
    assert online.exemplars.all()[2].isnan().tolist() == [[False, True, True]] * 20 + [[False, False, True]] * 20
    online.observe(x, y + 1)
    with pytest.raises(FitError, match="3 logits are kept, and there are 4 classes"):
        online.observe(x[:2], torch.tensor([2, 3]))


def gdumb(**settings: Any) -> GDumb:
    return GDumb(network(), ClassBalanced(40), **{"epochs": 60, "lr": 0.2, **settings})


def test_gdumb_learns_lazily_and_from_the_exemplars_alone() -> None:
    learner = gdumb()
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    assert learner.predict(samples(3)[0]).tolist() == [-1, -1, -1]
    *_, last = run(stream(), learner)
    assert last.matrix is not None
    assert last.matrix.final_average() > 0.9
    assert all(torch.equal(value, before[name]) for name, value in learner.network.state_dict().items())
    trained = learner._trained
    learner.predict(samples(3)[0])
    assert learner._trained is trained
    learner.observe(*samples(10))
    assert learner._trained is None


def test_gdumb_goes_on_from_its_state_bit_for_bit() -> None:
    one, other = (
        gdumb(augment=noise),
        GDumb(network(seed=5), ClassBalanced(40, seed=3), epochs=60, lr=0.2, augment=noise),
    )
    one.observe(*samples(60))
    other.restore(one.state())
    for learner in (one, other):
        learner.observe(*samples(60, seed=2))
    x = samples(50, seed=3)[0]
    assert torch.equal(one.predict(x), other.predict(x))
    assert one._trained is not None
    assert other._trained is not None
    assert torch.equal(one._trained.features(x), other._trained.features(x))


def test_no_method_needs_boundaries() -> None:
    learners: list[Learner] = [gdumb(), *(method(network(), Reservoir(3)) for method in METHODS.values())]
    assert not any(learner.needs_boundaries for learner in learners)


IMAGES = torch.randint(256, (16, 3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_shifts_and_mirror_images_are_those_of_the_loop() -> None:
    found = ShiftFlip(shift=2)(IMAGES, torch.Generator().manual_seed(1))
    seen = set()
    for image, moved in zip(IMAGES, found, strict=True):
        options = {}
        for down in range(-2, 3):
            for right in range(-2, 3):
                option = torch.zeros_like(image)
                for row in range(9):
                    for column in range(7):
                        if 0 <= row - down < 9 and 0 <= column - right < 7:
                            option[:, row, column] = image[:, row - down, column - right]
                options[down, right, False], options[down, right, True] = option, option.flip(-1)
        matches = [key for key, option in options.items() if torch.equal(option, moved)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 8
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_crops_without_change_are_the_images_or_their_mirror_images() -> None:
    augment = CropColour(scale=1.0, colour=0.0, grey=0.0)
    found = augment(IMAGES, torch.Generator().manual_seed(0))
    for image, same in zip(IMAGES, found, strict=True):
        gap = min((option.int() - same.int()).abs().max() for option in (image, image.flip(-1)))
        assert gap <= 1  # rounding


def test_a_crop_lies_within_the_image() -> None:
    # a ramp from left to right: its crop is a ramp with a smaller slope
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32)
    found = CropColour(scale=0.25, colour=0.0, grey=0.0)(ramp, torch.Generator().manual_seed(0))
    slopes = (found[:, 0, 16, 20] - found[:, 0, 16, 12]).abs() / (ramp[0, 0, 0, 20] - ramp[0, 0, 0, 12])
    assert found.min() >= 0
    assert found.max() <= 1
    # half the side at least, and up to the whole
    assert (slopes > 0.499).all()
    assert slopes.min() < 0.55
    assert slopes.max() > 0.9
    torch.testing.assert_close(found[:, 0], found[:, 1])


def test_grey_images_have_no_colour_and_others_do() -> None:
    found = CropColour(scale=1.0, colour=0.0, grey=0.5)(IMAGES / 255, torch.Generator().manual_seed(0))
    is_grey = (found - found.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-6
    assert 3 <= is_grey.sum() <= 13


@pytest.mark.parametrize("augment", [ShiftFlip(), CropColour()])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_augmentation_is_seeded_and_keeps_shape_and_dtype(augment: Any, dtype: torch.dtype) -> None:
    images = IMAGES if dtype == torch.uint8 else (IMAGES / 255).to(dtype)
    before, state = images.clone(), torch.get_rng_state()
    one, same, other = (augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert (one.shape, one.dtype) == (images.shape, dtype)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_small_resnet_is_the_reduced_one() -> None:
    state = torch.get_rng_state()
    net, same, other = small_resnet(), small_resnet(), small_resnet(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    # 3x3 convolutions, 1x1 shortcuts and batch norm of 20, 40, 80 and 160 channels
    widths = [20, 20, 40, 80, 160]
    expected = 27 * 20 + 2 * 20
    for before, width in pairwise(widths):
        expected += 9 * width * (before + 3 * width) + 8 * width
        expected += (before * width + 2 * width) if before != width else 0
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 160)
    assert small_resnet(4, stride=2, in_channels=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 32)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters(), strict=True))
    assert not torch.equal(net.conv1.weight, other.conv1.weight)


def test_the_stem_halves_the_grid_only_where_asked() -> None:
    for stride, size in ((1, 4), (2, 2)):
        maps: list[Tensor] = []
        net = small_resnet(4, stride=stride)
        net.layer4.register_forward_hook(lambda module, inputs, output, maps=maps: maps.append(output))
        net(torch.zeros(2, 3, 32, 32))
        assert maps[0].shape[-2:] == (size, size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gdumb(epochs=0), "at least 1 and lr above 0, got 0, 16 and 0.2"),
        (lambda: baselines.mir(network(), Reservoir(3), candidates=0), "at least 1 candidate, got 0"),
        (lambda: baselines.dark_experience(network(), Reservoir(3), num_classes=0), "at least 1 class"),
        (lambda: ShiftFlip(shift=-1), "got shift=-1 and flip=0.5"),
        (lambda: CropColour(scale=0), "scale above 0, got 0"),
        (lambda: small_resnet(5), "even number of channels, got 5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(FitError, match=message):
        make()
