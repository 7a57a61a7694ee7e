"""Streams: every sample once, the classes where they belong, batches that go on exactly, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import petiole as pt
from fitting import make_split, make_task
from petiole.continual.samples import Arrays, Mapped, Part, Samples, as_labels, as_samples
from petiole.continual.streams import Experience, Stream, class_incremental, domain_incremental, smooth
from petiole.tasks import Transform
from petiole.tasks.cache import Pixels

TRANSFORM = {"input_size": (3, 32, 32)}


def numbered(num_samples: int = 60, num_classes: int = 6) -> tuple[Tensor, Tensor]:
    """Samples whose input is their own index, with classes in turn."""
    rows = torch.arange(num_samples)
    return rows, rows % num_classes


def seen(experience: Experience) -> list[int]:
    return torch.cat([x for x, _ in experience.batches()]).tolist()


class Items:
    """A map-style dataset that counts what is read of it."""

    def __init__(self, labels: Sequence[int]) -> None:
        self.values, self.reads = list(labels), 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.tensor([float(index)]), self.values[index]


class Targeted(Items):
    """One that says its labels and class names, as torchvision's do."""

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__(labels)
        self.targets, self.classes = list(labels), ["ant", "bee", "cat", "dog"]


# class-incremental


@pytest.mark.parametrize(
    "settings", [{"num_experiences": 4}, {"num_experiences": 6}, {"num_experiences": 3, "first": 4}]
)
def test_every_sample_comes_exactly_once(settings: dict[str, int]) -> None:
    stream = class_incremental(numbered(), **settings, order=3, batch_size=7)
    assert len(stream) == settings["num_experiences"]
    assert sorted(i for experience in stream for i in seen(experience)) == list(range(60))


def test_every_class_comes_in_one_experience() -> None:
    stream = class_incremental(numbered(), num_experiences=4)
    assert [experience.classes for experience in stream] == [(0, 1), (2, 3), (4,), (5,)]
    for experience in stream:
        assert {i % 6 for i in seen(experience)} == set(experience.classes)


def test_first_experience_may_be_larger() -> None:
    stream = class_incremental(numbered(num_classes=10), num_experiences=6, first=5)
    assert [len(experience.classes) for experience in stream] == [5, 1, 1, 1, 1, 1]


def test_first_experience_may_be_all_there_is() -> None:
    (only,) = class_incremental(numbered(), num_experiences=1, first=6)
    assert only.classes == (0, 1, 2, 3, 4, 5)


def test_order_may_be_a_list_of_labels() -> None:
    stream = class_incremental(numbered(), num_experiences=6, order=torch.tensor([5, 3, 1, 0, 2, 4]))
    assert [experience.classes for experience in stream] == [(5,), (3,), (1,), (0,), (2,), (4,)]


def test_order_by_seed_is_a_permutation_that_depends_on_it() -> None:
    def order(seed: int) -> list[int]:
        return [e.classes[0] for e in class_incremental(numbered(num_classes=10), num_experiences=10, order=seed)]

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(10)) != order(1)


def test_order_of_classes_leaves_labels_as_they_are() -> None:
    stream = class_incremental(numbered(), num_experiences=3, order=[5, 4, 3, 2, 1, 0])
    x, y = next(stream[0].batches())
    assert torch.equal(x % 6, y)
    assert stream[0].classes == (4, 5)


def test_returning_class_shares_its_samples() -> None:
    stream = class_incremental(numbered(), groups=[[0, 1], [2, 0], [0]])
    of_zero = [{i for i in seen(experience) if i % 6 == 0} for experience in stream]
    assert [len(share) for share in of_zero] == [4, 3, 3]
    assert set.union(*of_zero) == set(range(0, 60, 6))


def test_class_in_no_group_is_left_out_of_training_and_test() -> None:
    stream = class_incremental(numbered(), numbered(), groups=[[0], [4]])
    assert {i % 6 for experience in stream for i in seen(experience)} == {0, 4}
    assert stream.test is not None
    assert set(stream.test.labels.tolist()) == {0, 4}


def test_experience_is_tested_on_its_own_classes() -> None:
    stream = class_incremental(numbered(), numbered(12), num_experiences=3)
    tests = [experience.test for experience in stream]
    assert [set(test.labels.tolist()) for test in tests] == [{0, 1}, {2, 3}, {4, 5}]
    assert sorted(i for test in tests for x, _ in test.batches(5) for i in x.tolist()) == list(range(12))


def test_stream_holds_indices_not_inputs() -> None:
    inputs, labels = numbered()
    stream = class_incremental((inputs, labels), num_experiences=3)
    for experience in stream:
        assert experience.train.samples.inputs is inputs
        assert set(vars(experience.train)) == {"samples", "rows", "labels"}


# batches


def test_batches_go_on_exactly_from_any_step() -> None:
    experience = class_incremental(numbered(), num_experiences=2, batch_size=7, epochs=3, seed=4)[1]
    whole = [x.tolist() for x, _ in experience.batches()]
    assert len(whole) == experience.num_steps == 15
    for start in range(16):
        assert [x.tolist() for x, _ in experience.batches(start)] == whole[start:]


def test_every_epoch_has_an_order_of_its_own() -> None:
    experience = class_incremental(numbered(), num_experiences=1, batch_size=60, epochs=3)[0]
    epochs = [x.tolist() for x, _ in experience.batches()]
    assert [sorted(epoch) for epoch in epochs] == [list(range(60))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seed_decides_the_order() -> None:
    first, same, other = (seen(class_incremental(numbered(), num_experiences=1, seed=s)[0]) for s in (0, 0, 1))
    assert first == same != other


def test_last_batch_of_an_epoch_may_be_smaller() -> None:
    experience = class_incremental(numbered(), num_experiences=1, batch_size=32, epochs=2)[0]
    assert [len(y) for _, y in experience.batches()] == [32, 28, 32, 28]


class Views:
    """Samples with two looks each: their index, or its negative."""

    def __init__(self, num_samples: int) -> None:
        self.labels, self.sign = torch.arange(num_samples) % 2, torch.ones(num_samples)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        return rows * self.sign[rows], self.labels[rows]

    def drawn(self, seed: Sequence[int]) -> "Views":
        other = Views(len(self))
        other.sign = torch.from_numpy(np.random.default_rng(seed).choice([-1.0, 1.0], len(self)))
        return other


def test_samples_that_vary_look_different_in_each_epoch_and_go_on_exactly() -> None:
    experience = class_incremental(Views(20), num_experiences=2, batch_size=4, epochs=2)[1]
    whole = [x.tolist() for x, _ in experience.batches()]
    looks = [{value for batch in epoch for value in batch} for epoch in (whole[:3], whole[3:])]
    assert looks[0] != looks[1]
    assert {abs(value) for value in looks[0]} == {abs(value) for value in looks[1]} == set(range(1, 20, 2))
    for start in range(6):
        assert [x.tolist() for x, _ in experience.batches(start)] == whole[start:]


# sources


def test_sources_of_every_kind_give_the_same_stream(tmp_path: Path) -> None:
    labels = [0, 1, 2, 3] * 3
    inputs = np.arange(12, dtype=np.float32)[:, None]
    np.save(tmp_path / "inputs.npy", inputs)
    sources: list[Any] = [
        (torch.from_numpy(inputs), torch.tensor(labels)),
        (inputs, np.array(labels, np.uint8)),
        (np.load(tmp_path / "inputs.npy", mmap_mode="r"), labels),
        (inputs.tolist(), tuple(labels)),
        Items(labels),
        Targeted(labels),
        Arrays(inputs, labels),
    ]
    streams = [class_incremental(source, num_experiences=2, batch_size=5, epochs=2) for source in sources]
    expected = [(x.tolist(), y.tolist()) for e in streams[0] for x, y in e.batches()]
    for stream in streams[1:]:
        assert [(x.tolist(), y.tolist()) for e in stream for x, y in e.batches()] == expected


def test_labels_of_a_dataset_with_targets_are_known_without_reading_an_item() -> None:
    dataset = Targeted([0, 1, 2, 3])
    stream = class_incremental(dataset, num_experiences=2)
    assert dataset.reads == 0
    assert stream.classes == ("ant", "bee", "cat", "dog")


def test_labels_of_a_plain_dataset_take_one_pass() -> None:
    dataset = Items([1, 0, 1])
    assert Mapped(dataset).labels.tolist() == [1, 0, 1]
    assert dataset.reads == 3


def test_task_brings_names_and_both_splits() -> None:
    task = make_task()
    stream = class_incremental(task, num_experiences=3, transform=Transform(TRANSFORM))
    assert stream.classes == task.classes
    x, y = stream[1].train.batch([0, 1])
    rows = np.flatnonzero(task.train.labels == 1)[:2]
    assert torch.equal(x, Pixels(task.train, Transform(TRANSFORM)).batch(rows)[0])
    assert (x.dtype, x.shape, y.tolist()) == (torch.uint8, (2, 3, 32, 32), [1, 1])
    assert len(stream[0].test) + len(stream[1].test) + len(stream[2].test) == len(task.test)


def test_images_with_labels_and_pixels_are_the_same_samples() -> None:
    split, transform = make_split(8, 0), Transform(TRANSFORM)
    pixels = Pixels(split, transform)
    assert as_samples(pixels) is pixels
    assert torch.equal(as_samples(split, transform).batch([3, 1])[0], pixels.batch([3, 1])[0])


def test_names_may_be_given() -> None:
    assert class_incremental(numbered(8, 2), num_experiences=2, classes=["cat", "dog"]).classes == ("cat", "dog")
    assert class_incremental(numbered(8, 2), num_experiences=2).classes == ("0", "1")


def test_part_of_a_part_is_of_the_whole() -> None:
    samples = Arrays(torch.arange(10), torch.arange(10))
    part = Part(Part(samples, torch.tensor([7, 5, 3])), torch.tensor([2, 0]))
    assert part.batch([0, 1])[0].tolist() == part.labels.tolist() == [3, 7]
    assert isinstance(part, Samples)


# domain-incremental


def test_domains_bring_the_same_classes_from_other_sources() -> None:
    x, y = numbered(12, 3)
    stream = domain_incremental([(x, y), (x + 100, y)], [(x, y), (x + 100, y)], batch_size=5)
    assert [experience.classes for experience in stream] == [(0, 1, 2)] * 2
    assert [sorted(seen(e)) for e in stream] == [list(range(12)), list(range(100, 112))]
    assert [e.test.batch([0])[0].item() for e in stream] == [0, 100]


def test_domain_is_tested_on_all_its_test_samples() -> None:
    # class 2 is taught by the other domain
    x, y = numbered(12, 3)
    stream = domain_incremental([(x, y), (x[:4], y[:4] % 2)], [(x, y), (x, y)])
    assert [len(e.test) for e in stream] == [12, 12]


def test_domains_that_are_tasks_bring_their_tests() -> None:
    stream = domain_incremental([make_task(), make_task(num_train=9)], transform=Transform(TRANSFORM))
    assert [(len(e.train), len(e.test)) for e in stream] == [(13, 7), (9, 7)]
    assert stream.classes == make_task().classes


# smooth


def labels_of(stream: Stream) -> Tensor:
    return torch.cat([y for experience in stream for _, y in experience.batches()])


@pytest.mark.parametrize("sigma", [0, 0.1, 10])
def test_smooth_stream_brings_every_sample_once(sigma: float) -> None:
    stream = smooth(numbered(100), sigma=sigma, num_checkpoints=7, batch_size=9)
    assert sorted(i for experience in stream for i in seen(experience)) == list(range(100))
    assert not stream.has_boundaries
    assert {len(experience.train) for experience in stream} == {14, 15}


def test_smooth_stream_without_noise_brings_class_by_class_and_shuffles_within() -> None:
    stream = smooth(numbered(60), sigma=0, order=[3, 1, 0, 2, 5, 4])
    assert labels_of(stream).unique_consecutive().tolist() == [3, 1, 0, 2, 5, 4]
    rows = [i for experience in stream for i in seen(experience)][:10]
    assert sorted(rows) == list(range(3, 60, 6)) != rows


def test_smooth_stream_with_much_noise_is_mixed() -> None:
    # the first tenth of a shuffled stream holds each of 6 classes as often, up to chance: chi-squared, 5 degrees of
    # freedom, is below 20.5 in 99.9 % of streams; class by class it would be 1500
    labels = labels_of(smooth(numbered(3000), sigma=100.0))
    counts = torch.bincount(labels[:300], minlength=6).double()
    assert float(((counts - 50) ** 2 / 50).sum()) < 20.5


def test_smooth_stream_has_its_classes_around_their_centres() -> None:
    labels, sigma = labels_of(smooth(numbered(6000), sigma=0.05)), 0.05
    for label in range(1, 5):
        places = (labels == label).nonzero()[:, 0].double() / 6000
        # centres lie at c / 6 in time; the share of samples before a time is that time, up to half a class's width
        assert abs(float(places.mean()) - (label + 0.5) / 6) < 0.01
        assert abs(float(places.std()) - sigma) < 0.03


def test_smooth_stream_depends_on_its_seed() -> None:
    first, same, other = (labels_of(smooth(numbered(), sigma=0.2, seed=s)).tolist() for s in (0, 0, 1))
    assert first == same != other


# what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a stream needs num_experiences or groups, one of the two"),
        ({"num_experiences": 2, "groups": [[0]]}, "a stream needs num_experiences or groups, one of the two"),
        ({"num_experiences": 0}, "6 classes cannot be shared out among 0 experiences"),
        ({"num_experiences": 7}, "6 classes cannot be shared out among 7 experiences"),
        ({"num_experiences": 3, "first": 5}, "6 classes, 5 of them in the first cannot be shared out among 3"),
        ({"num_experiences": 1, "first": 5}, "6 classes, 5 of them in the first cannot be shared out among 1"),
        ({"num_experiences": 2, "first": 0}, "6 classes, 0 of them in the first cannot be shared out among 2"),
        ({"num_experiences": 2, "first": 9}, "6 classes, 9 of them in the first cannot be shared out among 2"),
        ({"num_experiences": 2, "order": [0, 1]}, "it has 2 of 6, and 2 is in one of the two only"),
        ({"num_experiences": 2, "order": [0, 1, 2, 3, 4, 5, 5]}, "order names every class that occurs once: it has 7"),
        ({"groups": [[0]], "order": 0}, "order and first say it again"),
        ({"groups": [[0]], "first": 1}, "order and first say it again"),
        ({"groups": []}, "a stream needs at least one experience, got none"),
        ({"groups": [[0], []]}, r"experience 1 is to bring the classes \[\]: name at least one, and each once"),
        ({"groups": [[2, 2]]}, r"experience 0 is to bring the classes \[2, 2\]: name at least one, and each once"),
        ({"groups": [[0], [6]]}, "experience 1 is to bring class 6, of which there is no training sample"),
        ({"groups": [[1]] * 11}, "class 1 comes 11 times and has 10 training samples"),
        ({"num_experiences": 2, "batch_size": 0}, "batch_size and epochs are at least 1, seed at least 0: got 0, 1"),
        ({"num_experiences": 2, "epochs": 0}, "got 32, 0 and 0"),
        ({"num_experiences": 2, "seed": -1}, "got 32, 1 and -1"),
        ({"num_experiences": 2, "classes": ["cat"]}, "1 class names do not do for labels from 0 to 5"),
    ],
)
def test_stream_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pt.TaskError, match=message):
        class_incremental(numbered(), **settings)


def test_test_label_that_is_never_trained_is_refused() -> None:
    x, y = numbered()
    message = "label 6 occurs in test and never in training: leave its samples out"
    with pytest.raises(pt.TaskError, match=message):
        class_incremental((x, y), (x, y + 1), num_experiences=2)
    with pytest.raises(pt.TaskError, match=message):
        domain_incremental([(x, y)], [(x, y + 1)])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((torch.zeros(3), [0, 1]), "3 inputs need as many labels, got 2"),
        ((torch.zeros(2), [0.0, 1.0]), r"labels are integers in one row, got float64 of shape \[2\]"),
        ((torch.zeros(2), torch.zeros(2)), r"labels are integers in one row, got float32 of shape \[2\]"),
        ((torch.zeros(2), [True, False]), "got bool"),
        ((torch.zeros(2), ["cat", "dog"]), "labels are integers in one row, got <U3"),
        ((torch.zeros(1), [[0]]), r"got int64 of shape \[1, 1\]"),
        ((torch.zeros(2), [0, -1]), "labels are integers from 0, got -1"),
        ((torch.zeros(0, 3), []), "a stream needs at least one training sample, got none"),
        (iter([]), "samples are a pair .* or a map-style dataset, got list_iterator"),
        (make_split(4, 0), r"images need a transform to become pixels: transform=petiole\.Transform\(model\.input_c"),
    ],
)
def test_source_that_is_none_is_refused(source: Any, message: str) -> None:
    with pytest.raises(pt.TaskError, match=message):
        class_incremental(source, num_experiences=1)


def test_dataset_of_pictures_is_told_to_make_tensors() -> None:
    class Pictures(Items):
        def __getitem__(self, index: int) -> Any:
            return make_split(3, 0).images[index], self.values[index]

    stream = class_incremental(Pictures([0, 1, 2]), num_experiences=1)
    with pytest.raises(
        pt.TaskError, match=r"an item of Pictures is no tensor but Image: .* torchvision's ToTensor\(\)"
    ):
        next(stream[0].batches())


def test_dataset_with_too_few_targets_is_refused() -> None:
    dataset = Targeted([0, 1, 2])
    dataset.targets.pop()
    with pytest.raises(pt.TaskError, match="Targeted has 3 items and 2 labels"):
        Mapped(dataset)


def test_task_is_given_alone() -> None:
    with pytest.raises(pt.TaskError, match="squares has test images and class names of its own: give the task alone"):
        class_incremental(make_task(), numbered(), num_experiences=1, transform=Transform(TRANSFORM))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -0.1}, "sigma is 0 or more, got -0.1"),
        ({"sigma": float("nan")}, "sigma is 0 or more, got nan"),
        ({"num_checkpoints": 0}, "0 checkpoints do not fit 60 samples: at least one sample each"),
        ({"num_checkpoints": 61}, "61 checkpoints do not fit 60 samples"),
        ({"batch_size": 0}, "batch_size and epochs are at least 1"),
    ],
)
def test_smooth_stream_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pt.TaskError, match=message):
        smooth(numbered(), **settings)


@pytest.mark.parametrize(
    ("domains", "tests", "message"),
    [
        ([], None, "a stream needs at least one domain, got none"),
        ([numbered()], [], "1 domains need as many tests, got 0"),
        ([Targeted([0, 3]), numbered()], None, "class 0 is 'ant' in domain 0 and '0' in another one"),
    ],
)
def test_domains_that_do_not_fit_are_refused(domains: Any, tests: Any, message: str) -> None:
    with pytest.raises(pt.TaskError, match=message):
        domain_incremental(domains, tests)


def test_labels_come_as_int64_on_the_cpu() -> None:
    for labels in ([0, 2], np.array([0, 2], np.uint16), torch.tensor([0, 2], dtype=torch.int32)):
        assert torch.equal(as_labels(labels), torch.tensor([0, 2]))
