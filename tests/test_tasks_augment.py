"""Augmented training images, against timm's and torchvision's own parts put together by hand."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter, RandomHorizontalFlip

from petiole.errors import TaskError
from petiole.tasks import Split, Transform
from petiole.tasks.augment import Augmented
from petiole.tasks.images import Arrays

TRANSFORM = Transform({"input_size": (3, 24, 32), "mean": (0.5, 0.4, 0.3)})


class Counted(Arrays):
    """Counts how often each image is decoded."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.asked: list[int] = []

    def __getitem__(self, index, /):
        self.asked.append(index)
        return super().__getitem__(index)


def split(count: int = 5) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 40, 50, 3), dtype=np.uint8)
    return Split(Counted(pixels, "noise"), np.arange(count) % 3)


def test_image_looks_the_same_at_a_step_in_whatever_batch():
    images = Augmented(split(), TRANSFORM, seed=0)
    whole, labels = images.batch([0, 1, 2, 3, 4], 7)
    again, _ = images.batch([3, 1], 7)
    assert torch.equal(again, whole[[3, 1]])
    assert (whole.shape, whole.dtype, labels.tolist()) == ((5, 3, 24, 32), torch.uint8, [0, 1, 2, 0, 1])


@pytest.mark.parametrize(("seed", "step", "index"), [(1, 7, 3), (0, 8, 3), (0, 7, 4)])
def test_image_looks_different_with_another_seed_step_or_number(seed, step, index):
    pixels = np.tile(np.random.default_rng(0).integers(0, 256, (1, 40, 50, 3), dtype=np.uint8), (5, 1, 1, 1))
    same = Split(Arrays(pixels, "noise"), np.zeros(5, int))
    first, _ = Augmented(same, TRANSFORM, seed=0).batch([3], 7)
    other, _ = Augmented(same, TRANSFORM, seed=seed).batch([index], step)
    assert not torch.equal(first, other)


def test_augmentation_is_crop_flip_randaugment_and_colour_jitter():
    images = Augmented(split(), TRANSFORM, seed=3)
    fill = {"translate_const": int(24 * 0.45), "img_mean": (128, 102, 76), "interpolation": Image.Resampling.BICUBIC}
    parts = [
        RandomResizedCropAndInterpolation((24, 32), interpolation="bicubic"),
        RandomHorizontalFlip(),
        rand_augment_transform("rand-m9-mstd0.5-inc1", fill),
        ColorJitter(0.4, 0.4, 0.4),
    ]
    for index in range(5):
        seeds = [int(s) for s in np.random.SeedSequence((3, 11, index, 1)).generate_state(3)]
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.manual_seed(seeds[2])
        expected = images.split.images[index]
        for part in parts:
            expected = part(expected)
        found = images.batch([index], 11)[0][0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, np.asarray(expected))


def test_generators_of_the_program_are_left_as_they_were():
    images = Augmented(split(), TRANSFORM, seed=0)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    images.batch([0, 1], 0)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_images_are_decoded_once_where_they_fit_and_each_time_where_not():
    kept, seen = Augmented(split(), TRANSFORM, seed=0), []
    num_bytes = 3 * 40 * 50
    short = Augmented(split(), TRANSFORM, seed=0, limit_mib=2 * num_bytes / 2**20, progress=lambda *at: seen.append(at))
    assert seen == [(1, 5), (2, 5)]
    short.split.images.asked.clear()
    for step in range(2):
        assert torch.equal(kept.batch(range(5), step)[0], short.batch(range(5), step)[0])
    assert sorted(kept.split.images.asked) == [0, 1, 2, 3, 4]
    assert sorted(short.split.images.asked) == [2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("limit_mib", [2048, 0])
def test_damaged_image_is_named(limit_mib):
    class Broken(Arrays):
        def __getitem__(self, index, /):
            raise OSError("bad bytes")

    broken = Split(Broken(np.zeros((2, 8, 8), np.uint8), "scans"), np.array([0, 1]))
    with pytest.raises(TaskError, match="image 0 of scans cannot be read as an image: bad bytes"):
        Augmented(broken, TRANSFORM, seed=0, limit_mib=limit_mib).batch([0], 0)
