"""Speed as a clock would have it, the budget by bisection, the scale on validation, tokens and operations."""

import math
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import petiole as pt
from fitting import make_model, make_split
from models import MODELS
from petiole.errors import FitError
from petiole.nn.schedule import macs, tokens_after
from petiole.tasks.cache import Pixels
from petiole.tasks.task import Split
from petiole.tasks.transform import Transform
from petiole.train import budgeting
from petiole.train.budgeting import SCALES, budget_for, choose_scale, random_images, throughput, throughputs
from petiole.train.evaluate import Scores, evaluate
from petiole.train.tradeoffs import Candidate, TokenCounts, Tradeoff, compare, write_plot

IMAGES = torch.zeros(8, 3, 2, 2)


class Clock:
    """A clock that stands still unless somebody moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budgeting, "perf_counter", clock)
    return clock


class Slow(nn.Module):
    """Takes some seconds a pass, times what the machine is slowed down by."""

    def __init__(self, clock: Clock, seconds: float, slowdown: float = 0.0) -> None:
        super().__init__()
        self.clock, self.seconds, self.slowdown = clock, seconds, slowdown
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.clock.now += self.seconds * (1 + self.slowdown * self.clock.now)
        self.modes.add((self.training, torch.is_grad_enabled()))
        return images


# speed


def test_throughput_is_images_over_seconds(clock: Clock) -> None:
    assert throughput(Slow(clock, 0.5), images=IMAGES) == pytest.approx(8 / 0.5)
    assert throughputs([Slow(clock, 0.01), Slow(clock, 4.0)], images=IMAGES) == pytest.approx([800.0, 2.0])


def test_speed_is_measured_for_as_long_as_asked(clock: Clock) -> None:
    throughput(Slow(clock, 0.01), images=IMAGES, seconds=3.0)
    assert clock.now == pytest.approx(3.0 + 2 * 0.01)


def test_machine_that_grows_slower_hits_all_models_alike(clock: Clock) -> None:
    first, second = throughputs([Slow(clock, 0.1, 0.1), Slow(clock, 0.1, 0.1)], images=IMAGES)
    assert first == pytest.approx(second, rel=0.1)
    apart = [throughput(Slow(clock, 0.1, 0.1), images=IMAGES) for _ in range(2)]
    assert apart[1] < 0.9 * apart[0]


def test_one_busy_moment_does_not_count(clock: Clock) -> None:
    model = Slow(clock, 0.5)
    passes = iter(range(100))
    model.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 60 * (next(passes) == 4)))
    assert throughput(model, images=IMAGES) == pytest.approx(8 / 0.5)


def test_speed_is_that_of_eval_mode_without_gradients(clock: Clock) -> None:
    model = Slow(clock, 0.5).train()
    throughput(model, images=IMAGES)
    assert model.modes == {(False, False)}
    assert model.training


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"seconds": 0.0}, {"seconds": -1.0}])
def test_speed_of_nothing_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(FitError, match="on at least 1 image for more than 0 s"):
        throughputs([make_model()], **settings)


def test_random_images_are_of_the_models_own_size() -> None:
    backbone = MODELS["vit_non_square"]()
    fast = pt.compress(backbone, 1)
    for model in (backbone, fast, pt.Elastic(fast)):
        assert random_images(model, 3).shape == (3, 3, 24, 40)
    assert throughput(fast, batch_size=1, seconds=1e-3) > 0


# budget


def faster(by: float) -> SimpleNamespace:
    return SimpleNamespace(images_per_second=100.0 * by)


def speeds(models: list[SimpleNamespace]) -> list[float]:
    return [model.images_per_second for model in models]


@pytest.mark.parametrize("target", [1.01, 1.1, 1.5, 2.0, 2.89])
@pytest.mark.parametrize("largest", [1, 2, 9, 16, 98])
def test_budget_is_the_smallest_that_reaches_the_target(target: float, largest: int) -> None:
    def gain(r: int) -> float:
        return 1 + 1.9 * math.sqrt(r / largest)

    seen: list[tuple[int, float]] = []
    found = budget_for(
        target,
        faster(1),
        lambda r: faster(gain(r)),
        largest,
        measure=speeds,
        progress=lambda r, by: seen.append((r, by)),
    )
    assert found == min(r for r in range(largest + 1) if gain(r) >= target)
    assert all(by == pytest.approx(gain(r)) for r, by in seen)
    assert len(seen) <= 1 + math.ceil(math.log2(largest))


def test_target_out_of_reach_is_refused_with_the_largest_speed_up() -> None:
    with pytest.raises(FitError, match=r"speed-up of 3 cannot be reached: a budget of 10, the largest, gives 2\.00"):
        budget_for(3, faster(1), lambda r: faster(1 + r / 10), 10, measure=speeds)


@pytest.mark.parametrize("target", [1.0, 0.5, float("nan")])
def test_target_that_is_no_speed_up_is_refused(target: float) -> None:
    with pytest.raises(FitError, match="the speed-up to reach is above 1"):
        budget_for(target, faster(1), faster, 10, measure=speeds)


def test_model_without_tokens_to_remove_is_refused() -> None:
    with pytest.raises(FitError, match="no tokens that could go"):
        budget_for(1.5, faster(1), faster, 0, measure=speeds)


# scale


def compensator(size: float) -> pt.ToCom:
    """A compensator whose changes are seen."""
    plugin = pt.ToCom(groups=2, target=1)
    pt.adapt(make_model().backbone, plugin, prove=False)
    with torch.no_grad():
        for p in plugin.up.parameters():
            p.normal_(0, size, generator=torch.Generator().manual_seed(0))
    return plugin


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return Pixels(make_split(24, 1), Transform(make_model().input_config))


def relabelled(pixels: Pixels, model: pt.Adapted) -> Pixels:
    """The same images with what a model answers as their labels: none is right more often."""
    images = pixels.transform.normalize(pixels.batch(range(len(pixels)))[0])
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    return Pixels(Split(pixels.split.images, labels.numpy()), pixels.transform)


@pytest.mark.parametrize("best", [*SCALES, 0.0])
def test_scale_with_the_best_validation_accuracy_is_chosen(best: float, pixels: Pixels) -> None:
    model, strong = make_model(), compensator(40.0)

    def at(scale: float) -> pt.Adapted:
        return pt.compress(model, 1, compensator=strong, scale=scale)

    val = relabelled(pixels, at(best))
    choice = choose_scale(at, val)
    assert list(choice.accuracies) == [*SCALES, 0.0]
    assert choice.accuracies == {scale: evaluate(at(scale), val).accuracy for scale in (*SCALES, 0.0)}
    assert choice.accuracies[choice.scale] == 1
    assert min(choice.accuracies.values()) < 1


@pytest.mark.parametrize(
    ("accuracies", "own", "expected"),
    [
        ((0.5, 0.6, 0.7, 0.8, 0.9, 0.4), 0.1, 0.15),
        ((0.5, 0.6, 0.7, 0.8, 0.7, 0.9), 0.1, 0.0),
        ((0.8, 0.8, 0.8, 0.8, 0.8, 0.8), 0.1, 0.1),
        ((0.8, 0.8, 0.8, 0.8, 0.8, 0.8), 0.05, 0.05),
        ((0.5, 0.8, 0.5, 0.8, 0.5, 0.8), 0.1, 0.08),
        ((0.5, 0.5, 0.5, 0.5, 0.8, 0.8), 0.0, 0.15),
    ],
)
def test_ties_go_to_the_scale_nearest_the_compensators_own(
    accuracies: tuple[float, ...], own: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = dict(zip((*SCALES, 0.0), accuracies, strict=True))
    monkeypatch.setattr(budgeting, "evaluate", lambda scale, pixels, batch_size: Scores(table[scale], 0.0, 6))
    assert choose_scale(lambda scale: scale, None, own=own).scale == expected


# tokens and operations


@pytest.mark.parametrize(
    "name", ["vit", "vit_non_square", "deit_distilled", "dinov2_registers", "hf_vit", "torchvision"]
)
@pytest.mark.parametrize("budget", [0, 1, 3, (2, -1), 0.5])
def test_tokens_and_operations_are_those_of_the_schedule(name: str, budget: float) -> None:
    model = pt.compress(MODELS[name](), budget)
    with torch.no_grad():
        whole, flow = model.view.run(model.backbone, model.view.probe(model.backbone, 1), pt.adapt(MODELS[name]()).taps)
    counts = TokenCounts.of(model)
    num_tokens = whole.shape[1]
    assert counts.left == (num_tokens, *tokens_after(budget, 2, num_tokens, flow.num_prefix))
    assert (counts.num_prefix, counts.patch_size) == (flow.num_prefix, 8)
    hidden = next(site.d_out for site in model.view.sites(model.backbone) if site.role == "fc1")
    expected = macs(counts.left, 32, mlp_ratio=hidden / 32, patch_size=8, num_protected=flow.num_prefix)
    assert counts.macs(model) == expected


def test_operations_are_those_that_pytorch_counts() -> None:
    model = pt.compress(MODELS["vit_unfused"](), 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(model.view.probe(model.backbone, 1))
    head = 32 * 5
    assert TokenCounts.of(model).macs(model) == counter.get_total_flops() // 2 - head


def test_pruned_tokens_are_counted() -> None:
    model = pt.compress(MODELS["vit"](), 5, method="evit")
    assert TokenCounts.of(model).left == (17, *tokens_after(5, 2, 17, is_pruning=True))


def test_prompts_are_counted() -> None:
    model = pt.adapt(MODELS["vit"](), pt.VPT(num_prompts=3), pt.ToMe(budget=2))
    assert TokenCounts.of(model).left == (20, 18, 16)
    assert TokenCounts.of(model).num_prefix == 4


@pytest.mark.parametrize("name", ["dinov2_swiglu", "swin"])
def test_operations_are_unknown_where_the_backbone_is_no_plain_vit(name: str) -> None:
    model = pt.adapt(MODELS[name]())
    assert TokenCounts.of(model).macs(model) is None


def test_counting_leaves_the_mode_as_it_is() -> None:
    model = pt.compress(MODELS["vit"](), 2).train()
    TokenCounts.of(model)
    assert model.training
    assert model.backbone.blocks[0].attn.training


# rows and plot


def test_row_says_what_a_model_costs_and_gives(pixels: Pixels) -> None:
    model = make_model()
    fast = pt.compress(model, 2)
    done: list[int] = []
    candidates = [Candidate(0, model), Candidate(2, fast, 0.1, nn.Identity())]
    rows = compare(candidates, [50.0, 75.0], pixels, progress=done.append)
    assert [(row.budget, row.scale, row.num_tokens) for row in rows] == [(0, None, 5), (2, 0.1, 2)]
    assert [(row.images_per_second, row.speed_up) for row in rows] == [(50.0, 1.0), (75.0, 1.5)]
    assert [row.accuracy for row in rows] == [evaluate(m, pixels).accuracy for m in (model, fast)]
    assert rows[1].macs < rows[0].macs
    assert done == [1, 2]
    assert [row.accuracy for row in compare(candidates, [50.0, 75.0])] == [None, None]


def rows_of_two_lines() -> list[Tradeoff]:
    without = [Tradeoff(r, None, 9 - r, 1, 100.0 + r, 1 + r / 100, 0.9 - r / 20) for r in (0, 8, 4)]
    return [*without, *(Tradeoff(r, 0.1, 9 - r, 1, 100.0 + r, 1 + r / 100, 0.9 - r / 40) for r in (8, 4))]


def texts(path: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(path).iter() if element.tag.endswith("}text")]


def test_plot_has_a_line_without_and_one_with_the_compensator(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = rows_of_two_lines()
    for name in ("a.svg", "b.svg"):
        write_plot(tmp_path / name, rows, "test")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    found = texts(tmp_path / "a.svg")
    assert {"throughput [images/s]", "test accuracy", "without ToCom", "with ToCom"} <= set(found)
    assert [text for text in found if text in ("0", "4", "8")] == ["0", "8", "4"]
    write_plot(tmp_path / "one.svg", rows[:3], "val")
    assert "without ToCom" not in texts(tmp_path / "one.svg")


def test_plot_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FitError, match=r"pip install 'petiole\[plot\]'"):
        write_plot(tmp_path / "a.svg", rows_of_two_lines(), "test")
    assert list(tmp_path.iterdir()) == []
