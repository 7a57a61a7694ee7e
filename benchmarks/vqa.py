"""Eyes on a real language model of 260,032 parameters: images in memory, in the input, and not at all.

    python benchmarks/vqa.py --data ../shared/data --tasks easy_vqa,nlvr_qa        # an hour of one CPU core
    python benchmarks/vqa.py --data ../shared/data --tasks bccd_vqa --seen 5793    # three epochs
    python benchmarks/vqa.py --known --out benchmarks/results/vqa.jsonl

The language model is that of `stories.py`, which learnt to tell short stories in simple English and has never met a
question; the eyes are the bundled ViT, 64 patches of width 192 from an image of 64x64. Both are frozen, so that each
image is seen once for all runs of a task. Contestants, which train about as many parameters, and their floor:

question only       no network: the most frequent training answer to the same words
MemVP               images in the memory of every feed-forward layer
input               patches in front of the text, projected as in MemVP, with LoRA on q and v; see `input_space.py`
MemVP, no images    the memory's static entries, on the questions alone

Each may choose between as many settings, with seed 0 on validation; the chosen one is trained with further seeds. A run
sees `--seen` training questions, in as many epochs as it takes, and is scored on `--asked` test questions after its
last step, drawn once and the same for all. Answers are generated and must match exactly. Nothing is selected on test.

Before that, the contestants take turns on one batch: processor time of a training step, of the pass over a prompt
(`prefill`) and of an answer of three tokens, both for one question and with LoRA merged. `peak` is what a step needs at
most beside what was there before. Bold is what misses its aim.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import petiole as pt
from input_space import InputSpace, num_trained, rank_for
from memvp import peak, rounds
from petiole.tasks import Transform
from petiole.train.job import Job, carry_out
from petiole.train.world import World
from petiole.vision_language.album import Album, Seen
from petiole.vision_language.eyes import Eyes
from petiole.vision_language.steps import AnswerSteps, Quiz
from petiole.vision_language.texts import Texts
from protocol import Journal, mean_and_spread
from stories import data_folder, language_model, tokenizer
from tokens import setting, table

FLOOR, MEMORY, INPUT, BLIND = NAMES = ("question only", "MemVP", "input", "MemVP, no images")
# task -> its pack of images
TASKS = {"easy_vqa": "easy_vqa", "nlvr_qa": "nlvr", "bccd_vqa": "bccd_vqa"}
# the stories know neither "Question:" nor "Answer:", and their tokens would be half of a prompt
TEMPLATE = "{question}"
SIZES = {"slots": 96, "hidden": 64, "dropout": 0.0}
BATCH, NUM_TOKENS, MAX_VAL, WORLD = 16, 3, 500, World("fp32")
# aims in points: over the floor, where there is much to see, and behind the input at most
OVER_FLOOR, BEHIND_INPUT, SEEING = 5.0, 1.0, ("easy_vqa", "nlvr_qa")
Settings = Mapping[str, Any]
Row = tuple[Mapping[str, Any], Mapping[str, Any]]


def memory(language: Any, d_image: int, seed: int = 0, **settings: Any) -> pt.Sighted:
    """Returns a language model with images in memory."""
    return pt.give_eyes(language, None, pt.MemVP(**SIZES, **settings), d_image=d_image, seed=seed, prove=False)


def in_input(language: Any, d_image: int, seed: int = 0, *, rank: int | None = None, **settings: Any) -> InputSpace:
    """Returns a language model with images in its input that trains as much as one with images in memory."""
    sizes = {"d_image": d_image, "hidden": SIZES["hidden"]}
    rank = rank_for(num_trained(memory(language, d_image)), language, **sizes) if rank is None else rank
    return InputSpace(language, None, **sizes, rank=rank, dropout=0.0, seed=seed, **settings)


@dataclass(frozen=True)
class Contestant:
    """A way to see.

    Args:
        make: Language model, width of the features, seed and settings -> a model with eyes.
        grid: Settings and learning rates to choose from.
        merged: Settings of a model that costs what a trained one costs once it is merged.
        is_blind: Whether the images are taken away.
    """

    make: Callable[..., Any]
    grid: Sequence[Settings]
    merged: Settings = field(default_factory=dict)
    is_blind: bool = False


RATES = (0.005, 0.01, 0.02)
_MEMORY = [{"scale": 1.0, "image_scale": 0.01, "lr": lr} for lr in RATES]
CONTESTANTS = {
    MEMORY: Contestant(memory, _MEMORY),
    INPUT: Contestant(in_input, [{"image_scale": 1.0, "lr": lr} for lr in RATES], {"rank": 0}),
    BLIND: Contestant(memory, _MEMORY, is_blind=True),
}


class Exam:
    """Questions whose images were seen, for fresh contestants.

    Args:
        task: The questions.
        language: The language model.
        words: Its tokenizer.
    """

    def __init__(self, task: pt.QuestionTask, language: Any, words: Any) -> None:
        self.task, self.language, self.words = task, language, words
        eyes = Eyes(pt.adapt(pt.backbone("micro"), prove=False))
        questions = [question for part in (task.train, task.val, task.test) for question in part]
        album = Album(task.images, questions, Transform(eyes.model.input_config), next(eyes.parameters()))
        self.look, self.width = Seen(album, eyes, WORLD), eyes.width

    def model(self, name: str, settings: Settings, seed: int = 0) -> Any:
        """Returns a fresh contestant."""
        chosen = {key: value for key, value in settings.items() if key != "lr"}
        return CONTESTANTS[name].make(self.language, self.width, seed, **chosen)

    def steps(
        self, name: str, settings: Settings, seed: int = 0, epochs: int = 10
    ) -> tuple[AnswerSteps, dict[str, Quiz]]:
        """Returns the steps of a fresh contestant, and what it is asked."""
        model, quizzes = self.model(name, settings, seed), {}
        texts = Texts(self.words, model.language_model, TEMPLATE)
        for part in ("train", "val", "test"):
            questions = getattr(self.task, part)
            if CONTESTANTS[name].is_blind:
                questions = [replace(question, images=()) for question in questions]
            exchanges = texts.exchanges([q.text for q in questions], [q.target for q in questions])
            quizzes[part] = Quiz(questions, exchanges, self.look)
        recipe = pt.Recipe(
            epochs=epochs, batch_size=BATCH, lr=settings["lr"], weight_decay=0.02, seed=seed, select="last",
            eval_every=epochs, precision="fp32",
        )  # fmt: skip
        return AnswerSteps(model, texts, quizzes.pop("train"), self.task.metric, recipe, WORLD), quizzes


def open_all(data: Path, name: str) -> pt.QuestionTask:
    """Returns all questions of a task."""
    return pt.open_questions(data / "vqa" / f"{name}.jsonl.gz", images=data / "vqa" / f"{TASKS[name]}_images.npz")


def draw(questions: Sequence[pt.Question], count: int) -> tuple[pt.Question, ...]:
    """Returns so many of the questions, always the same ones, in their order."""
    return tuple(questions[i] for i in sorted(np.random.default_rng(0).permutation(len(questions))[:count].tolist()))


def floor(train: Iterable[pt.Question], asked: Iterable[pt.Question]) -> float:
    """Returns how often the most frequent training answer to the same words is right."""
    known: dict[str, Counter[str]] = {}
    for question in train:
        known.setdefault(question.text, Counter())[question.target] += 1
    best = {text: answers.most_common(1)[0][0] for text, answers in known.items()}
    return statistics.mean(best.get(question.text) in question.answers for question in asked)


def run_task(journal: Journal, name: str, args: argparse.Namespace) -> None:
    """Runs what the journal does not have of a task."""
    whole = open_all(args.data, name)
    val, test = draw(whole.val, min(args.asked, MAX_VAL)), draw(whole.test, args.asked)
    task = replace(whole, train=draw(whole.train, args.seen), val=val, test=test)
    about = {"phase": "run", "task": name, "batch": BATCH, "seen": args.seen, "asked": args.asked}
    if (key := {**about, "contestant": FLOOR, "settings": {}, "seed": 0}) not in journal:
        found = {"val_accuracy": floor(whole.train, val), "test_accuracy": floor(whole.train, test)}
        journal.add(key, {**found, "all": floor(whole.train, whole.test)})
    exams: list[Exam] = []

    def once(contestant: str, settings: Settings, seed: int) -> float:
        """Returns the validation accuracy of one run, from the journal where it is there."""
        key = {**about, "contestant": contestant, "settings": settings, "seed": seed}
        if key not in journal:
            if not exams:
                exams.append(Exam(task, language_model(args.data), tokenizer(args.data)))
            steps, asked = exams[0].steps(contestant, settings, seed, max(1, round(args.seen / len(task.train))))
            job = partial(Job, steps, asked, save_every=60.0)
            result = carry_out(lambda run, state: job(run=run, state=state), {}, WORLD, None, "", is_shown=False)
            found = {f"{part}_accuracy": result.metrics[f"last_{part}_accuracy"] for part in asked}
            journal.add(key, {**found, "loss": result.history[-1]["loss"], "trained": num_trained(steps.model)})
        scores = "".join(f"{100 * journal[key][f'{part}_accuracy']:7.1f}" for part in ("val", "test"))
        print(f"{name:10}{contestant:18}seed {seed}{scores}   {settings}", flush=True)
        return journal[key]["val_accuracy"]

    for contestant in args.contestants:
        best = max(CONTESTANTS[contestant].grid, key=lambda settings: once(contestant, settings, 0))
        for seed in range(1, args.seeds):
            once(contestant, best, seed)


def run_costs(journal: Journal, args: argparse.Namespace) -> None:
    """Adds what each contestant costs on one batch: memory first, for a process that has trained cannot be forked."""
    name = next(iter(TASKS))
    about = {**setting(args), "phase": "cost", "task": name, "batch": BATCH}
    keys = {contestant: {**about, "contestant": contestant} for contestant in args.contestants}
    if all(key in journal for key in keys.values()):
        return
    whole = open_all(args.data, name)
    batch = draw(whole.train, BATCH)
    exam = Exam(replace(whole, train=batch, val=batch, test=batch), language_model(args.data), tokenizer(args.data))
    first = {contestant: CONTESTANTS[contestant].grid[0] for contestant in keys}
    peaks = {c: peak(lambda c=c: partial(exam.steps(c, first[c])[0].take, 0), "cpu") for c in keys}
    learners = {contestant: exam.steps(contestant, first[contestant])[0] for contestant in keys}
    runs: dict[str, dict[str, Callable[[], object]]] = {"step": {c: partial(s.take, 0) for c, s in learners.items()}}
    for contestant, steps in learners.items():
        model = exam.model(contestant, {**first[contestant], **CONTESTANTS[contestant].merged}).eval()
        prompt = steps.train.exchanges[0].prompt
        given = {**exam.look.of(steps.train.questions[:1]), **steps.texts.to_answer([prompt])}
        length = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
        runs.setdefault("prefill", {})[contestant] = partial(model, **given, use_cache=True, logits_to_keep=1)
        runs.setdefault("answer", {})[contestant] = partial(model.generate, **given, **length)
    times = {"step": rounds(runs["step"], args)}
    with torch.inference_mode():
        times |= {phase: rounds(runs[phase], args) for phase in ("prefill", "answer")}
    for contestant, steps in learners.items():
        found = {"trained": num_trained(steps.model), "peak": peaks[contestant], "rounds": args.rounds}
        for phase, own in times.items():
            over = [a / b for a, b in zip(own[contestant], own[MEMORY], strict=True)]
            found |= {phase: statistics.median(own[contestant]), f"{phase}_over": statistics.median(over)}
        journal.add(keys[contestant], found)


def tables(rows: Iterable[Row]) -> Iterator[str]:
    """Yields a table in Markdown of each setting that costs were measured in, and one of each task."""
    groups: dict[str, list[Row]] = {}
    for run, found in rows:
        about = {key: value for key, value in run.items() if key not in ("contestant", "settings", "seed")}
        groups.setdefault(", ".join(f"{key} {value}" for key, value in about.items()), []).append((run, found))
    for about, group in groups.items():
        yield f"{about}\n\n{(costs if group[0][0]['phase'] == 'cost' else accuracies)(group)}"


def costs(rows: Sequence[Row]) -> str:
    """Returns the table of what contestants cost."""
    head = f"|trained|step [ms]|x {MEMORY}|peak [MiB]|prefill [ms]|x {MEMORY}|answer [ms]|x {MEMORY}"
    lines = []
    for run, found in rows:
        step, prefill, answer = (
            (f"{1e3 * found[phase]:.1f}", f"{found[f'{phase}_over']:.2f}") for phase in ("step", "prefill", "answer")
        )
        size = f"{found['peak'] / 2**20:.0f}"
        lines.append([run["contestant"], f"{found['trained']:,}", *step, size, *prefill, *answer])
    return table(head.split("|"), lines)


def accuracies(rows: Sequence[Row]) -> str:
    """Returns the table of a task, each contestant with the setting that was best on validation with seed 0."""
    tests, lines, aims = {}, [], {}
    for name in (name for name in NAMES if any(run["contestant"] == name for run, _ in rows)):
        own = [(run, found) for run, found in rows if run["contestant"] == name]
        best, won = max((row for row in own if row[0]["seed"] == 0), key=lambda row: row[1]["val_accuracy"])
        tests[name] = [found["test_accuracy"] for run, found in own if run["settings"] == best["settings"]]
        chosen = ", ".join(f"{key} {value:g}" for key, value in best["settings"].items())
        lines.append([name, chosen, f"{100 * won['val_accuracy']:.1f}", mean_and_spread(tests[name])])
        aims[name] = {FLOOR: OVER_FLOOR if best["task"] in SEEING else -100.0, INPUT: -BEHIND_INPUT}.get(name, -100.0)
    words = [table(["", "chosen", "validation", "test"], lines)]
    if MEMORY in tests:
        ahead = {c: 100 * (statistics.mean(tests[MEMORY]) - statistics.mean(tests[c])) for c in tests if c != MEMORY}
        marks = {name: "**" * (points < aims[name]) for name, points in ahead.items()}
        parts = [f"{marks[name]}{points:+.1f}{marks[name]} over {name}" for name, points in ahead.items()]
        words.append(f"{MEMORY} in points: {'; '.join(parts)}.")
    whole = [f"On all test questions, {FLOOR}: {100 * found['all']:.1f}." for _, found in rows if "all" in found]
    return "\n\n".join([*words, *whole])


def options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data_folder(), help="holds vqa/ and weights/ [$PETIOLE_DATA]")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=",".join(TASKS))
    parser.add_argument("--contestants", type=lambda text: text.split(";"), default=";".join(CONTESTANTS))
    parser.add_argument("--seen", type=int, default=9600, help="training questions that a run sees")
    parser.add_argument("--asked", type=int, default=1500, help="test questions; of validation, at most 500 of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="least time of a turn [s]")
    parser.add_argument("--out", type=Path, default=Path("runs/vqa.jsonl"))
    parser.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    parser.set_defaults(device="cpu", dtype="fp32", threads=1, compile="off")
    return parser.parse_args()


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    journal = Journal(args.out)
    if not args.known:
        run_costs(journal, args)
        for name in args.tasks:
            run_task(journal, name, args)
    print("\n\n".join(tables(journal.runs())))


if __name__ == "__main__":
    main()
