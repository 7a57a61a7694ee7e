"""How good answers are: exact match, VQA accuracy, CIDEr; and what the questions alone give away."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import TaskError
from .answer_words import caption_words, plain_answer, vqa_answer
from .question import Metric, Question

Scores = NDArray[np.float64]
References = Sequence[Sequence[str]]

# people beside the one left out who must agree with an answer for it to be right
_AGREEING = 3


def exact_match(predictions: Sequence[str], references: References) -> Scores:
    """Returns 1 for each prediction that equals one of its references, otherwise 0, `[n]`.

    Case, surplus white space and a full stop at the end do not count.

    Args:
        predictions: An answer to each question.
        references: Its right answers.

    Raises:
        TaskError: Another number of predictions than of references, or a question without any.

    Example:
        >>> exact_match(["Two.", "red"], [["two", "2"], ["blue"]]).tolist()
        [1.0, 0.0]
    """
    _check(predictions, references)
    matches = [
        plain_answer(said) in map(plain_answer, right) for said, right in zip(predictions, references, strict=True)
    ]
    return np.array(matches, np.float64)


def vqa_accuracy(predictions: Sequence[str], references: References) -> Scores:
    """Returns the VQA accuracy of each prediction `[n]`: what share of people agree with it, three being enough.

    With one person's answer left out, an answer that m of the others gave counts min(m / 3, 1); the accuracy is the
    mean over who is left out. Of ten people, one gives 0.3, two 0.6, three 0.9, four 1.

    Source: Antol et al., 2015, "VQA: Visual Question Answering", arXiv 1505.00468, section 3; Goyal et al., 2017,
    arXiv 1612.00837; the rules of the challenge, https://visualqa.org/evaluation.html.

    Differs from the challenge's program: that rewrites references less than predictions, and not at all where all
    people agree. Here both are written alike, as its rules say.

    Args:
        predictions: An answer to each question.
        references: What people answered, ten in VQAv2; at least four.

    Raises:
        TaskError: Another number of predictions than of references, or a question with less than four references.

    Example:
        >>> vqa_accuracy(["Two"], [["2"] * 3 + ["3"] * 7]).round(2).tolist()
        [0.9]
    """
    _check(predictions, references)
    return np.array([_agreement(said, right) for said, right in zip(predictions, references, strict=True)], np.float64)


def _agreement(said: str, right: Sequence[str]) -> float:
    if len(right) <= _AGREEING:
        raise TaskError(
            f"VQA accuracy leaves one answer out and asks for {_AGREEING} of the others, got {len(right)} in all: "
            f"{', '.join(right)}. Take the metric 'exact'"
        )
    said = vqa_answer(said)
    same = sum(count for answer, count in Counter(right).items() if vqa_answer(answer) == said)
    others = len(right) - same
    return (same * min((same - 1) / _AGREEING, 1) + others * min(same / _AGREEING, 1)) / len(right)


def cider(predictions: Sequence[str], references: References) -> Scores:
    """Returns the CIDEr-D of each caption `[n]`, from 0 to 10; papers print the mean times 100.

    Words are weighed by how few images' references hold them, so that a caption's score depends on all of them.

    Source: Vedantam et al., 2015, "CIDEr: Consensus-based Image Description Evaluation", arXiv 1411.5726, section 6,
    in the program of the COCO captions server, by `pycocoevalcap`; words as `caption_words` gives them.

    Args:
        predictions: A caption of each image.
        references: What people said on it, five in COCO.

    Raises:
        TaskError: `pycocoevalcap` is not installed, fewer than two images, another number of predictions than of
            references, or an image without any.
    """
    _check(predictions, references)
    if len(predictions) < 2:
        raise TaskError("CIDEr weighs words by how many images' captions hold them, so that it needs 2 images, got 1")
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise TaskError("CIDEr needs a library: pip install 'petiole[captions]'") from error
    said = {i: [caption_words(text)] for i, text in enumerate(predictions)}
    right = {i: [caption_words(text) for text in texts] for i, texts in enumerate(references)}
    return np.asarray(Cider().compute_score(right, said)[1], np.float64)


def _check(predictions: Sequence[str], references: References) -> None:
    if len(predictions) != len(references) or not predictions:
        raise TaskError(f"{len(references)} questions need as many answers and at least one, got {len(predictions)}")
    if unlabelled := [i for i, right in enumerate(references) if not right]:
        raise TaskError(
            f"question {unlabelled[0]} has no reference answer, and {len(unlabelled)} of {len(references)} have none "
            "in all: score a split whose answers are known"
        )


_METRICS: dict[Metric, Callable[[Sequence[str], References], Scores]] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "cider": cider,
}


def score(metric: Metric, predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Returns the mean score of all questions as `overall`, and that of each tag's, by name.

    Args:
        metric: `exact`, `vqa` or `cider`.
        predictions: An answer to each question.
        questions: The questions, with their references.

    Raises:
        TaskError: Another number of predictions than of questions, or what the metric asks for is missing.

    Example:
        >>> asked = [Question("how many?", ("two",), tags=("NAT",)), Question("which?", ("red",), tags=("SOC",))]
        >>> score("exact", ["two", "blue"], asked)
        {'overall': 0.5, 'NAT': 1.0, 'SOC': 0.0}
    """
    scores = _METRICS[metric](predictions, [question.answers for question in questions])
    groups: dict[str, list[float]] = {}
    for question, value in zip(questions, scores.tolist(), strict=True):
        for tag in question.tags:
            groups.setdefault(tag, []).append(value)
    return {"overall": float(scores.mean())} | {tag: float(np.mean(groups[tag])) for tag in sorted(groups)}


def majority_answers(train: Sequence[Question]) -> Callable[[Question], str]:
    """Returns who answers without looking: the most frequent training answer to the same text, else of all.

    What it scores is the floor: more must come from the images.

    Args:
        train: Training questions, with their answers.

    Raises:
        TaskError: No question, or one without an answer.

    Example:
        >>> guess = majority_answers([Question("which?", ("red",)), Question("how many?", ("2",))])
        >>> guess(Question("how many?"))
        '2'
    """
    if not train:
        raise TaskError("answers without looking are taken from training questions, and there are none")
    counts: dict[str, Counter[str]] = {}
    for question in train:
        counts.setdefault(question.text, Counter())[question.target] += 1
    answers = {text: count.most_common(1)[0][0] for text, count in counts.items()}
    overall = Counter(question.target for question in train).most_common(1)[0][0]
    return lambda question: answers.get(question.text, overall)
