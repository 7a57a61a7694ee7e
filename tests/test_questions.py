"""Questions on images: every layout on small folders, and what is said of damaged ones."""

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from petiole.errors import TaskError
from petiole.tasks.coco import CAPTION_PROMPT
from petiole.tasks.images import Files
from petiole.tasks.question import Question, QuestionTask
from petiole.tasks.question_parts import cut_off
from petiole.tasks.questions import open_questions

PARTS = ("train", "val", "test")


def write_json(path: Path, found: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf8")
    return path


def write_images(*paths: Path) -> None:
    """Files that exist and are no images: opening questions decodes none."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write_rows(path: Path, *rows: object) -> Path:
    """A file of rows; what is no row already becomes one on an image of the pack."""
    lines = [
        row if isinstance(row, str) else json.dumps({"image": 0, "question": "q?", "answer": "a"} | row) for row in rows
    ]
    text = "\n".join(lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_pack(path: Path, count: int = 10, **changes: object) -> Path:
    blobs = []
    for k in range(count):
        Image.new("L", (4, 4), k).save(buffer := io.BytesIO(), "PNG")
        blobs.append(buffer.getvalue())
    arrays = {"data": np.frombuffer(b"".join(blobs), np.uint8), "offsets": np.cumsum([0, *map(len, blobs)])}
    np.savez(path, **{key: value for key, value in {**arrays, **changes}.items() if value is not None})
    return path


def file_names(task: QuestionTask, question: Question) -> list[str]:
    return [Path(task.images.describe(image)).name for image in question.images]


def parts(task: QuestionTask) -> list[tuple[Question, ...]]:
    return [part or () for part in (task.train, task.val, task.test)]


# ---- questions and tasks


def test_target_is_the_most_frequent_answer_and_of_equals_the_first() -> None:
    assert Question("q?", ("b", "a", "a", "b", "c")).target == "b"
    assert Question("q?", ("c", "a", "a")).target == "a"


def test_unlabelled_question_has_no_target() -> None:
    with pytest.raises(TaskError, match=r"question 'how many\?' has no answer"):
        _ = Question("how many?").target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "sums has no question in any split"),
        ({"val": ()}, "sums has no question in any split"),
        ({"train": (Question("1+1?", ("2",)),), "val": ()}, "sums has validation questions, but none in them"),
        ({"train": (Question("1+1?"),)}, r"the training question '1\+1\?' of sums has no answer: only validation and"),
        ({"test": (Question("q?", images=(0, 3)),)}, r"the test question 'q\?' of sums is on image 3, but there are 2"),
        ({"test": (Question("q?", images=(-1,)),)}, "is on image -1"),
        ({"test": (Question("q?"),), "metric": "bleu"}, "sums has the metric 'bleu': known are exact, vqa, cider"),
    ],
)
def test_task_that_contradicts_itself_says_where(fields: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        QuestionTask("sums", Files([Path("0.png"), Path("1.png")]), **fields)


# ---- cutting


def questions_on(*images: tuple[int, ...]) -> list[Question]:
    return [Question(f"question {i}", ("a",), places) for i, places in enumerate(images)]


def test_a_fifth_of_the_images_is_cut_off_with_all_their_questions() -> None:
    questions = questions_on(*[(i % 50,) for i in range(200)])
    keep, cut = cut_off(questions, seed=0)
    assert len({q.images for q in cut}) == 10
    assert not {q.images for q in keep} & {q.images for q in cut}
    assert sorted(keep + cut, key=questions.index) == questions
    assert cut == sorted(cut, key=questions.index)


def test_images_that_questions_link_stay_together() -> None:
    # a chain through 0-1-2-3, listed so that it closes last, beside twenty single images
    questions = questions_on((0, 1), (3, 2), (2,), (0,), *[(i,) for i in range(10, 30)], (1, 3))
    for seed in range(20):
        keep, cut = cut_off(questions, seed)
        assert not {i for q in keep for i in q.images} & {i for q in cut for i in q.images}
        assert len(cut) in (4, 8)  # a fifth of 21 groups, the chain of five questions among them or not


def test_cut_depends_on_the_seed_and_on_nothing_else() -> None:
    questions = questions_on(*[(i,) for i in range(40)])
    assert cut_off(questions, 3) == cut_off(questions, 3)
    assert cut_off(questions, 3) != cut_off(questions, 4)


def test_questions_without_image_are_cut_one_by_one() -> None:
    keep, cut = cut_off(questions_on(*[()] * 10), seed=0)
    assert (len(keep), len(cut)) == (8, 2)


# ---- rows


def test_rows_give_questions_with_their_splits(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "shapes.jsonl.gz",
        {"image": 3, "split": "train", "id": 17},
        {"image": [4, 5], "answer": ["red", "blue", "red"], "split": "validation", "group": "ignored"},
        "",
        {"image": None, "answer": None, "split": "test", "id": "x"},
    )
    task = open_questions(path, images=write_pack(tmp_path / "pack.npz"))
    assert (task.name, task.metric, len(task.images)) == ("shapes", "exact", 10)
    assert task.train == (Question("q?", ("a",), (3,), name="17"),)
    assert task.val == (Question("q?", ("red", "blue", "red"), (4, 5)),)
    assert task.test == (Question("q?", (), (), name="x"),)
    assert task.images[3].getpixel((0, 0)) == 3
    assert task.images.describe(3) == "image 3 of pack.npz"


def test_images_of_a_pack_are_known_by_number_and_by_id(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack.npz", count=3, ids=np.array(["dog-7", "cat-1", "owl-2"]))
    path = write_rows(tmp_path / "a.jsonl", {"image": "cat-1", "split": "test"}, {"image": 2, "split": "test"})
    assert [q.images for q in open_questions(path, images=pack).test or ()] == [(1,), (2,)]


def test_task_packs_with_labels_and_splits_serve_as_image_packs(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack.npz", count=3, labels=np.zeros(3, int), split=np.zeros(3, np.uint8))
    path = write_rows(tmp_path / "a.jsonl", {"image": 2, "split": "test"})
    assert open_questions(path, images=pack).images[2].getpixel((0, 0)) == 2


@pytest.mark.parametrize("is_named", [False, True])
def test_paths_start_at_the_files_folder_or_at_the_named_one(is_named: bool, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" if is_named else tmp_path
    write_images(folder / "pets/tom.jpg", folder / "pets/rex.jpg")
    rows = [{"image": "pets/rex.jpg", "split": "train"}, {"image": ["pets/tom.jpg", "pets/rex.jpg"], "split": "train"}]
    task = open_questions(write_rows(tmp_path / "a.jsonl", *rows), images=folder if is_named else None)
    assert [task.images.describe(i) for i in range(2)] == [str(folder / "pets/rex.jpg"), str(folder / "pets/tom.jpg")]
    assert [q.images for part in parts(task) for q in part] == [(0,), (1, 0)]


def test_options_stand_below_the_question_with_letters(tmp_path: Path) -> None:
    row = {"image": None, "options": ["red", "dark blue"], "answer": "dark blue", "split": "test"}
    (question,) = open_questions(write_rows(tmp_path / "a.jsonl", row)).test or ()
    assert question.text == "q?\nOptions: (A) red (B) dark blue"
    assert (question.options, question.target) == (("red", "dark blue"), "dark blue")


def test_rows_without_splits_are_cut_by_image(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *[{"image": i % 25, "id": i} for i in range(100)])
    pack = write_pack(tmp_path / "pack.npz", count=25)
    task = open_questions(path, images=pack)
    seen = [{q.images for q in part} for part in parts(task)]
    assert [len(images) for images in seen] == [16, 4, 5]
    assert len(set.union(*seen)) == 25
    assert sorted(int(q.name) for part in parts(task) for q in part) == list(range(100))
    assert parts(open_questions(path, images=pack)) == parts(task)
    assert parts(open_questions(path, images=pack, seed=1)) != parts(task)


def test_val_is_cut_from_train_where_it_is_missing_and_test_stays(tmp_path: Path) -> None:
    rows = [{"image": i, "split": "train" if i < 5 else "test"} for i in range(10)]
    task = open_questions(write_rows(tmp_path / "a.jsonl", *rows), images=write_pack(tmp_path / "pack.npz"))
    assert [len(part) for part in parts(task)] == [4, 1, 5]
    assert [q.images for q in task.test or ()] == [(i,) for i in range(5, 10)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": 1, "question": ', r"line 2 cannot be read as JSON: Expecting value"),
        ("[1, 2]", r"line 2 is \[1, 2\], where an object \{\.\.\.\} was looked for"),
        ('{"image": 1, "answer": "a"}', r"line 2 has no 'question': it has image, answer"),
        ('{"question": "q?", "answer": "a"}', r"line 2 has no 'image': it has question, answer\. Write null"),
        ({"question": " "}, "line 2 has an empty question"),
        ({"question": ["q?"]}, r"line 2 has question \['q\?'\]: it must be a string"),
        ({"answer": 2}, "line 2 has answer 2: it must be a string or a list of strings, none of them empty"),
        ({"answer": ["a", ""]}, r"line 2 has answer \['a', ''\]: it must be"),
        ({"options": "ab"}, "line 2 has options 'ab': it must be a list of strings"),
        ({"options": ["b", "c"]}, "line 2 has the answer 'a', which is none of its options: b, c"),
        ({"options": ["a"] * 27}, "line 2 has 27 options: they are lettered, so at most 26"),
        ({"split": "dev"}, "line 2 has split 'dev': it must be train, val or test"),
        ({"split": 1}, "line 2 has split 1: it must be a string"),
        ({"split": "test"}, "line 2: some rows up to here have a split and others none"),
        (
            {"image": 10},
            r"line 2 has image 10, which pack\.npz does not have: it has numbers 0 to 9 and ids such as 'id0'",
        ),
        ({"image": -1}, "line 2 has image -1, which"),
        ({"image": "id10"}, "line 2 has image 'id10', which"),
        ({"image": True}, "line 2 has image True, which"),
        ({"image": [1, [2]]}, r"line 2 has image \[2\], which"),
    ],
)
def test_row_that_is_none_is_named_with_its_line(row: object, message: str, tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack.npz", ids=np.array([f"id{i}" for i in range(10)]))
    with pytest.raises(TaskError, match=rf"a\.jsonl, {message}"):
        open_questions(write_rows(tmp_path / "a.jsonl", {}, row), images=pack)


def test_numbers_without_a_pack_ask_for_one(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"line 1 has image 0: it must be a path below .*; .* pass a pack as images="):
        open_questions(write_rows(tmp_path / "a.jsonl", {}))


def test_missing_image_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "1.png")
    path = write_rows(tmp_path / "a.jsonl", *[{"image": f"{i}.png"} for i in (0, 1, 2, 2)])
    with pytest.raises(TaskError, match=r"there is no image .*/0\.png, and 2 of 3 images are missing in all"):
        open_questions(path)


def test_damaged_files_of_rows_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl.gz", *[{"id": i} for i in range(99)])
    data = path.read_bytes()
    for damaged in (b"no archive", data[:-12], data[:60] + bytes([data[60] ^ 255]) + data[61:]):
        path.write_bytes(damaged)
        with pytest.raises(TaskError, match=r"a\.jsonl\.gz is damaged or not a text file|cannot be read as JSON"):
            open_questions(path, images=write_pack(tmp_path / "pack.npz"))
    (tmp_path / "b.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(TaskError, match=r"b\.jsonl is damaged or not a text file in UTF-8"):
        open_questions(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(TaskError, match=r"c\.jsonl holds no question"):
        open_questions(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "is no image pack: it holds offsets; a pack holds data, offsets and may hold ids"),
        ({"data": np.zeros((6, 4, 4), np.uint8)}, r"is no image pack: data must be uint8 .* found uint8 \(6, 4, 4\)"),
        ({"offsets": np.arange(7)}, r"is damaged: offsets must rise from 0 to the \d+ bytes of data"),
        ({"offsets": np.zeros(1, int)}, "holds no image: it has 1 offsets"),
        ({"ids": np.array(["a", "b", "b"])}, "holds 3 images but 2 different ids"),
        ({"ids": np.array(["a", "b"])}, "holds 3 images but 2 different ids"),
        ({"ids": np.array(["a", {}])}, "cannot be read as an image pack: Object arrays cannot be loaded"),
    ],
)
def test_pack_that_contradicts_itself_says_so(change: dict, message: str, tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack.npz", count=3, **change)
    with pytest.raises(TaskError, match=rf"pack\.npz {message}"):
        open_questions(write_rows(tmp_path / "a.jsonl", {}), images=pack)


@pytest.mark.parametrize(
    ("name", "images", "num_images", "counts"),
    [
        ("nlvr_qa", "nlvr", 2964, [10087, 1200, 5653]),
        ("easy_vqa", "easy_vqa", 5000, [34687, 3888, 9673]),
        ("bccd_vqa", "bccd_vqa", 364, [1931, 825, 672]),
        ("nlvr_statements", "nlvr", 2964, [1764, 210, 990]),
    ],
)
def test_shared_rows_open(name: str, images: str, num_images: int, counts: list[int], data: Path) -> None:
    task = open_questions(data / "vqa" / f"{name}.jsonl.gz", images=data / "vqa" / f"{images}_images.npz")
    assert (task.name, len(task.images), [len(part) for part in parts(task)]) == (name, num_images, counts)
    assert task.images[num_images - 1].size[0] > 0
    seen = [{image for q in part for image in q.images} for part in parts(task)]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


# ---- ScienceQA

PROBLEM = {
    "question": "Which is a mammal?",
    "choices": ["frog", "bat"],
    "answer": 1,
    "hint": "Mammals have fur.",
    "image": "image.png",
    "subject": "natural science",
    "grade": "grade6",
    "split": "train",
}


def science_qa(root: Path, splits: dict | None = None, **problems: dict) -> Path:
    """A folder with problem 1 and others, given as changes of it; every image exists."""
    found = {pid: PROBLEM | changes for pid, changes in ({"1": {}} | problems).items()}
    write_json(root / "problems.json", found)
    write_json(root / "pid_splits.json", splits or {"train": ["1"]})
    for pid, problem in found.items():
        if problem.get("image"):
            write_images(root / "images" / problem["split"] / pid / problem["image"])
    return root


def test_science_qa_asks_in_the_papers_format(tmp_path: Path) -> None:
    (question,) = open_questions(science_qa(tmp_path)).train or ()
    assert question == Question(
        "Question: Which is a mammal?\nContext: Mammals have fur.\nOptions: (A) frog (B) bat\nResponse:",
        ("The answer is B.",),
        (0,),
        ("frog", "bat"),
        "1",
        ("NAT", "TXT", "IMG", "G1-6"),
    )


def test_science_qa_without_context_and_image_says_so(tmp_path: Path) -> None:
    bare = {"hint": "", "image": None, "subject": "language science", "grade": "grade7", "split": "test"}
    root = science_qa(tmp_path, {"train": ["1"], "test": ["2"]}, **{"2": bare})
    (question,) = open_questions(root).test or ()
    assert "\nContext: N/A\n" in question.text
    assert (question.images, question.tags) == ((), ("LAN", "NO", "G7-12"))


def test_science_qa_ignores_minival_unless_val_is_missing(tmp_path: Path) -> None:
    val, mini = {"split": "val"}, {"split": "val"}
    splits = {"train": ["1"], "val": ["2", "3"], "minival": ["3"], "minitest": ["4"], "trainval": ["1", "2"]}
    task = open_questions(science_qa(tmp_path / "a", splits, **{"2": val, "3": mini, "4": {}}))
    assert [[q.name for q in part] for part in parts(task)] == [["1"], ["2", "3"], []]
    del splits["val"]
    task = open_questions(science_qa(tmp_path / "b", splits, **{"2": val, "3": mini, "4": {}}))
    assert [[q.name for q in part] for part in parts(task)] == [["1"], ["3"], []]


@pytest.mark.parametrize("is_named", [False, True])
def test_science_qa_finds_images_beside_the_lists_or_where_named(is_named: bool, tmp_path: Path) -> None:
    root = science_qa(tmp_path / "lists")
    folder = tmp_path / "pictures" if is_named else root
    (root / "images").rename(tmp_path / "moved")
    folder.mkdir(exist_ok=True)
    (tmp_path / "moved/train").rename(folder / "train")
    task = open_questions(root, images=folder if is_named else None)
    assert task.images.describe(0) == str(folder / "train/1/image.png")


def test_captions_join_the_context_only_when_asked_for(tmp_path: Path) -> None:
    root = science_qa(tmp_path, {"train": ["1", "2"]}, **{"2": {"hint": ""}})
    write_json(root / "captions.json", {"captions": {"1": "A bat at night.", "2": "A pond."}})
    plain, shown = open_questions(root).train or (), open_questions(root, captions=True).train or ()
    assert [q.text.split("\n")[1] for q in plain] == ["Context: Mammals have fur.", "Context: N/A"]
    assert [q.text.split("\n")[1] for q in shown] == ["Context: Mammals have fur. A bat at night.", "Context: A pond."]
    assert [q.tags for q in shown] == [q.tags for q in plain]  # a model's words make no text context


def test_captions_that_are_not_there_are_missed(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"there is no .*captions\.json: add it, or leave captions out of the context"):
        open_questions(science_qa(tmp_path), captions=True)
    with pytest.raises(TaskError, match=r"captions join the context of ScienceQA only, and .* has no problems\.json"):
        open_questions(write_rows(tmp_path / "a.jsonl", {}), captions=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "problem 1 has answer 2, but 2 choices, counted from 0"),
        ({"answer": -1}, "problem 1 has answer -1, but 2 choices"),
        ({"answer": "B"}, "problem 1 has answer 'B': it must be an integer"),
        ({"choices": "frog"}, "problem 1 has choices 'frog': it must be a list"),
        ({"question": None}, "problem 1 has question None: it must be a string"),
        ({"hint": 3}, "problem 1 has hint 3: it must be a string"),
        ({"subject": "art"}, "problem 1 has subject 'art' and grade 'grade6': a subject is one of natural science"),
        ({"grade": "K"}, "problem 1 has subject 'natural science' and grade 'K'"),
    ],
)
def test_damaged_problem_is_named(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=rf"problems\.json, {message}"):
        open_questions(science_qa(tmp_path, **{"1": change}))


def test_damaged_lists_of_science_qa_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"pid_splits\.json has '7' in train, which .*problems\.json does not have"):
        open_questions(science_qa(tmp_path, {"train": ["1", "7"]}))
    (tmp_path / "pid_splits.json").write_text("{")
    with pytest.raises(TaskError, match=r"pid_splits\.json cannot be read as JSON: "):
        open_questions(tmp_path)
    write_json(tmp_path / "pid_splits.json", ["1"])
    with pytest.raises(TaskError, match=r"pid_splits\.json holds list, where an object \{\.\.\.\} was looked for"):
        open_questions(tmp_path)
    science_qa(tmp_path)
    (tmp_path / "images/train/1/image.png").unlink()
    with pytest.raises(TaskError, match=r"there is no image .*/1/image\.png, and 1 of 1 images are missing"):
        open_questions(tmp_path)


# ---- VQAv2

ASKED = "v2_OpenEnded_mscoco_{}_questions.json"
ANSWERED = "v2_mscoco_{}_annotations.json"


def vqa_part(root: Path, subset: str, *images: int, answers: tuple[str, ...] | None = ("yes",) * 10) -> Path:
    """Questions 100, 101, ... on images, and their answers, if any, as VQAv2 writes them."""
    asked = [
        {"image_id": image, "question": f"is it {image}?", "question_id": 100 + i} for i, image in enumerate(images)
    ]
    write_json(root / ASKED.format(subset), {"questions": asked, "license": {}})
    if answers is not None:
        given = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers)]
        rows = [{"question_id": row["question_id"], "answers": given, "answer_type": "yes/no"} for row in asked]
        write_json(root / ANSWERED.format(subset), {"annotations": rows[::-1]})
    return root


@pytest.mark.parametrize("place", ["{subset}", "images/{subset}", "images"])
def test_vqa_reads_questions_answers_and_images_of_each_subset(place: str, tmp_path: Path) -> None:
    vqa_part(tmp_path, "train2014", 9, 25, 9, answers=("yes",) * 6 + ("no",) * 4)
    vqa_part(tmp_path, "val2014", 42)
    for subset, images in (("train2014", (9, 25)), ("val2014", (42,))):
        folder = tmp_path / place.format(subset=subset)
        write_images(*(folder / f"COCO_{subset}_{image:012d}.jpg" for image in images))
    task = open_questions(tmp_path)
    assert (task.metric, len(task.images)) == ("vqa", 3)
    assert [len(part) for part in parts(task)] == [3, 1, 0]
    first, second, third = task.train or ()
    assert first == Question("is it 9?", ("yes",) * 6 + ("no",) * 4, (0,), (), "100", ("yes/no",))
    assert (third.images, third.target) == ((0,), "yes")
    assert file_names(task, second) == ["COCO_train2014_000000000025.jpg"]


def test_vqa_test_questions_have_no_answers_and_test_dev_is_left_out(tmp_path: Path) -> None:
    vqa_part(tmp_path, "train2014", *range(5))
    vqa_part(tmp_path, "test-dev2015", 6, answers=None)
    vqa_part(tmp_path, "test2015", 6, 7, answers=None)
    write_images(*(tmp_path / "train2014" / f"COCO_train2014_{i:012d}.jpg" for i in range(5)))
    write_images(*(tmp_path / "test2015" / f"COCO_test2015_{i:012d}.jpg" for i in (6, 7)))
    task = open_questions(tmp_path)
    assert [len(part) for part in parts(task)] == [4, 1, 2]
    assert [(q.answers, q.tags) for q in task.test or ()] == [((), ())] * 2


def test_damaged_vqa_folders_say_where(tmp_path: Path) -> None:
    vqa_part(tmp_path, "train2014", 1, 2)
    with pytest.raises(TaskError, match=r"no image .*COCO_train2014_000000000001\.jpg, and 2 of 2 images are missing"):
        open_questions(tmp_path)
    write_json(tmp_path / ANSWERED.format("train2014"), {"annotations": []})
    with pytest.raises(
        TaskError, match=r"questions\.json, question 0 has question_id 100, which .*annotations\.json do"
    ):
        open_questions(tmp_path)
    (tmp_path / ANSWERED.format("train2014")).unlink()
    write_images(*(tmp_path / "train2014" / f"COCO_train2014_{i:012d}.jpg" for i in (1, 2)))
    with pytest.raises(TaskError, match=r"the training question 'is it 1\?' .* has no answer"):
        open_questions(tmp_path)
    write_json(tmp_path / "v1_train_questions.json", {"questions": []})
    with pytest.raises(TaskError, match=r"v1_train_questions\.json and .*v2_.* are both for train: keep one of them"):
        open_questions(tmp_path)
    (tmp_path / "v1_train_questions.json").rename(tmp_path / "my_questions.json")
    with pytest.raises(
        TaskError, match=r"my_questions\.json does not say in its name whether it is train, val or test"
    ):
        open_questions(tmp_path)


# ---- captions


def caption_part(root: Path, subset: str, **captions: list[str]) -> Path:
    """Captions of images that are named by their ids, `i7` for 7."""
    images = [{"id": int(name[1:]), "file_name": f"{name}.jpg"} for name in captions]
    said = [{"image_id": int(name[1:]), "caption": text} for name, texts in captions.items() for text in texts]
    write_json(root / "annotations" / f"captions_{subset}.json", {"images": images, "annotations": said[::-1]})
    write_images(*(root / subset / f"{name}.jpg" for name in captions))
    return root


def test_captions_are_one_question_an_image_and_one_caption_a_question_in_train(tmp_path: Path) -> None:
    caption_part(tmp_path, "train2017", i3=["a dog", "a big dog"], i5=["a cat"])
    caption_part(tmp_path, "val2017", i7=["a hat", "one hat"])
    task = open_questions(tmp_path)
    assert (task.metric, len(task.images)) == ("cider", 3)
    assert {(q.text, q.answers, *file_names(task, q)) for q in task.train or ()} == {
        (CAPTION_PROMPT, ("a dog",), "i3.jpg"),
        (CAPTION_PROMPT, ("a big dog",), "i3.jpg"),
        (CAPTION_PROMPT, ("a cat",), "i5.jpg"),
    }
    (question,) = task.val or ()
    assert (question.text, set(question.answers), question.name) == (CAPTION_PROMPT, {"a hat", "one hat"}, "7")
    assert task.test is None


def test_val_captions_that_are_cut_from_train_keep_all_references(tmp_path: Path) -> None:
    caption_part(tmp_path, "train2014", **{f"i{i}": ["first", "second"] for i in range(10)})
    task = open_questions(tmp_path)
    assert [(len(part), {len(q.answers) for q in part}) for part in parts(task)] == [(16, {1}), (2, {2}), (0, set())]


def test_caption_of_an_unknown_image_is_named(tmp_path: Path) -> None:
    path = caption_part(tmp_path, "val2014", i3=["a dog"]) / "annotations/captions_val2014.json"
    write_json(path, {"images": [], "annotations": [{"image_id": 3, "caption": "a dog"}]})
    with pytest.raises(TaskError, match=r"captions_val2014\.json, annotation 0 is a caption of image 3, which is not"):
        open_questions(tmp_path)


@pytest.mark.parametrize("place", ["", "images"])
def test_karpathys_restval_is_trained_on(place: str, tmp_path: Path) -> None:
    rows = [
        {
            "filepath": "val2014",
            "filename": f"{i}.jpg",
            "split": split,
            "sentences": [{"raw": f"{split} {j}"} for j in (0, 1)],
        }
        for i, split in enumerate(("train", "restval", "val", "test"))
    ]
    write_json(tmp_path / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    write_images(*(tmp_path / place / "val2014" / f"{i}.jpg" for i in range(4)))
    task = open_questions(tmp_path)
    assert [[q.answers for q in part] for part in parts(task)] == [
        [("train 0",), ("train 1",), ("restval 0",), ("restval 1",)],
        [("val 0", "val 1")],
        [("test 0", "test 1")],
    ]
    assert [file_names(task, q) for q in task.test or ()] == [["3.jpg"]]
    write_json(tmp_path / "dataset_coco.json", {"images": [rows[0] | {"split": "dev"}]})
    with pytest.raises(
        TaskError, match=r"dataset_coco\.json, image 0 has split 'dev': it must be one of train, restval"
    ):
        open_questions(tmp_path)


# ---- what is there


def test_questions_go_before_captions_in_a_folder_that_has_both(tmp_path: Path) -> None:
    caption_part(tmp_path, "val2014", i3=["a dog"])
    vqa_part(tmp_path, "val2014", 3)
    write_images(tmp_path / "val2014/COCO_val2014_000000000003.jpg")
    assert open_questions(tmp_path).metric == "vqa"


def test_what_holds_no_questions_says_what_was_looked_for(tmp_path: Path) -> None:
    looked_for = r"looked for a file \.jsonl or \.jsonl\.gz and for a folder with problems\.json \(ScienceQA\)"
    (tmp_path / "a.csv").write_text("")
    for source in (tmp_path / "nowhere", tmp_path, tmp_path / "a.csv"):
        with pytest.raises(TaskError, match=rf"there are no questions in {source}: {looked_for}"):
            open_questions(source)


def test_images_that_are_not_where_they_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"there is no file or folder .*nowhere\.npz to take the images from"):
        open_questions(write_rows(tmp_path / "a.jsonl", {}), images=tmp_path / "nowhere.npz")
    with pytest.raises(TaskError, match=r"lie in a folder, got .*pack\.npz: a pack goes with \.jsonl rows"):
        open_questions(science_qa(tmp_path / "science"), images=write_pack(tmp_path / "pack.npz"))
