"""Cached features: the numbers of the model itself, computed once, and never those of something else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import petiole as pt
from fitting import make_model, make_split, make_task, vit
from petiole.continual import features
from petiole.continual.closed_form import SLDA
from petiole.continual.features import CachedFeatures, Extractor, cache_features
from petiole.continual.heads import HeadLearner
from petiole.continual.learner import run
from petiole.continual.samples import Arrays
from petiole.continual.streams import class_incremental
from petiole.tasks import Transform
from petiole.tasks.cache import Pixels

SPLIT = make_split(13, 0)


def bare() -> pt.Adapted:
    return pt.adapt(vit())


def pixels(model: pt.Adapted) -> Pixels:
    return Pixels(SPLIT, Transform(model.input_config))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images have gone through a model, call by call."""
    seen: list[int] = []
    forward = pt.Adapted.forward_features

    def counting(self: pt.Adapted, images: Tensor) -> Tensor:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(pt.Adapted, "forward_features", counting)
    return seen


# the numbers


@pytest.mark.parametrize("make", [bare, make_model, lambda: pt.adapt(vit(), pt.Convpass(dim=2))])
def test_features_are_what_the_models_head_sees(make: Callable[[], pt.Adapted]) -> None:
    model = make()
    found = cache_features(model, SPLIT, dtype=torch.float32, batch_size=13)
    x = pixels(model).transform.normalize(pixels(model).batch(range(13))[0])
    with torch.no_grad():
        expected = model.eval().forward_features(x)
    assert torch.equal(found.values, expected)
    assert torch.equal(found.labels, torch.from_numpy(SPLIT.labels))


def test_half_precision_is_the_same_rounded_once() -> None:
    whole = cache_features(bare(), SPLIT, dtype=torch.float32)
    half = cache_features(bare(), SPLIT)
    assert half.values.dtype == torch.float16
    assert torch.equal(half.values, whole.values.half())
    assert torch.equal(half.batch([2, 0])[0], whole.values[[2, 0]].half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cache_and_extractor_give_the_same_numbers(dtype: torch.dtype) -> None:
    model = make_model()
    extract = Extractor(model, dtype=dtype)
    found = cache_features(model, pixels(model), dtype=dtype, batch_size=5)
    for start in (0, 5, 10):
        rows = range(start, min(start + 5, 13))
        assert torch.equal(found.batch(rows)[0], extract(pixels(model).batch(rows)[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_head_learnt_on_cached_features_is_the_one_learnt_on_images(dtype: torch.dtype) -> None:
    model, task = make_model(), make_task()
    # one batch each, in the order of the samples: a product of other rows may round otherwise
    settings: dict[str, Any] = {"num_experiences": 3, "batch_size": 1}
    transform = Transform(model.input_config)
    cached = class_incremental(
        *(cache_features(model, split, dtype=dtype, batch_size=1) for split in (task.train, task.test)), **settings
    )
    images = class_incremental(task, transform=transform, **settings)
    first, second = HeadLearner(SLDA()), HeadLearner(SLDA(), extract=Extractor(model, dtype=dtype))
    (*_, on_features), (*_, on_images) = run(cached, first), run(images, second, test_batch_size=1)
    assert on_features.matrix.values.tolist()[-1] == on_images.matrix.values.tolist()[-1]
    states = first.head.state(), second.head.state()
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("counts", "sums", "scatter"))


def test_model_stays_as_it_was() -> None:
    model = make_model().train()
    model.backbone.eval()
    cache_features(model, SPLIT)
    assert model.training
    assert not model.backbone.training


def test_dropout_of_a_model_in_training_takes_no_part() -> None:
    first, second = (cache_features(make_model().train(), SPLIT) for _ in range(2))
    assert torch.equal(first.values, second.values)


def test_normalised_images_are_taken_as_they_are() -> None:
    model = bare()
    images = pixels(model)
    x = images.batch(range(4))[0]
    assert torch.equal(Extractor(model)(x), Extractor(model)(images.transform.normalize(x)))


def test_features_have_no_graph() -> None:
    assert not Extractor(make_model())(pixels(bare()).batch([0])[0]).requires_grad


# views


def test_views_are_augmented_and_follow_from_the_seed() -> None:
    first, same, other = (cache_features(bare(), SPLIT, views=3, augment="fgvc", seed=s).values for s in (0, 0, 1))
    assert first.shape == (13, 3, 32)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:, 0], first[:, 1])


def views(num_samples: int = 40) -> CachedFeatures:
    """Features whose value says sample and view: sample + view / 10."""
    values = torch.arange(num_samples)[:, None, None] + torch.arange(4)[None, :, None] / 10
    return CachedFeatures(values, torch.arange(num_samples) % 2)


def test_undrawn_samples_show_their_first_view() -> None:
    assert views().batch([3, 5])[0][:, 0].tolist() == [3.0, 5.0]


def test_drawn_view_stays_for_a_draw_and_changes_with_the_seed() -> None:
    first, same, other = (views().drawn(seed).batch(range(40))[0] for seed in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(first.floor()[:, 0], torch.arange(40.0))
    assert len((first - first.floor()).mul(10).round().unique()) == 4


def test_stream_draws_a_view_for_each_epoch() -> None:
    experience = class_incremental(views(), num_experiences=1, batch_size=40, epochs=2)[0]
    epochs = [x[:, 0].sort().values for x, _ in experience.batches()]
    assert torch.equal(epochs[0].floor(), epochs[1].floor())
    assert not torch.equal(epochs[0], epochs[1])


def test_every_view_can_be_a_sample() -> None:
    flat = views(3).every_view()
    assert len(flat) == 12
    assert flat.labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4
    assert torch.equal(flat.values[:, 0], views(3).values.flatten())


# the file


def test_second_call_computes_only_a_few_to_compare(tmp_path: Path, count: list[int]) -> None:
    first = cache_features(make_model(), SPLIT, folder=tmp_path / "new" / "cache")
    assert sum(count) == 13
    again = cache_features(make_model(), SPLIT, folder=tmp_path / "new" / "cache", batch_size=3)
    assert sum(count) == 13 + features._NUM_COMPARED
    assert torch.equal(first.values, again.values)
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 1


def moved(model: pt.Adapted) -> pt.Adapted:
    with torch.no_grad():
        model.plugins[0].get_parameter(next(n for n, _ in model.plugins[0].named_parameters())).add_(1e-3)
    return model


def other_backbone() -> nn.Module:
    model = vit()
    with torch.no_grad():
        model.norm.weight += 1
    return model


def transformed(model: pt.Adapted) -> pt.Adapted:
    model.input_config = {**model.input_config, "mean": (0.4, 0.5, 0.5)}
    return model


def repainted() -> pt.tasks.Split:
    """The same images but for one pixel of one of them."""
    split = make_split(13, 0)
    split.images.pixels = split.images.pixels.copy()
    split.images.pixels[12, 0, 0, 0] ^= 1
    return split


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"model": moved(make_model())},
        lambda: {"model": make_model(pt.LoRA(rank=2, scale=0.5))},
        lambda: {"model": make_model(backbone=other_backbone())},
        lambda: {"model": transformed(make_model())},
        lambda: {"model": pt.adapt(vit())},
        lambda: {"source": repainted()},
        lambda: {"dtype": torch.float32},
        lambda: {"views": 2, "augment": "fgvc"},
    ],
)
def test_anything_else_is_computed_anew(change: Callable[[], dict[str, Any]], tmp_path: Path, count: list[int]) -> None:
    asked: dict[str, Any] = {"model": make_model(pt.LoRA(rank=2)), "source": SPLIT, "folder": tmp_path}
    cache_features(**asked)
    del count[:]
    cache_features(**{**asked, **change()})
    assert sum(count) in (13, 26)
    assert len(list(tmp_path.iterdir())) == 2


def test_head_takes_no_part(tmp_path: Path, count: list[int]) -> None:
    model = make_model()
    cache_features(model, SPLIT, folder=tmp_path)
    with torch.no_grad():
        model.head.weight += 1
    cache_features(model, SPLIT, folder=tmp_path)
    assert sum(count) == 13 + features._NUM_COMPARED


def test_setting_of_the_backbone_that_is_no_weight_is_noticed(tmp_path: Path, count: list[int]) -> None:
    cache_features(bare(), SPLIT, folder=tmp_path)
    backbone = vit()
    backbone.global_pool = "avg"
    found = cache_features(pt.adapt(backbone, prove=False), SPLIT, folder=tmp_path)
    assert sum(count) == 13 + features._NUM_COMPARED + 13
    assert torch.equal(found.values, cache_features(pt.adapt(backbone, prove=False), SPLIT).values)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"", lambda b: b"PK"]
)
def test_damaged_file_is_made_again(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    expected = cache_features(bare(), SPLIT, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert torch.equal(cache_features(bare(), SPLIT, folder=tmp_path).values, expected.values)
    assert path.read_bytes() == whole


def test_file_of_other_features_under_the_name_is_not_taken(tmp_path: Path) -> None:
    cache_features(bare(), SPLIT, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    cache_features(moved(make_model()), SPLIT, folder=tmp_path)
    (other,) = set(tmp_path.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    expected = cache_features(bare(), SPLIT)
    assert torch.equal(cache_features(bare(), SPLIT, folder=tmp_path).values, expected.values)


def test_progress_counts_views() -> None:
    seen: list[tuple[int, int]] = []
    cache_features(bare(), SPLIT, views=2, augment="fgvc", batch_size=10, progress=lambda *at: seen.append(at))
    assert seen == [(10, 26), (20, 26), (23, 26), (26, 26)]


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 2}, "views differ by their augmentation: 2 of them with augment='none' cannot be"),
        ({"views": 0}, "views differ by their augmentation: 0 of them with augment='none' cannot be"),
        ({"views": 0, "augment": "fgvc"}, "0 of them with augment='fgvc' cannot be"),
        ({"views": 2, "augment": "mixup"}, "2 of them with augment='mixup' cannot be"),
    ],
)
def test_views_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pt.FitError, match=message):
        cache_features(bare(), SPLIT, **settings)


def test_augmentation_needs_images() -> None:
    arrays = Arrays(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [0, 1])
    with pytest.raises(pt.FitError, match=r"augment='fgvc' needs images with labels \(a Split\), got Arrays"):
        cache_features(bare(), arrays, augment="fgvc")


def test_images_of_another_models_transform_are_refused() -> None:
    other = Pixels(SPLIT, Transform({"input_size": (3, 32, 32)}))
    with pytest.raises(pt.FitError, match=r"prepared for another model: use petiole\.Transform\(model\.input_config\)"):
        cache_features(bare(), other)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(pt.FitError, match=r"the model takes images \[3, 32, 32\], got \[3, 16, 16\]: prepare them by"):
        Extractor(bare())(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_feature_beyond_half_precision_is_refused() -> None:
    backbone = vit()
    with torch.no_grad():
        backbone.norm.weight *= 1e6
    with pytest.raises(pt.FitError, match=r"a feature is not finite in float16: use dtype=torch\.float32"):
        cache_features(pt.adapt(backbone), SPLIT)
    cache_features(pt.adapt(backbone), SPLIT, dtype=torch.float32)


def test_plain_backbone_is_refused() -> None:
    with pytest.raises(pt.FitError, match=r"features are those of what petiole\.adapt returned, got Vis"):
        cache_features(vit(), SPLIT)


def test_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(pt.PluginFileError, match=r"the folder .*cache cannot be made: File exists"):
        cache_features(bare(), SPLIT, folder=tmp_path / "cache")
