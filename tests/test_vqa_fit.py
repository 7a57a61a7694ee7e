"""Learning to answer: what is learnt, that answers of a batch are those of one by one, and that a run goes on."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

import petiole as pt
from asking import (
    BEGIN,
    END,
    FAMILIES,
    MIXED,
    PAD,
    VOCABULARY,
    answer,
    fit_answers,
    make_images,
    make_language_model,
    make_model,
    make_questions,
    make_task,
    make_tokenizer,
    shown,
    taught,
)
from fitting import vit
from petiole.tasks import Transform
from petiole.train.world import World
from petiole.vision_language import learning
from petiole.vision_language import steps as steps_file
from petiole.vision_language.album import Album, Seen
from petiole.vision_language.answering import look_at
from petiole.vision_language.eyes import Eyes
from petiole.vision_language.steps import AnswerSteps, Quiz
from petiole.vision_language.texts import IGNORED, TEMPLATE, Texts
from test_distributed import launch, torchrun

pytest.importorskip("transformers")

every_family = pytest.mark.parametrize("name", FAMILIES)
RECIPE = pt.Recipe(epochs=3, batch_size=5, lr=1e-2, weight_decay=0.02, warmup_epochs=1)
WORLD = World("fp32")


def words(text: str) -> list[int]:
    """The tokens of words that a space parts, by hand."""
    return [VOCABULARY[word] for word in text.split()]


def texts_of(name: str, tokenizer: Any = None, template: str = TEMPLATE) -> Texts:
    return Texts(make_tokenizer(name) if tokenizer is None else tokenizer, make_language_model(name), template)


def quiz_of(model: pt.Sighted, texts: Texts, questions: Any, images: Any) -> Quiz:
    exchanges = texts.exchanges([q.text for q in questions], [q.target for q in questions])
    return Quiz(questions, exchanges, look_at(model, images, questions, WORLD))


def steps_of(name: str, questions: Any = MIXED, recipe: pt.Recipe = RECIPE, **settings: Any) -> AnswerSteps:
    model = shown(make_model(name, slots=12, dropout=0.0, **settings))
    texts = Texts(make_tokenizer(name), model.language_model, TEMPLATE)
    steps = AnswerSteps(model, texts, quiz_of(model, texts, questions, make_images(6)), "exact", recipe, WORLD)
    model.eval()
    return steps


def pixels(model: pt.Sighted, question: pt.Question) -> Tensor | None:
    """The images of a question `[1, I, 3, H, W]`, prepared here."""
    transform, images = Transform(model.eyes.model.input_config), make_images(6)
    rows = [transform.normalize(transform.pixels(images[i])[None]) for i in question.images]
    return torch.cat(rows)[None] if rows else None


# texts


def test_decoder_goes_on_where_the_filled_template_ends() -> None:
    (exchange,) = texts_of("llama").exchanges(["which colour ?"], ["the red"])
    assert exchange.prompt == [BEGIN, *words("Question : which colour ? Answer :")]
    assert exchange.answer == [*words("the red"), END]


@pytest.mark.parametrize(("name", "begin"), [("bart", [BEGIN]), ("t5", [])])
def test_encoder_reads_the_prompt_and_its_decoder_answers(name: str, begin: list[int]) -> None:
    (exchange,) = texts_of(name, template="{question}").exchanges(["which colour ?"], ["red"])
    assert exchange.prompt == [*begin, *words("which colour ?"), END]
    assert exchange.answer == [*begin, *words("red"), END]


def test_a_decoders_prompt_has_no_end_where_its_tokenizer_ends_texts() -> None:
    tokenizer = make_tokenizer(around="<s> $A </s>")
    (exchange,) = texts_of("llama", tokenizer, "{question}").exchanges(["which colour ?"], ["red"])
    assert (exchange.prompt, exchange.answer) == ([BEGIN, *words("which colour ?")], [*words("red"), END])


def test_answer_that_shares_a_token_with_its_prompt_gets_tokens_of_its_own() -> None:
    import tokenizers

    tokenizer = make_tokenizer()
    model = tokenizers.models.WordLevel({"<unk>": 0, "the first": 1, "the first red": 2, " red": 3}, unk_token="<unk>")
    tokenizer.backend_tokenizer.model = model
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("|", "removed")
    (exchange,) = texts_of("llama", tokenizer, "{question}").exchanges(["the first"], ["red"])
    assert (exchange.prompt, exchange.answer) == ([BEGIN, 1], [3, END])


@pytest.mark.parametrize(("template", "text"), [("{question}\n", "the\nred"), ("{question} :", "the : red")])
def test_answer_stands_behind_one_space_or_what_the_template_ends_with(template: str, text: str) -> None:
    asked: list[str] = []

    class Listening:
        eos_token_id, pad_token_id, batch_decode = END, PAD, None

        def __len__(self) -> int:
            return len(VOCABULARY)

        def __call__(self, texts: Any, **settings: Any) -> Any:
            asked.extend(texts)
            return make_tokenizer()(texts, **settings)

    texts_of("llama", Listening(), template).exchanges(["the"], ["red"])
    assert asked[-1] == text


def test_braces_in_questions_and_templates_mean_nothing() -> None:
    found = texts_of("llama", None, "{the} {question}").exchanges(["{colour}"], ["{red}"])
    plain = texts_of("llama", None, "{the} {question}").prompts(["{colour}"], 1)
    assert found[0].prompt == plain[0]


def test_padding_is_on_the_right_to_learn_and_a_decoders_on_the_left_to_answer() -> None:
    for name, is_left in (("llama", True), ("t5", False)):
        texts = texts_of(name, None, "{question}")
        prompts = texts.prompts(["the", "the red square"], 2)
        arguments = texts.to_answer(prompts)
        short, padding = prompts[0], [PAD] * 2
        assert arguments["input_ids"][0].tolist() == ([*padding, *short] if is_left else [*short, *padding])
        assert arguments["attention_mask"][0].tolist() == ([0, 0, 1, 1] if is_left else [1, 1, 0, 0])
        learnt, _ = texts.to_learn(texts.exchanges(["the", "the red square"], ["red", "red"]))
        assert learnt["attention_mask"][0].tolist()[-2:] == [0, 0]


@pytest.mark.parametrize("setting", [{}, {"pad_token": None}])
def test_tokenizer_stays_as_it_is(setting: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(**setting)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.pad_token, len(tokenizer)
    fit_answers(make_model(), tokenizer, make_task(), pt.Recipe(epochs=1), progress=False)
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.pad_token, len(tokenizer)) == before


def test_without_padding_a_text_is_padded_by_its_end_and_answered_alike() -> None:
    model, task = shown(make_model()), make_task()
    padded = answer(model, make_tokenizer(), task.train, task.images, max_new_tokens=4)
    assert answer(model, make_tokenizer(pad_token=None), task.train, task.images, max_new_tokens=4) == padded


@pytest.mark.parametrize(
    ("name", "settings", "template", "message"),
    [
        ("llama", {}, "Question:", r"the template 'Question:' has no place for the question: write \{question\}"),
        ("llama", {"eos_token": None}, TEMPLATE, "the tokenizer has no token that ends a text"),
        ("llama", {"additional_special_tokens": ["<x>"]}, TEMPLATE, "has 20 tokens, the language model 19: it is"),
    ],
)
def test_tokenizer_and_template_that_do_not_fit_are_named(
    name: str, settings: dict[str, Any], template: str, message: str
) -> None:
    with pytest.raises(pt.PluginError, match=message):
        texts_of(name, make_tokenizer(**settings), template)


@pytest.mark.parametrize(("name", "fits", "special", "num_new"), [("llama", 36, 1, 3), ("bart", 38, 2, 4)])
def test_question_that_is_too_long_is_named_not_cut(name: str, fits: int, special: int, num_new: int) -> None:
    # 40 positions: a decoder's are shared with the answer, an encoder's are not
    texts = texts_of(name, None, "{question}")
    assert len(texts.exchanges(["the " * fits], ["red square"])[0].prompt) == fits + special
    message = f"has {fits + special + 1} tokens and its answer up to {num_new}, the language model has 40 positions"
    with pytest.raises(pt.TaskError, match=message):
        texts.exchanges(["the " * (fits + 1)], ["red square"])
    with pytest.raises(pt.TaskError, match=r"question 'the the .*\.\.\.' has"):
        texts.prompts(["the " * (fits + 1)], 3)


# the loss


@every_family
def test_loss_is_the_plain_loops_over_the_tokens_of_each_answer(name: str) -> None:
    steps = steps_of(name)
    model, texts = steps.model, steps.texts
    expected, num_tokens = 0.0, 0
    for question in MIXED:
        (exchange,) = texts.exchanges([question.text], [question.target])
        for i, token in enumerate(exchange.answer):
            # alone, without padding, from scratch for each token
            if name == "llama":
                arguments = {"input_ids": torch.tensor([[*exchange.prompt, *exchange.answer[:i]]])}
            else:
                said = torch.tensor([[model.language_model.config.decoder_start_token_id, *exchange.answer[:i]]])
                arguments = {"input_ids": torch.tensor([exchange.prompt]), "decoder_input_ids": said}
            logits = model(pixels(model, question), **arguments).logits[0, -1].detach()
            expected -= float(logits.log_softmax(0)[token])
            num_tokens += 1
    assert steps.total_loss([0, 1, 2]).item() == pytest.approx(expected, rel=1e-5)
    assert steps.loss([0, 1, 2], 0).item() == pytest.approx(expected / num_tokens, rel=1e-5)


@every_family
def test_loss_is_transformers_own_where_labels_say_what_counts(name: str) -> None:
    steps = steps_of(name)
    total, num_tokens = 0.0, 0
    for question, exchange in zip(MIXED, steps.train.exchanges, strict=True):
        if name == "llama":
            labels = torch.tensor([[*[IGNORED] * len(exchange.prompt), *exchange.answer]])
            arguments = {"input_ids": torch.tensor([[*exchange.prompt, *exchange.answer]])}
        else:
            labels, arguments = torch.tensor([exchange.answer]), {"input_ids": torch.tensor([exchange.prompt])}
        loss = steps.model(pixels(steps.model, question), **arguments, labels=labels).loss
        total += loss.item() * len(exchange.answer)
        num_tokens += len(exchange.answer)
    assert steps.loss([0, 1, 2], 0).item() == pytest.approx(total / num_tokens, rel=1e-5)


def test_label_smoothing_is_cross_entropys() -> None:
    plain, smooth = (steps_of("t5", recipe=pt.Recipe(label_smoothing=share)) for share in (0.0, 0.2))
    (exchange,) = plain.train.exchanges[1:2]
    said = torch.tensor([[plain.texts.start, *exchange.answer[:-1]]])
    arguments = {"input_ids": torch.tensor([exchange.prompt]), "decoder_input_ids": said}
    log_p = plain.model(pixels(plain.model, MIXED[1]), **arguments).logits[0].log_softmax(-1)
    chosen = -log_p[torch.arange(len(log_p)), torch.tensor(exchange.answer)].sum()
    expected = 0.8 * chosen - 0.2 * log_p.mean(-1).sum()
    torch.testing.assert_close(smooth.total_loss([1]), expected)


@pytest.mark.parametrize("batch", [[0, 1, 2], [1, 2], [2]])
def test_processes_share_a_batch_without_changing_its_loss(batch: list[int]) -> None:
    steps = steps_of("llama")
    whole = steps.loss(batch, 0)
    shares = []
    for rank in range(2):
        steps.world = World("fp32")
        steps.world.rank, steps.world.size = rank, 2
        shares.append(steps.loss(batch, 0))
    # their gradients are averaged
    torch.testing.assert_close(sum(shares) / 2, whole)


def test_biases_and_gains_do_not_decay() -> None:
    eyes = pt.adapt(vit(), pt.BitFit(), prove=False)
    steps = steps_of("llama", eyes=eyes)
    decaying, others = (group["params"] for group in steps.raw.param_groups)
    assert [group["weight_decay"] for group in steps.raw.param_groups] == [0.02, 0.0]
    assert steps.raw.param_groups[0]["betas"] == (0.9, 0.95)
    own = list(steps.model.plugin.parameters())
    assert {id(p) for p in decaying} == {id(p) for p in own if p.ndim > 1}
    assert len(others) == sum(p.ndim < 2 for p in own) + sum(p.requires_grad for p in eyes.parameters())


# images


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images eyes see at a time, from now on."""
    seen: list[int] = []
    see = Eyes.forward
    monkeypatch.setattr(Eyes, "forward", lambda self, images: seen.append(len(images)) or see(self, images))
    return seen


@pytest.mark.parametrize("num_kept", [0, 1, 2, 3])
def test_features_are_the_eyes_of_each_image_whatever_fits_into_memory(num_kept: int) -> None:
    model = make_model(slots=12)
    like = next(model.eyes.parameters())
    album = Album(make_images(6), MIXED, Transform(model.eyes.model.input_config), like, limit_mib=0)
    size = 4 * model.eyes.num_features * model.eyes.width / 2**20
    seen = Seen(album, model.eyes, WORLD, limit_mib=num_kept * size)
    assert len(seen.kept) == num_kept
    found = seen.of(MIXED)
    assert found["indicator"].tolist() == [[1, 1], [1, 0], [0, 0]]
    for row, question in enumerate(MIXED):
        for i in range(len(question.images)):
            alone = model.eyes(pixels(model, question)[0, i : i + 1])[0]
            features = found["features"][row].unflatten(0, (2, -1))[i]
            torch.testing.assert_close(features, alone)
    assert seen.of(MIXED[2:]) == {}


def test_pixels_for_trained_eyes_give_what_features_give() -> None:
    model = shown(make_model(slots=12)).eval()
    transform, like = Transform(model.eyes.model.input_config), next(model.eyes.parameters())
    album = Album(make_images(6), MIXED, transform, like)
    ids = torch.tensor([words("the colour ?")] * 3)
    by_pixels = model(**album.of(MIXED), input_ids=ids).logits
    by_features = model(**Seen(album, model.eyes, WORLD).of(MIXED), input_ids=ids).logits
    torch.testing.assert_close(by_pixels, by_features)
    assert not torch.allclose(by_pixels[0], by_pixels[1])


def test_each_image_is_seen_once_a_run_where_the_eyes_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen = watch(monkeypatch)
    fit_answers(model, make_tokenizer(), make_task(), RECIPE, progress=False)
    assert sum(seen) == 12 + 6 + 6


def test_each_image_is_seen_once_however_many_questions_are_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen = watch(monkeypatch)
    answer(model, make_tokenizer(), ["the colour ?"] * 9, [make_images(1)[0]], batch_size=2, max_new_tokens=2)
    assert seen == [1]


# answers


@every_family
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_of_a_batch_are_those_of_one_by_one(name: str, num_beams: int) -> None:
    model, tokenizer = shown(make_model(name, slots=12)), make_tokenizer(name)
    questions, images = (*MIXED, *make_questions(range(6))), make_images(6)
    settings = {"max_new_tokens": 5, "num_beams": num_beams}
    together = answer(model, tokenizer, questions, images, batch_size=4, **settings)
    assert together == [answer(model, tokenizer, [q], images, **settings)[0] for q in questions]
    # else they would show nothing
    assert len(set(together)) > 2


@every_family
def test_answer_is_what_generate_says_by_hand(name: str) -> None:
    model, tokenizer = shown(make_model(name, slots=12)), make_tokenizer(name)
    ids = torch.tensor([texts_of(name).prompts([MIXED[0].text], 5)[0]])
    tokens = model.eval().generate(
        pixels(model, MIXED[0]), input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=END
    )
    said = tokens[0, ids.shape[1] :] if name == "llama" else tokens[0, 1:]
    expected = tokenizer.decode(said, skip_special_tokens=True)
    assert answer(model, tokenizer, MIXED[:1], make_images(6), max_new_tokens=5) == [expected]


def test_texts_are_about_the_image_at_their_place_or_all_about_one() -> None:
    model, tokenizer, images = shown(make_model()), make_tokenizer(), make_images(3)
    pictures = [images[i] for i in range(3)]
    settings = {"max_new_tokens": 3}
    asked = [pt.Question("the colour ?", images=(i,)) for i in range(3)]
    expected = answer(model, tokenizer, asked, images, **settings)
    assert answer(model, tokenizer, ["the colour ?"] * 3, pictures, **settings) == expected
    assert answer(model, tokenizer, ["the colour ?"] * 2, pictures[:1], **settings) == expected[:1] * 2
    blind = answer(model, tokenizer, ["the colour ?"], **settings)
    assert blind == answer(model, tokenizer, [pt.Question("the colour ?")], images, **settings)
    assert answer(model, tokenizer, [], pictures) == []


def test_answering_tells_how_far_it_is_and_leaves_the_mode() -> None:
    model, done = make_model().train(), []
    answer(model, make_tokenizer(), ["the ?"] * 5, max_new_tokens=2, batch_size=2, progress=done.append)
    assert done == [2, 4, 5]
    assert model.training
    assert model.plugin.training


@pytest.mark.parametrize(
    ("questions", "num_images", "error", "message"),
    [
        (["the ?"] * 3, 2, pt.TaskError, "3 texts and 2 images: give each text its own image, or one to all"),
        ([pt.Question("the ?", images=(2,))], 2, pt.TaskError, "question 'the [?]' is about image 2; there are 2"),
        ([pt.Question("the ?", images=(0, 1, 0))], 2, pt.PluginError, "12 image features do not fit into 8 slots"),
    ],
)
def test_images_that_do_not_fit_the_questions_are_named(
    questions: Any, num_images: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        answer(make_model(), make_tokenizer(), questions, make_images(num_images))


def test_images_without_eyes_are_refused_and_text_alone_is_answered() -> None:
    model = pt.give_eyes(make_language_model(), None, pt.MemVP(slots=4), d_image=6, prove=False)
    with pytest.raises(pt.PluginError, match="the questions have images and the model has no eyes"):
        answer(model, make_tokenizer(), ["the ?"], make_images(1))
    assert len(answer(model, make_tokenizer(), ["the ?"], max_new_tokens=2)) == 1


def test_what_does_not_fit_into_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pt.Sighted, "generate", full)
    with pytest.raises(pt.FitError, match="2 questions do not fit into memory at once: lower batch_size"):
        answer(make_model(), make_tokenizer(), ["the ?"] * 2, max_new_tokens=2)


# fit


@every_family
def test_tiny_model_learns_to_see(name: str) -> None:
    memory = pt.MemVP(slots=8, hidden=16, scale=1.0, image_scale=1.0, dropout=0.0)
    model = pt.give_eyes(taught(name), vit(), memory, prove=False)
    tokenizer, task = make_tokenizer(name), make_task(24, 6, 6)
    recipe = pt.Recipe(epochs=12, batch_size=6, lr=1e-2, warmup_epochs=2, eval_every=6)
    result = fit_answers(model, tokenizer, task, recipe, progress=False)
    assert result.metrics["val_accuracy"] == result.metrics["test_accuracy"] == 1.0
    said = answer(model, tokenizer, task.test, task.images, max_new_tokens=3)
    assert said == [question.target for question in task.test]
    # without looking, it has one answer to each of the two texts
    blind = [replace(question, images=()) for question in task.test]
    assert len(set(answer(model, tokenizer, blind, max_new_tokens=3))) <= 2


def weights(model: pt.Sighted) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.task_state().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("has_adapters", [False, True])
def test_nothing_frozen_changes(has_adapters: bool) -> None:
    host, language_model = vit(), make_language_model()
    eyes = pt.adapt(host, *([pt.LoRA(rank=2)] if has_adapters else []), prove=False)
    model = pt.give_eyes(language_model, eyes, pt.MemVP(slots=8), prove=False)
    before = [{k: t.clone() for k, t in m.state_dict().items()} for m in (host, language_model)]
    fresh = weights(model)
    result = fit_answers(model, make_tokenizer(), make_task(), RECIPE, progress=False)
    for m, state in zip((host, language_model), before, strict=True):
        assert equal(dict(m.state_dict()), state)
    moved = {name for name, t in model.task_state().items() if not torch.equal(t, fresh[name])}
    assert moved == {name for name, _ in model.trained()}
    assert result.metrics["trained_parameters"] == sum(p.numel() for _, p in model.trained())
    assert any(name.startswith("eyes.") for name in moved) == has_adapters
    assert not model.training


FILES = ("plugin.safetensors", "metrics.jsonl", "config.yaml")


def start(out: Path, make: Callable[[], pt.Sighted] = make_model, **settings: Any) -> pt.FitResult:
    """Starts a run afresh in all but its folder, as the same command does."""
    return fit_answers(make(), make_tokenizer(), make_task(), RECIPE, out=out, progress=False, **settings)


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def make_adapted() -> pt.Sighted:
    return make_model("t5", pt.adapt(vit(), pt.LoRA(rank=2, dropout=0.2), prove=False))


class Killed(BaseException):
    """Stands in for the end of the process: nothing catches it."""


@pytest.mark.parametrize("make", [make_model, make_adapted])
@pytest.mark.parametrize(("step", "save_every"), [(1, 0.0), (4, 0.0), (8, 0.0), (8, 1e9)])
def test_run_that_dies_goes_on_to_the_same_bytes(
    make: Callable[[], pt.Sighted], step: int, save_every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "whole", make)
    take = AnswerSteps.take

    def die(self: AnswerSteps, number: int) -> tuple[float, int]:
        if number == step:
            raise Killed
        return take(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerSteps, "take", die)
        with pytest.raises(Killed):
            start(tmp_path / "killed", make, save_every=save_every)
    taken: list[int] = []
    monkeypatch.setattr(AnswerSteps, "take", lambda self, number: taken.append(number) or take(self, number))
    start(tmp_path / "killed", make)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert taken == list(range(step if save_every == 0 else 0, 9))


def test_ctrl_c_saves_the_state_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("somebody else handles Ctrl-C here")
    take = AnswerSteps.take

    def interrupt(self: AnswerSteps, number: int) -> tuple[float, int]:
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return take(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerSteps, "take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, save_every=1e9)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 4


def test_finished_run_returns_its_result_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, before = start(tmp_path), contents(tmp_path)
    monkeypatch.setattr(AnswerSteps, "take", None)
    monkeypatch.setattr(AnswerSteps, "score", None)
    assert start(tmp_path) == first
    assert contents(tmp_path) == before


def test_run_folder_holds_what_was_asked_and_what_came_out(tmp_path: Path) -> None:
    result = start(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row.keys() for row in rows] == [{"epoch", "loss", "lr", "val_accuracy"}] * 3
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["task"]["train"]["questions"] == 12
    assert config["plugin"]["method"] == "memvp"
    assert config["template"] == TEMPLATE
    info = pt.inspect_eyes(tmp_path / "plugin.safetensors")
    assert info.metrics == {key: value for key, value in result.metrics.items() if key != "seconds"}


def swapped() -> pt.QuestionTask:
    """The task with its first two questions on each other's image."""
    first, second, *rest = make_questions(range(12))
    pair = (pt.Question(first.text, first.answers, (1,)), pt.Question(second.text, second.answers, (0,)))
    return replace(make_task(), train=(*pair, *rest))


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "template ": lambda: {"template": "{question}"},
    "language_model.class ": lambda: {"model": make_model("bart")},
    "eyes.block 1 -> 0": lambda: {"model": make_model(block=0)},
    "plugin.slots 8 -> 9": lambda: {"model": make_model(slots=9)},
    "task.train.questions 12 -> 11": lambda: {"task": make_task(11)},
    "task.train.tokens ": lambda: {"task": swapped()},
    "recipe.epochs 3 -> 4": lambda: {"recipe": replace(RECIPE, epochs=4)},
}


@pytest.mark.parametrize("told", CHANGES)
def test_run_of_something_else_is_refused(told: str, tmp_path: Path) -> None:
    start(tmp_path)
    asked = {"model": make_model(), "task": make_task(), "recipe": RECIPE, **CHANGES[told]()}
    with pytest.raises(pt.FitError, match="holds a run with other settings") as caught:
        fit_answers(tokenizer=make_tokenizer(), **asked, out=tmp_path, progress=False)
    assert told in str(caught.value)


class Scripted:
    """Stands in for the score: validation goes as told, and the weights of each validation are remembered."""

    def __init__(self, *accuracies: float) -> None:
        self.accuracies, self.seen = iter(accuracies), []

    def __call__(self, steps: AnswerSteps, split: Quiz) -> dict[str, float]:
        if split.questions[0].name == "18":
            return {steps.criterion: 0.25}
        self.seen.append(weights(steps.model))
        return {steps.criterion: next(self.accuracies)}


def test_best_epoch_on_validation_is_kept_and_the_last_one_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Scripted(0.1, 0.9, 0.5)
    monkeypatch.setattr(AnswerSteps, "score", lambda steps, split: told(steps, split))
    model = make_model()
    result = fit_answers(model, make_tokenizer(), make_task(), RECIPE, progress=False)
    assert equal(weights(model), told.seen[1])
    expected = {"best_epoch": 2, "val_accuracy": 0.9, "last_val_accuracy": 0.5, "last_test_accuracy": 0.25}
    assert result.metrics.items() >= expected.items()


def test_captions_are_scored_by_cider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "score", lambda metric, answers, questions: {"overall": 1.0})
    monkeypatch.setattr(steps_file, "score", lambda metric, answers, questions: {"overall": 1.2, "G": 0.0})
    task = replace(make_task(), metric="cider")
    result = fit_answers(make_model(), make_tokenizer(), task, RECIPE, progress=False)
    assert result.metrics.items() >= {"val_cider": 1.2, "test_cider": 1.2}.items()
    assert result.history[0]["val_cider"] == 1.2


def test_validation_is_bounded_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "NUM_VALIDATED", 4)
    asked: list[tuple[str, ...]] = []
    solve = steps_file.solve

    def listen(model: Any, texts: Any, prompts: Any, questions: Any, *args: Any, **settings: Any) -> list[str]:
        asked.append(tuple(question.name for question in questions))
        return solve(model, texts, prompts, questions, *args, **settings)

    monkeypatch.setattr(steps_file, "solve", listen)
    fit_answers(make_model(), make_tokenizer(), make_task(num_val=9), RECIPE, progress=False)
    assert len(set(asked[:3])) == 1
    assert len(asked[0]) == 4
    assert set(map(int, asked[0])) <= set(range(12, 21))
    # all of test
    assert len(asked[3]) == 6


def test_both_splits_are_trained_on_where_the_recipe_says_so(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1, train_on="train+val")
    result = fit_answers(make_model(), make_tokenizer(), make_task(), recipe, out=tmp_path, progress=False)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())["task"]
    assert config["train"]["questions"] == 18
    assert "val" not in config
    assert "val_accuracy" not in result.metrics


def test_questions_without_answers_are_not_scored() -> None:
    unlabelled = tuple(pt.Question(question.text, (), question.images) for question in make_questions(range(18, 24)))
    recipe = pt.Recipe(epochs=1)
    result = fit_answers(make_model(), make_tokenizer(), replace(make_task(), test=unlabelled), recipe, progress=False)
    assert "test_accuracy" not in result.metrics
    assert "val_accuracy" in result.metrics


def frozen() -> pt.Sighted:
    model = make_model()
    model.plugin.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "task", "recipe", "error", "message"),
    [
        (frozen, {}, {}, pt.FitError, "the model has nothing to train"),
        (make_model, {"train": None}, {}, pt.FitError, "squares has no questions to train on"),
        (make_model, {}, {"augment": "fgvc"}, pt.FitError, "images of questions are not augmented, got augment 'fgvc'"),
        (make_model, {"metric": "vqa"}, {}, pt.TaskError, "VQA accuracy leaves one answer out"),
        (make_model, {"train": MIXED}, {}, pt.PluginError, "8 image features do not fit into 4 slots"),
    ],
)
def test_what_cannot_be_trained_is_named_before_anything_is_written(
    model: Callable[..., pt.Sighted],
    task: dict[str, Any],
    recipe: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
) -> None:
    made = make_model(slots=4) if task.get("train") else model()
    with pytest.raises(error, match=message):
        fit_answers(
            made,
            make_tokenizer(),
            replace(make_task(), **task),
            pt.Recipe(**recipe),
            out=tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_recipe_of_the_paper_is_that_of_its_code() -> None:
    recipe = pt.answer_recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay) == (20, 32, 1.125e-3, 0.02)
    assert recipe.warmup == 2
    assert pt.answer_recipe(256).lr == 9e-3


# several processes


def both_processes(out: Path) -> None:
    """What each of two processes does; the tests look at what is left in the folder."""
    found = {}
    for name, make in (("frozen", make_deterministic), ("trained", make_deterministic_eyes)):
        model = make()
        result = fit_answers(model, make_tokenizer(), make_mixed_task(), RECIPE, out=out / name, progress=False)
        found[name] = (weights(model), result.history, result.metrics)
    torch.save(found, out / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def make_deterministic() -> pt.Sighted:
    return make_model(slots=12, dropout=0.0)


def make_deterministic_eyes() -> pt.Sighted:
    return make_model(slots=12, dropout=0.0, eyes=pt.adapt(vit(), pt.LoRA(rank=2, dropout=0.0), prove=False))


def make_mixed_task() -> pt.QuestionTask:
    """11 questions, some on two images and some on none: the last batch of 5, 5 and 1 is one process's."""
    task = make_task()
    return replace(task, train=(*task.train[:8], *MIXED))


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launch(torchrun(__file__, tmp_path), tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, make in (("frozen", make_deterministic), ("trained", make_deterministic_eyes)):
        model = make()
        alone = fit_answers(model, make_tokenizer(), make_mixed_task(), RECIPE, progress=False)
        for found in both:
            state, history, metrics = found[name]
            # Adam turns a gradient's rounding into a step of up to lr where the gradient is nearly nothing
            torch.testing.assert_close(state, weights(model), rtol=1e-3, atol=2e-4)
            assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in alone.history], rel=1e-4)
            assert metrics == alone.metrics | {"seconds": metrics["seconds"]}
        assert (tmp_path / name / "plugin.safetensors").exists()


if __name__ == "__main__":
    both_processes(Path(sys.argv[1]))
