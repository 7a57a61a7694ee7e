"""The tasks that need no file: what their pixels show, measured from the pixels alone."""

import hashlib
import math
import sys

import numpy as np
import pytest
from scipy import ndimage

from petiole.errors import TaskError
from petiole.tasks import Task, open_task

RENDERED = ("position", "orientation", "counting")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: open_task(name) for name in RENDERED}


def pixels(task: Task) -> np.ndarray:
    return np.concatenate([split.images.pixels for split in (task.train, task.val, task.test)])


def masks(split) -> np.ndarray:
    """Which pixels are mostly shape: those nearer to another colour than to the corner's, `[n, H, W]`."""
    images = split.images.pixels.astype(float)
    return np.linalg.norm(images - images[:, :1, :1], axis=-1) > 60  # half of the least contrast


def area(image: np.ndarray) -> float:
    """Number of pixels covered by shapes, those at their edges in part."""
    image = image.astype(float)
    distance = np.linalg.norm(image - image[:1, :1], axis=-1)
    shapes, count = ndimage.label(distance > 0, structure=np.ones((3, 3)))
    full = np.append(1.0, ndimage.maximum(distance, shapes, range(1, count + 1)))
    return float((distance / full[shapes]).sum())


@pytest.mark.parametrize("name", RENDERED)
def test_splits_have_their_sizes_and_every_class_equally_often(name, tasks):
    task = tasks[name]
    assert [len(task.train), len(task.val), len(task.test)] == [800, 200, 1000]
    for split in (task.train, task.val, task.test):
        assert np.ptp(np.bincount(split.labels, minlength=len(task.classes))) <= 1
    assert task.train.images[0].size == (64, 64)
    assert task.train.images[0].mode == "RGB"


@pytest.mark.parametrize("name", RENDERED)
def test_the_same_seed_draws_the_same_pixels_and_another_seed_others(name, tasks):
    digest = hashlib.sha256(pixels(tasks[name]).tobytes()).hexdigest()
    assert hashlib.sha256(pixels(open_task(name, seed=0)).tobytes()).hexdigest() == digest
    assert hashlib.sha256(pixels(open_task(name, seed=1)).tobytes()).hexdigest() != digest


@pytest.mark.parametrize("name", RENDERED)
def test_no_image_is_drawn_twice(name, tasks):
    assert len(np.unique(pixels(tasks[name]).reshape(2000, -1), axis=0)) == 2000


def test_the_shape_stands_where_its_position_label_says(tasks):
    split = tasks["position"].test
    x = np.array([ndimage.center_of_mass(mask)[1] for mask in masks(split)]) + 0.5
    middle = 16 + 2 * (split.labels + 0.5)
    assert np.abs(x - middle).max() < 1.0 + 0.5  # half a bin, and the error of thresholded pixels


def test_the_shape_points_where_its_orientation_label_says(tasks):
    split = tasks["orientation"].test
    errors = []
    for mask, label in zip(masks(split), split.labels, strict=True):
        y, x = np.nonzero(mask)
        dy, dx = y - y.mean(), x - x.mean()
        distance = np.hypot(dy, dx)
        tip = distance > distance.max() - 1.5  # its farthest pixels, on one side only: no half turn looks the same
        angle = math.atan2(-dy[tip].mean(), dx[tip].mean())
        error = (angle - math.tau * (label + 0.5) / 16 + math.pi) % math.tau - math.pi
        errors.append(math.degrees(error))
    assert np.abs(errors).max() < 11.25 + 15  # half a bin, and what a pixel is at the small shapes' radius of 10
    assert abs(np.mean(errors)) < 1  # uniform in +-11.25: 0.2 is one standard error


def test_there_are_as_many_shapes_as_the_counting_label_says(tasks):
    task = tasks["counting"]
    counts = [ndimage.label(mask, structure=np.ones((3, 3)))[1] for mask in masks(task.test)]
    assert counts == [int(task.classes[label]) for label in task.test.labels]


def test_the_area_of_the_shapes_does_not_tell_their_number(tasks):
    split = tasks["counting"].test
    areas = [area(image) for image in split.images.pixels]
    assert abs(np.corrcoef(areas, split.labels)[0, 1]) < 0.1  # 3 standard errors of 1,000 independent pairs


def test_digits_are_scikit_learns_scans_in_three_stratified_splits():
    from sklearn.datasets import load_digits

    task, scans = open_task("digits"), load_digits()
    splits = (task.train, task.val, task.test)
    seen = sorted((int(c), np.asarray(s.images[i]).tobytes()) for s in splits for i, c in enumerate(s.labels))
    expected = np.round(scans.images / 16 * 255).astype(np.uint8)
    assert [len(split) for split in splits] == [800, 200, 797]
    assert seen == sorted((int(c), image.tobytes()) for c, image in zip(scans.target, expected, strict=True))
    for split in splits:
        share = np.bincount(split.labels) / len(split) - np.bincount(scans.target) / 1797
        assert np.abs(share * len(split)).max() < 1.5  # images more or fewer than in proportion


def test_the_seed_decides_who_of_the_digits_is_cut_off():
    assert np.array_equal(open_task("digits").train.labels, open_task("digits", seed=0).train.labels)
    first, other = (open_task("digits", seed=seed).train.images for seed in (0, 1))
    assert any(first.describe(i) != other.describe(i) for i in range(800))


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TaskError, match=r"needs scikit-learn: pip install 'petiole\[demo\]'"):
        open_task("digits")
