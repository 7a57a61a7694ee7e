"""Packs and Hugging Face datasets, against the packs' own reader and datasets made in memory."""

import importlib.util
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petiole.errors import TaskError
from petiole.tasks import Pixels, Split, Transform, open_task

DATA = Path(os.environ.get("PETIOLE_DATA", Path(__file__).parents[1] / "../shared/data"))


def values(split: Split) -> list[int]:
    return [split.images[i].getpixel((0, 0)) for i in range(len(split))]


# ---- packs


def pack_arrays(count: int = 6) -> dict[str, np.ndarray]:
    blobs = []
    for k in range(count):
        Image.new("L", (4, 4), k).save(buffer := io.BytesIO(), "PNG")
        blobs.append(buffer.getvalue())
    return {
        "data": np.frombuffer(b"".join(blobs), np.uint8),
        "offsets": np.cumsum([0, *map(len, blobs)]),
        "labels": np.arange(count, dtype=np.int32) % 2,
        "split": np.array([2, 0, 1, 0, 0, 2][:count], np.uint8),
        "class_names": np.array(["cat", "dog", "never seen"]),
    }


def pack(path: Path, **changes) -> Path:
    arrays = {key: value for key, value in {**pack_arrays(), **changes}.items() if value is not None}
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("name", ["caltech101", "dsprites_loc", "pneumonia_mnist"])
def test_a_shared_pack_reads_as_its_own_reader_does(name):
    if not (DATA / "tasks").is_dir():
        pytest.skip(f"no packs under {DATA}: set PETIOLE_DATA")
    spec = importlib.util.spec_from_file_location("load_pack", DATA / "load_pack.py")
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    theirs, task = reader.Pack(DATA / "tasks" / f"{name}.npz"), open_task(DATA / "tasks" / f"{name}.npz")
    assert (task.name, list(task.classes)) == (name, theirs.class_names)
    for k, split in enumerate((task.train, task.val, task.test)):
        rows = np.flatnonzero(theirs.split == k)
        assert np.array_equal(split.labels, theirs.labels[rows])
        for i in (0, len(rows) // 2, len(rows) - 1):
            assert np.array_equal(np.asarray(split.images[i]), np.asarray(theirs[rows[i]]))
            assert split.images.describe(i) == f"image {rows[i]} of {name}.npz"


def test_a_pack_has_its_splits_and_may_lack_a_class(tmp_path):
    task = open_task(pack(tmp_path / "pets.npz"))
    assert task.classes == ("cat", "dog", "never seen")
    assert [values(split) for split in (task.train, task.val, task.test)] == [[1, 3, 4], [2], [0, 5]]


def test_a_pack_without_splits_and_names_is_cut_and_numbered(tmp_path):
    task = open_task(pack(tmp_path / "pets.npz", split=None, class_names=None))
    assert task.classes == ("0", "1")
    assert sorted(values(task.train) + values(task.val) + values(task.test)) == list(range(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"is no image pack: it holds data, offsets, split, class_names; a pack holds data, off"),
        ({"labels": np.zeros(5, int)}, r"holds 6 images but labels of shape \(5,\)"),
        ({"labels": np.zeros(6)}, "has labels of type float64"),
        ({"labels": np.array([0, 1, 0, 9, 0, 1])}, r"image 3 of pets\.npz has label 9, but pets has 3 classes"),
        ({"split": np.array([0, 0, 0, 0, 0, 3])}, "has split 3: 0 train, 1 val, 2 test"),
        ({"split": np.array([2, 2, 2, 2, 2, 1])}, "has no training image: no entry of split is 0"),
        ({"offsets": np.arange(7)}, r"is damaged: offsets must rise from 0 to the \d+ bytes of data, they go from 0"),
        ({"offsets": np.zeros(1, int)}, "holds no image: it has 1 offsets"),
        ({"data": np.zeros((6, 4, 4), np.uint8)}, r"data must be uint8 \[bytes\] .* found uint8 \(6, 4, 4\)"),
        ({"labels": np.array([0, {}] * 3)}, "cannot be read as an image pack: Object arrays cannot be loaded"),
    ],
)
def test_a_pack_that_contradicts_itself_says_where(change, message, tmp_path):
    with pytest.raises(TaskError, match=rf"pets\.npz.* {message}" if "image 3" not in message else message):
        open_task(pack(tmp_path / "pets.npz", **change))


def test_a_damaged_pack_is_refused(tmp_path):
    data = pack(tmp_path / "pets.npz").read_bytes()
    flipped = data[:150] + bytes([data[150] ^ 255]) + data[151:]
    for damaged in (b"", b"no archive", data[: len(data) // 2], flipped):
        (tmp_path / "pets.npz").write_bytes(damaged)
        with pytest.raises(TaskError, match=r"pets\.npz cannot be read as an image pack: ."):
            open_task(tmp_path / "pets.npz")


def test_bytes_flipped_anywhere_in_a_pack_raise_a_task_error_or_nothing(tmp_path):
    data, rng = np.frombuffer(pack(tmp_path / "pets.npz").read_bytes(), np.uint8), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(0, len(data), 3)] ^= rng.integers(1, 256, 3, dtype=np.uint8)
        (tmp_path / "pets.npz").write_bytes(damaged.tobytes())
        try:
            open_task(tmp_path / "pets.npz")
        except TaskError:
            refused += 1
    assert refused > 150


def test_an_array_file_under_a_packs_name_is_refused(tmp_path):
    with open(tmp_path / "pets.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(TaskError, match=r"pets\.npz is no image pack: it holds a single array; a pack holds data"):
        open_task(tmp_path / "pets.npz")


# ---- Hugging Face datasets


@pytest.fixture
def hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets


def saved(hub, path: Path, label=None, image: str = "image", **splits: list) -> str:
    """Saves splits of grey images, whose values count on, with the given labels; returns the address."""
    start, parts = 0, {}
    label = label or hub.ClassLabel(names=["cat", "dog", "owl"])
    for name, labels in splits.items():
        images = [Image.new("L", (4, 4), start + i) for i in range(len(labels))]
        features = hub.Features({image: hub.Image(), "label": label, "note": hub.Value("string")})
        rows = {image: images, "label": labels, "note": ["x"] * len(labels)}
        parts[name] = hub.Dataset.from_dict(rows, features=features)
        start += len(labels)
    hub.DatasetDict(parts).save_to_disk(str(path))
    return f"hf:{path}"


def test_a_saved_dataset_becomes_a_task(hub, tmp_path):
    source = saved(hub, tmp_path / "my pets", train=[0, 1, 1], validation=[1], test=[0, 0])
    task = open_task(source)
    assert (task.name, task.classes) == ("my pets", ("cat", "dog", "owl"))
    assert [values(split) for split in (task.train, task.val, task.test)] == [[0, 1, 2], [3], [4, 5]]
    assert [s.labels.tolist() for s in (task.train, task.val, task.test)] == [[0, 1, 1], [1], [0, 0]]
    assert task.test.images.describe(1) == f"image 1 of {source}, test"


def test_a_dataset_with_train_alone_is_cut(hub, tmp_path):
    task = open_task(saved(hub, tmp_path / "pets", train=[0, 1] * 25))
    assert [len(split) for split in (task.train, task.val, task.test)] == [32, 8, 10]
    assert sorted(values(task.train) + values(task.val) + values(task.test)) == list(range(50))


def test_string_labels_become_sorted_classes(hub, tmp_path):
    task = open_task(saved(hub, tmp_path / "pets", hub.Value("string"), train=["owl", "cat"], test=["cat"]))
    assert (task.classes, task.train.labels.tolist(), task.test.labels.tolist()) == (("cat", "owl"), [1, 0], [0])


def test_integer_labels_are_numbered_classes(hub, tmp_path):
    assert open_task(saved(hub, tmp_path / "pets", hub.Value("int32"), train=[0, 2])).classes == ("0", "1", "2")


def test_an_unlabelled_test_split_is_left_out(hub, tmp_path):
    task = open_task(saved(hub, tmp_path / "pets", hub.Value("int64"), train=[0, 1], validation=[1], test=[-1, -1]))
    assert task.test is None


def test_datasets_that_make_no_task_say_what_they_have(hub, tmp_path):
    with pytest.raises(TaskError, match=r"hf:.*a has no train split: it has test"):
        open_task(saved(hub, tmp_path / "a", test=[0]))
    with pytest.raises(TaskError, match=r"labels that are neither integers nor strings in every row"):
        open_task(saved(hub, tmp_path / "b", hub.Value("float32"), train=[0.5]))
    with pytest.raises(TaskError, match=r"hf:.*/nowhere cannot be loaded as a folder written by save_to_disk: ."):
        open_task(f"hf:{tmp_path}/nowhere")
    hub.DatasetDict(train=hub.Dataset.from_dict({"text": ["x"], "label": [0]})).save_to_disk(str(tmp_path / "c"))
    with pytest.raises(TaskError, match=r"has no image column to choose: its columns are text, label\. Call it"):
        open_task(f"hf:{tmp_path}/c")


def test_a_row_without_image_is_named(hub, tmp_path):
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["a", "b"])})
    data = hub.Dataset.from_dict({"image": [None, None], "label": [0, 1]}, features=features)
    hub.DatasetDict(train=data).save_to_disk(str(tmp_path / "x"))
    with pytest.raises(TaskError, match=r"image 0 of hf:.*x, train cannot be read as an image: the row has no image"):
        Pixels(open_task(f"hf:{tmp_path}/x").train, Transform({"input_size": (3, 8, 8)}))


def test_the_hub_gets_name_and_config_and_its_error_is_passed_on(hub, monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        raise ConnectionError("no network here")

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"hf:owner/pets:small cannot be loaded from the .* hub: no network here"):
        open_task("hf:owner/pets:small")
    with pytest.raises(TaskError):
        open_task("hf:owner/pets")
    assert asked == [("owner/pets", "small"), ("owner/pets", None)]


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"pip install 'petiole\[data\]'"):
        open_task("hf:owner/pets")
