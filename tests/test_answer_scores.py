"""Scores of answers against hand examples, plain loops and the words that CoreNLP's own tokenizer gives."""

import math
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from petiole.errors import TaskError
from petiole.tasks.answer_scores import cider, exact_match, majority_answers, score, vqa_accuracy
from petiole.tasks.answer_words import caption_words, vqa_answer
from petiole.tasks.question import Question
from petiole.tasks.questions import open_questions

# ---- exact match


def test_exact_match_overlooks_case_spaces_and_a_full_stop_only() -> None:
    said = ["The answer is B.", " the  answer is b", "The answer is A.", "B", "2", "two"]
    right = [["The answer is B."]] * 4 + [["2"]] * 2
    assert exact_match(said, right).tolist() == [1, 1, 0, 0, 1, 0]


def test_exact_match_takes_any_of_the_references() -> None:
    assert exact_match(["grey", "gray", "blue"], [["gray", "grey"]] * 3).tolist() == [1, 1, 0]


# ---- VQA accuracy


@pytest.mark.parametrize(
    ("text", "want"),
    [
        # the examples of the challenge's rules
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("girls", "girls"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        # each rule
        ("Two", "2"),
        ("none", "0"),
        ("twenty two", "twenty 2"),
        ("The cat", "cat"),
        ("a.m.", "am"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("up-to-date", "up to date"),
        ("well -known", "well known"),
        ("cats, dogs", "cats dogs"),
        ("cats,dogs", "cats dogs"),
        ("1,000 x-rays", "1000 xrays"),
        ("line\nbreak\ttab", "line break tab"),
        ("'ows'at", "'ow's'at"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("wont", "won't"),
        ("were", "were"),
        ("", ""),
    ],
)
def test_vqa_answers_are_written_by_the_rules_of_the_challenge(text: str, want: str) -> None:
    assert vqa_answer(text) == want


@pytest.mark.parametrize(("num_same", "want"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)])
def test_vqa_accuracy_of_ten_answers_is_the_known_table(num_same: int, want: float) -> None:
    assert vqa_accuracy(["yes"], [["yes"] * num_same + ["no"] * (10 - num_same)])[0] == pytest.approx(want)


def test_vqa_accuracy_is_the_mean_over_all_choices_of_who_is_left_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        right = rng.choice(["red", "blue", "green"], rng.integers(4, 13)).tolist()
        others = combinations(right, len(right) - 1)
        want = np.mean([min(sum(answer == "red" for answer in part) / 3, 1) for part in others])
        assert vqa_accuracy(["red"], [right])[0] == pytest.approx(want)


def test_vqa_accuracy_writes_answers_and_references_alike() -> None:
    assert vqa_accuracy(["The two."], [["2", "two", "Two", "a two"] + ["3"] * 6])[0] == pytest.approx(1)


def test_vqa_accuracy_needs_enough_people() -> None:
    with pytest.raises(TaskError, match=r"asks for 3 of the others, got 2 in all: red, blue\. Take the metric 'exact'"):
        vqa_accuracy(["red"], [["red", "blue"]])


# ---- CIDEr

# a sentence, and what the tokenizer of Stanford CoreNLP 3.4.1 with -lowerCase leaves of it without punctuation
TOKENIZED = {
    "A man's dog isn't running; the two dogs' owner can't see it.": (
        "a man 's dog is n't running the two dogs owner ca n't see it"
    ),
    'The black-and-white cat sits on a t-shirt (red) and "looks" up...': (
        "the black-and-white cat sits on a t-shirt -lrb- red -rrb- and looks up"
    ),
    "I'm sure he'll say \"we've gone\" at 3:15 p.m., 2,000 people!": (
        "i 'm sure he 'll say we 've gone at 3:15 p.m. 2,000 people"
    ),
    "A sign that reads 'STOP' near a 1/2 mile marker, cost $5.00 & 50% off.": (
        "a sign that reads stop near a 1/2 mile marker cost $ 5.00 & 50 % off"
    ),
    "a man cannot go and gonna wanna gotta lemme.": "a man can not go and gon na wan na got ta lem me",
    "U.S. flag flying at the airport. A St. Bernard runs -- fast - very.": (
        "u.s. flag flying at the airport a st. bernard runs fast very"
    ),
    "No. 5 train #12 bus 10:30 6'2\" tall 5ft. 12-inch": "no. 5 train # 12 bus 10:30 6 2 tall 5ft 12-inch",
    "no. no 5 cats": "no no 5 cats",
    "TV. tv. T.V. t.v. t.v a t.v. set": "tv tv t.v. t.v. t.v a t.v. set",
    "at o'clock with hors d'oeuvres for ma'am, po'boy": "at o'clock with hors d'oeuvres for ma'am po boy",
    "10:30am, a .5 mile and the '50s car": "10:30 am a .5 mile and the '50s car",
    "people,cars,and black/white w/o a 15,000-pound [truck]": (
        "people cars and black/white w/o a 15,000-pound -lsb- truck -rsb-"
    ),
    "the man(left) jalapeño crème couldn't've": "the man -lrb- left -rrb- jalapeño crème could n't 've",
}


@pytest.mark.parametrize(("text", "want"), TOKENIZED.items())
def test_captions_are_cut_into_words_as_the_official_tokenizer_cuts_them(text: str, want: str) -> None:
    assert caption_words(text) == want


@pytest.fixture
def _needs_cider() -> None:
    pytest.importorskip("pycocoevalcap")


needs_cider = pytest.mark.usefixtures("_needs_cider")


def weights(text: str, n: int, right: list[list[str]]) -> dict[tuple[str, ...], float]:
    """The weighed n-grams of a text: how often each is in it, times the log of how rare it is among the images."""
    words = text.split()
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def is_in(gram: tuple[str, ...], texts: list[str]) -> bool:
        return any(gram == tuple(t.split()[i : i + n]) for t in texts for i in range(len(t.split())))

    return {
        gram: count * math.log(len(right) / max(1, sum(is_in(gram, texts) for texts in right)))
        for gram, count in counts.items()
    }


def cider_d(said: str, of: list[str], right: list[list[str]]) -> float:
    """Equations 2 to 4 of the paper, and those of CIDEr-D."""
    total = 0.0
    for n in range(1, 5):
        a = weights(said, n, right)
        for reference in of:
            b = weights(reference, n, right)
            lengths = math.hypot(*a.values()) * math.hypot(*b.values())
            product = sum(min(value, b.get(gram, 0)) * b.get(gram, 0) for gram, value in a.items())
            penalty = math.exp(-((len(said.split()) - len(reference.split())) ** 2) / (2 * 6.0**2))
            total += product / lengths * penalty / len(of) if lengths else 0
    return 10 * total / 4


@needs_cider
def test_cider_of_a_copy_is_known_by_hand() -> None:
    # "a" is in both references and weighs nothing; "cat" and "a cat" agree, and there are no longer n-grams: 2 of 4
    assert cider(["A cat.", "a dog"], [["a cat"], ["a dog"]]).tolist() == pytest.approx([5, 5])
    assert cider(["a dog", "a dog"], [["a cat"], ["a dog"]]).tolist() == pytest.approx([0, 5])


@needs_cider
def test_cider_equals_the_papers_equations() -> None:
    rng = np.random.default_rng(0)
    vocabulary = ["a", "the", "cat", "dog", "runs", "sits", "red", "on"]

    def sentence() -> str:
        return " ".join(rng.choice(vocabulary, rng.integers(3, 12)))

    right = [[sentence() for _ in range(rng.integers(1, 4))] for _ in range(6)]
    said = [f"{texts[0]} {sentence()}" for texts in right]
    want = [cider_d(text, texts, right) for text, texts in zip(said, right, strict=True)]
    assert min(want) > 0.1
    assert cider(said, right) == pytest.approx(np.array(want))


@needs_cider
def test_cider_sees_neither_case_nor_punctuation() -> None:
    right = [["A man's dog isn't here."], ["Two cats."]]
    assert cider(["a man 's dog is n't here", "two cats"], right) == pytest.approx(cider([t[0] for t in right], right))


@needs_cider
def test_cider_of_one_image_is_refused() -> None:
    with pytest.raises(TaskError, match="so that it needs 2 images, got 1"):
        cider(["a cat"], [["a cat"]])


def test_cider_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(TaskError, match=r"CIDEr needs a library: pip install 'petiole\[captions\]'"):
        cider(["a", "b"], [["a"], ["b"]])


# ---- score


def test_score_is_the_mean_of_all_and_of_each_tag() -> None:
    tags = [("NAT", "IMG"), ("NAT", "NO"), ("SOC", "IMG"), ()]
    questions = [Question("q?", ("a",), tags=names) for names in tags]
    assert score("exact", ["a", "b", "b", "a"], questions) == {
        "overall": 0.5,
        "IMG": 0.5,
        "NAT": 0.5,
        "NO": 0,
        "SOC": 0,
    }


@needs_cider
def test_score_takes_the_metric_it_is_told() -> None:
    people = [Question("q?", ("two",) * 3 + ("three",) * 7), Question("q?", ("red",) * 10)]
    assert score("exact", ["2", "red"], people) == {"overall": 0.5}
    assert score("vqa", ["2", "red"], people) == {"overall": pytest.approx(0.95)}
    captions = [Question("q?", ("a cat",)), Question("q?", ("a dog",))]
    assert score("cider", ["a cat", "a cat"], captions) == {"overall": pytest.approx(2.5)}


def test_what_cannot_be_scored_says_why() -> None:
    questions = [Question("q?", ("a",)), Question("q?"), Question("q?")]
    with pytest.raises(TaskError, match="3 questions need as many answers and at least one, got 2"):
        score("exact", ["a", "b"], questions)
    with pytest.raises(TaskError, match="question 1 has no reference answer, and 2 of 3 have none in all"):
        score("vqa", ["a", "b", "c"], questions)
    with pytest.raises(TaskError, match="0 questions need as many answers and at least one, got 0"):
        score("exact", [], [])


# ---- answers without looking


def test_majority_answers_the_text_it_knows_and_else_what_most_say() -> None:
    asked = [
        ("which?", "red"),
        ("which?", "blue"),
        ("which?", "blue"),
        ("how many?", "2"),
        ("where?", "2"),
        ("why?", "2"),
    ]
    guess = majority_answers([Question(text, (answer,)) for text, answer in asked])
    assert [guess(Question(text)) for text in ("which?", "how many?", "when?")] == ["blue", "2", "2"]


def test_majority_of_equals_is_the_first() -> None:
    guess = majority_answers([Question("which?", (answer,)) for answer in ("b", "a", "a", "b")])
    assert guess(Question("which?")) == guess(Question("who?")) == "b"


def test_majority_of_nothing_is_refused() -> None:
    with pytest.raises(TaskError, match="are taken from training questions, and there are none"):
        majority_answers([])


@pytest.mark.parametrize(
    ("name", "images", "floor"),
    [
        ("nlvr_qa", "nlvr", 0.492),
        ("easy_vqa", "easy_vqa", 0.667),
        ("bccd_vqa", "bccd_vqa", 0.619),
        ("nlvr_statements", "nlvr", 0.560),
    ],
)
def test_floors_of_the_shared_questions_are_the_published_ones(
    name: str, images: str, floor: float, data: Path
) -> None:
    task = open_questions(data / "vqa" / f"{name}.jsonl.gz", images=data / "vqa" / f"{images}_images.npz")
    assert task.train is not None
    assert task.test is not None
    guess = majority_answers(task.train)
    assert round(score(task.metric, [guess(q) for q in task.test], task.test)["overall"], 3) == floor
