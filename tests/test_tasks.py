"""Tasks, splits, image folders, VTAB lists and names, against hand-made folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petiole.errors import TaskError
from petiole.tasks import Split, Task, open_task
from petiole.tasks.images import Arrays
from petiole.tasks.splits import stratified_cut


def put(path: Path, value: int = 0) -> Path:
    """Writes an image whose every value is `value`, so that it can be told from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)
    return path


def folder(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for i in range(count):
            put(root / name / f"{i}.png")
    return root


def values(split: Split) -> list[int]:
    return [split.images[i].getpixel((0, 0)) for i in range(len(split))]


def names(split: Split) -> list[str]:
    return [Path(split.images.describe(i)).name for i in range(len(split))]


def noise_split(labels) -> Split:
    return Split(Arrays(np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2), "it"), labels)


# ---- tasks and splits


def test_a_joined_task_trains_on_train_and_val_in_this_order():
    task = Task("it", ("a", "b"), noise_split(np.array([0, 1, 0])), noise_split(np.array([1, 1])), None)
    joined = task.joined()
    assert joined.val is None
    assert joined.train.labels.tolist() == [0, 1, 0, 1, 1]
    assert values(joined.train) == [0, 1, 2, 0, 1]
    assert joined.train.images.describe(3) == "image 0 of it"
    assert joined.joined() is joined


def test_a_part_of_a_part_keeps_images_labels_and_names_together():
    split = noise_split(np.array([0, 1, 2, 3])).part([3, 1, 0]).part([2, 0])
    assert (values(split), split.labels.tolist(), split.images.describe(1)) == ([0, 3], [0, 3], "image 3 of it")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1]), r"3 images need as many labels in one row, got shape \(2,\)"),
        (np.array([0.0, 1.0, 1.0]), "labels must be integers from 0, got float64"),
    ],
)
def test_labels_that_do_not_fit_the_images_are_refused(labels, message):
    with pytest.raises(TaskError, match=message):
        Split(noise_split(np.zeros(3, int)).images, labels)


def test_a_split_without_images_is_refused():
    with pytest.raises(TaskError, match="a split needs at least one image, got none"):
        noise_split(np.zeros(0, int))


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_out_of_range_is_named_with_its_image_and_the_number_of_classes(label):
    with pytest.raises(TaskError, match=rf"image 1 of it has label {label}, but pets has 2 classes.* from 0 to 1"):
        Task("pets", ("a", "b"), noise_split(np.array([0, label])))


@pytest.mark.parametrize(("classes", "message"), [((), "at least one"), (("a", "b", "a"), "'a' more than once")])
def test_class_names_must_differ_and_be_one_at_least(classes, message):
    with pytest.raises(TaskError, match=message):
        Task("it", classes, noise_split(np.array([0, 0])))


@pytest.mark.parametrize("count", [1, 7, 20, 40])
def test_a_stratified_cut_takes_every_class_in_proportion(count):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [50, 30, 15, 5]))
    keep, cut = stratified_cut(labels, count, np.random.default_rng(0))
    assert sorted([*keep, *cut]) == list(range(100))
    assert len(cut) == count
    assert np.abs(np.bincount(labels[cut], minlength=4) - np.array([0.5, 0.3, 0.15, 0.05]) * count).max() < 1


def test_a_stratified_cut_leaves_every_class_one_image():
    labels = np.array([0, 1, 1, 2, 2, 2])
    keep, cut = stratified_cut(labels, 5, np.random.default_rng(0))
    assert sorted(labels[keep]) == [0, 1, 2]
    assert len(cut) == 3


# ---- folders


def test_a_folder_of_classes_is_cut_into_three_splits(tmp_path):
    folder(tmp_path, dog=50, cat=25)
    task = open_task(tmp_path)
    assert task.classes == ("cat", "dog")
    assert [np.bincount(s.labels).tolist() for s in (task.train, task.val, task.test)] == [[16, 32], [4, 8], [5, 10]]
    seen = [split.images.describe(i) for split in (task.train, task.val, task.test) for i in range(len(split))]
    assert sorted(seen) == sorted(str(path) for path in tmp_path.glob("*/*.png"))
    for split in (task.train, task.val, task.test):
        parents = [Path(split.images.describe(i)).parent.name for i in range(len(split))]
        assert parents == [task.classes[label] for label in split.labels]


def test_the_cut_is_the_same_for_the_same_seed_only(tmp_path):
    folder(tmp_path, a=20, b=20)
    first, again, other = (names(open_task(tmp_path, seed=seed).train) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_class_with_one_image_keeps_it_for_training(tmp_path):
    task = open_task(folder(tmp_path, rare=1, common=10))
    assert (task.train.labels == 1).sum() == 1
    assert not any((split.labels == 1).any() for split in (task.val, task.test))


def test_two_images_make_a_task_without_val_and_test(tmp_path):
    task = open_task(folder(tmp_path, a=1, b=1))
    assert (len(task.train), task.val, task.test) == (2, None, None)


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_parts_are_taken_as_they_are_in_sorted_order(val, tmp_path):
    for k, part in enumerate(("train", val, "test")):
        for j, name in enumerate(("b", "a")):
            put(tmp_path / part / name / "2.png", 10 * k + j)
            put(tmp_path / part / name / "deeper" / "1.JPG", 10 * k + j)
    task = open_task(str(tmp_path))
    assert [split.labels.tolist() for split in (task.train, task.val, task.test)] == [[0, 0, 1, 1]] * 3
    assert [values(split) for split in (task.train, task.val, task.test)] == [
        [1, 1, 0, 0], [11, 11, 10, 10], [21, 21, 20, 20]
    ]  # fmt: skip
    assert names(task.train) == ["2.png", "1.JPG"] * 2


def test_without_val_a_fifth_of_train_becomes_val(tmp_path):
    folder(tmp_path / "train", a=10, b=20)
    task = open_task(tmp_path)
    assert (np.bincount(task.val.labels).tolist(), len(task.train), task.test) == ([2, 4], 24, None)


def test_spaces_unicode_and_system_files_do_no_harm(tmp_path):
    for name in ("Bär und Löwe", "猫 🐱"):
        put(tmp_path / name / "ein Bild, größer.png")
        (tmp_path / name / "._ein Bild.png").write_bytes(b"resource fork")
        (tmp_path / name / ".DS_Store").write_bytes(b"")
        (tmp_path / name / "notes.txt").write_text("not an image")
    put(tmp_path / ".cache" / "x.png")
    task = open_task(tmp_path)
    assert task.classes == ("Bär und Löwe", "猫 🐱")
    assert values(task.train) == [0, 0]


def test_a_class_called_train_is_a_class(tmp_path):
    assert open_task(folder(tmp_path, bus=2, train=2)).classes == ("bus", "train")


def test_a_stray_test_txt_makes_no_vtab_folder(tmp_path):
    folder(tmp_path, a=2, b=2)
    (tmp_path / "test.txt").write_text("notes")
    assert open_task(tmp_path).classes == ("a", "b")


def test_an_empty_class_is_named_with_what_its_folder_holds(tmp_path):
    folder(tmp_path, a=2, b=2)
    (tmp_path / "c").mkdir()
    with pytest.raises(TaskError, match=r"class 'c' has no training image: .*c holds no file\. Add images .*or remove"):
        open_task(tmp_path)
    (tmp_path / "c" / "x.heic").write_bytes(b"")
    with pytest.raises(TaskError, match=r"c holds 1 files, none of them an image\. Add images \(\.avif"):
        open_task(tmp_path)


def test_a_class_of_test_that_train_lacks_is_named(tmp_path):
    folder(tmp_path / "train", a=2, b=2)
    folder(tmp_path / "test", a=2, z=2)
    with pytest.raises(TaskError, match=r"class 'z' of .*test has no folder in train, which has a, b"):
        open_task(tmp_path)


def test_a_class_may_be_absent_from_test(tmp_path):
    folder(tmp_path / "train", a=2, b=2)
    folder(tmp_path / "test", b=2)
    assert open_task(tmp_path).test.labels.tolist() == [1, 1]


def test_folders_that_are_no_task_say_what_they_hold(tmp_path):
    with pytest.raises(TaskError, match="holds no images and no class folder"):
        open_task(tmp_path)
    put(tmp_path / "1.png")
    with pytest.raises(TaskError, match=r"holds 1 images and no class folder: an image folder is laid out as <class>"):
        open_task(tmp_path)
    folder(tmp_path / "test", a=1)
    with pytest.raises(TaskError, match="has a test folder but no train folder"):
        open_task(tmp_path)
    folder(tmp_path / "train", a=1)
    assert open_task(tmp_path).classes == ("a",)
    (tmp_path / "val" / "a").mkdir(parents=True)
    with pytest.raises(TaskError, match="val holds no file: add images or remove the folder"):
        open_task(tmp_path)
    folder(tmp_path / "valid", a=1)
    with pytest.raises(TaskError, match="has both a val and a valid folder"):
        open_task(tmp_path)


# ---- VTAB lists


def vtab(root: Path, **lists: str) -> Path:
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def test_vtab_lists_become_their_splits_and_paths_may_contain_spaces(tmp_path):
    for k in range(5):
        put(tmp_path / "images" / f"a  b {k}\u2028ü.png", k)
    line = "images/a  b {}\u2028ü.png {}\n".format
    vtab(tmp_path, train800=line(0, 0) + line(1, 4), val200=line(2, 2) + "\n", test=line(3, 0) + line(4, 1).strip())
    task = open_task(tmp_path)
    assert task.classes == ("0", "1", "2", "3", "4")  # class 3 has no image, classes 1 and 2 none to train on
    assert [values(split) for split in (task.train, task.val, task.test)] == [[0, 1], [2], [3, 4]]
    assert [s.labels.tolist() for s in (task.train, task.val, task.test)] == [[0, 4], [2], [0, 1]]
    assert values(task.joined().train) == [0, 1, 2]


def test_windows_line_ends_tabs_and_a_byte_order_mark_are_read(tmp_path):
    put(tmp_path / "a.png"), put(tmp_path / "b.png")
    (tmp_path / "train800.txt").write_bytes(b"\xef\xbb\xbfa.png\t0\r\nb.png 1\r\n")
    assert names(open_task(tmp_path).train) == ["a.png", "b.png"]


def test_train800val200_alone_gives_train_and_a_val_cut_from_it(tmp_path):
    for k in range(10):
        put(tmp_path / f"{k}.png", k)
    lines = [f"{k}.png {k % 2}\n" for k in range(10)]
    vtab(tmp_path, train800val200="".join(lines), val200="".join(lines[8:]))
    task = open_task(tmp_path)
    assert sorted(values(task.train) + values(task.val)) == list(range(10))
    assert (np.bincount(task.val.labels).tolist(), task.test) == ([1, 1], None)


def test_a_class_file_names_the_classes(tmp_path):
    put(tmp_path / "a.png")
    vtab(tmp_path, train800="a.png 1\n", classes="red fox\nArctic fox\nwolf\n")
    assert open_task(tmp_path).classes == ("red fox", "Arctic fox", "wolf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png 0\nb.png 1\n", r"train800\.txt, line 2: there is no file .*b\.png"),
        ("a.png 0\n\na.png one\n", r"train800\.txt, line 3: 'a\.png one' is not a path, a space and a label"),
        ("a.png\n", r"train800\.txt, line 1: 'a\.png' is not a path, a space and a label"),
        ("a.png 0\na.png 7\n", r"train800\.txt, line 2: label 7 is out of range: there are 3 classes, .* from 0 to 2"),
        ("a.png -1\n", r"train800\.txt, line 1: label -1 is out of range: there are 3 classes"),
        ("\n", r"train800\.txt lists no image"),
    ],
)
def test_a_wrong_line_is_named_with_list_and_number(text, message, tmp_path):
    put(tmp_path / "a.png")
    vtab(tmp_path, train800=text, labels="x\ny\nz\n")
    with pytest.raises(TaskError, match=message):
        open_task(tmp_path)


def test_a_list_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "train800.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match=r"train800\.txt is not a text file in UTF-8"):
        open_task(tmp_path)


# ---- names


def test_a_misspelt_name_gets_the_nearest_and_what_was_looked_for():
    with pytest.raises(TaskError) as caught:
        open_task("orientatoin")
    message = str(caught.value)
    assert "no task is called 'orientatoin': did you mean 'orientation'? Found no file or folder" in message
    assert "built-in task (digits, position, orientation, counting)" in message
    assert all(what in message for what in (".npz pack", "train800.txt", "train/<class>/<image>", "hf:owner/name"))


def test_another_kind_of_file_is_no_task(tmp_path):
    with pytest.raises(TaskError, match=r"x\.zip'\. Found a file that is no \.npz pack"):
        open_task(put(tmp_path / "x.png").rename(tmp_path / "x.zip"))


def test_a_path_is_never_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(folder(tmp_path, **{"digits/a": 2, "digits/b": 2}))
    assert open_task("./digits").classes == open_task(Path("digits")).classes == ("a", "b")
    assert len(open_task("digits").classes) == 10
