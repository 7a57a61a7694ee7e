"""A tiny tokenizer, tiny language models and a tiny task that the tests of answering share."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import petiole as pt
from fitting import vit
from language_models import _BART, _DECODER, _T5
from models import randomised
from petiole.tasks.images import Arrays
from petiole.vision_language.texts import IGNORED, TEMPLATE, Texts

# here and first: a module of the same name that is imported before would stand in the function's place
answer, fit_answers = pt.answer, pt.fit_answers

COLOURS = ("red", "green", "blue")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = ("Question", "Answer", ":", "?", "which", "colour", "is", "the", "square", "first", "of", "two", *COLOURS)
PAD, BEGIN, END, UNKNOWN = range(4)
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
# class, configuration, settings, and what the family's tokenizer puts around a text
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER | {"max_position_embeddings": 40}, "<s> $A"),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, "<s> $A </s>"),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"decoder_start_token_id": PAD}, "$A </s>"),
}


def make_tokenizer(name: str = "llama", around: str | None = None, **settings: Any) -> Any:
    """Returns a tokenizer of words, which puts around a text what the family's does."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("<s>", BEGIN), ("</s>", END)]
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=FAMILIES[name][3] if around is None else around, special_tokens=special
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **{**names, **settings})


def make_language_model(name: str = "llama", seed: int = 0) -> Any:
    """Returns a tiny language model of the tokenizer's words, with random weights."""
    transformers = pytest.importorskip("transformers")
    cls, config, settings, _ = FAMILIES[name]
    settings = settings | {"vocab_size": len(VOCABULARY), "eos_token_id": END}
    return randomised(getattr(transformers, cls)(getattr(transformers, config)(**settings)), seed)


def taught(name: str, num_steps: int = 60) -> Any:
    """Returns a tiny language model that has learnt to answer with any colour, without looking."""
    model = make_language_model(name).train()
    texts = Texts(make_tokenizer(name), model, TEMPLATE)
    pairs = [(question.text, colour) for question in make_questions(range(2)) for colour in COLOURS]
    arguments, targets = texts.to_learn(texts.exchanges(*zip(*pairs, strict=True)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(num_steps):
        loss = F.cross_entropy(model(**arguments).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def make_model(name: str = "llama", eyes: nn.Module | None = None, block: int = -1, **settings: Any) -> pt.Sighted:
    """Returns a tiny language model that sees through the tiny ViT, with a memory that learns fast."""
    plugin = pt.MemVP(**{"slots": 8, "hidden": 16, "scale": 1.0, "image_scale": 1.0, "dropout": 0.1, **settings})
    eyes = vit() if eyes is None else eyes
    return pt.give_eyes(make_language_model(name), eyes, plugin, block=block, prove=False)


def shown(model: pt.Sighted) -> pt.Sighted:
    """Returns the model with random tensors in place of its plugin's initial ones, so that images show."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.plugin.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model


def make_images(num: int) -> Arrays:
    """Returns noisy squares whose brightest channel is their number modulo 3."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (num, 32, 32, 3))
    pixels[np.arange(num), :, :, np.arange(num) % 3] += 150
    return Arrays(pixels.astype(np.uint8), "squares")


def make_questions(places: range) -> tuple[pt.Question, ...]:
    """Returns questions of two lengths, one on each square."""
    texts = ("which colour is the square ?", "the colour ?")
    return tuple(pt.Question(texts[i % 2], (COLOURS[i % 3],), (i,), name=str(i)) for i in places)


# two images, one, and none
MIXED = (
    pt.Question("which is the first of the two ?", ("red square",), (0, 4)),
    pt.Question("which colour ?", ("blue",), (2,)),
    pt.Question("is the square two ?", ("the first of two",)),
)


def make_task(num_train: int = 12, num_val: int = 6, num_test: int = 6) -> pt.QuestionTask:
    """Returns the task of naming the colour of a square; 0 questions leave a split out."""
    ends = np.cumsum([0, num_train, num_val, num_test]).tolist()
    parts = [make_questions(range(*pair)) or None for pair in itertools.pairwise(ends)]
    return pt.QuestionTask("squares", make_images(ends[-1]), *parts)
