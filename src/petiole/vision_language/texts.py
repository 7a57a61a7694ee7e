"""How questions and answers become tokens of a language model, and its tokens answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import PluginError, TaskError

TEMPLATE = "Question: {question}\nAnswer:"
IGNORED = -100
_PLACE = "{question}"


@dataclass(frozen=True)
class Exchange:
    """The tokens of a question as the language model reads it, and of the answer that it is to give.

    Args:
        prompt: The question in its template.
        answer: The answer and the token that ends it.
    """

    prompt: list[int]
    answer: list[int]


class Texts:
    """A tokenizer and a template for one language model; the tokenizer is never written to.

    A decoder alone goes on where the prompt ends: `prompt answer end`. The answer is what the tokenizer makes of it
    behind the prompt, after a space unless the template ends with one. An encoder reads the prompt, and its decoder
    answers. Nothing is ever cut off: what is longer than the language model has positions for is an error.

    Args:
        tokenizer: The language model's own, of transformers. One without padding is padded with its end token, which
            no attention mask shows.
        language_model: What the tokens are for.
        template: What a prompt is made of, with `{question}` where the question goes.

    Raises:
        PluginError: The template has no place for the question, or the tokenizer is another model's or has no token
            that ends an answer.
    """

    def __init__(self, tokenizer: Any, language_model: Any, template: str) -> None:
        if _PLACE not in template:
            raise PluginError(f"the template {template!r} has no place for the question: write {_PLACE} where it goes")
        num_known = language_model.get_input_embeddings().num_embeddings
        if len(tokenizer) > num_known:
            raise PluginError(
                f"the tokenizer has {len(tokenizer)} tokens, the language model {num_known}: it is another model's"
            )
        if tokenizer.eos_token_id is None:
            raise PluginError("the tokenizer has no token that ends a text, as an answer must end: set its eos_token")
        self.tokenizer, self.template, self.end = tokenizer, template, int(tokenizer.eos_token_id)
        self.pad = self.end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        config = language_model.config
        self.has_encoder = bool(config.is_encoder_decoder)
        self.start = int(config.decoder_start_token_id) if self.has_encoder else self.end
        self.limit: int | None = getattr(config, "max_position_embeddings", None)

    def prompts(self, questions: Sequence[str], num_new: int) -> list[list[int]]:
        """Returns the tokens of prompts.

        Args:
            questions: What is asked.
            num_new: How many tokens the answer may have.

        Raises:
            TaskError: A prompt and its answer are longer than the language model has positions for.
        """
        prompts = self._prompts(questions)
        for question, prompt in zip(questions, prompts, strict=True):
            self._check(question, prompt, num_new)
        return prompts

    def exchanges(self, questions: Sequence[str], answers: Sequence[str]) -> list[Exchange]:
        """Returns the tokens of questions and their answers.

        Raises:
            TaskError: They are longer than the language model has positions for.
        """
        prompts = self._prompts(questions)
        if self.has_encoder:
            ends = [[*self._closed(tokens), self.end] for tokens in self._tokens(answers)]
        else:
            ends = self._continued(questions, prompts, answers)
        found = [Exchange(prompt, answer) for prompt, answer in zip(prompts, ends, strict=True)]
        for question, exchange in zip(questions, found, strict=True):
            self._check(question, exchange.prompt, len(exchange.answer))
        return found

    def to_learn(self, exchanges: Sequence[Exchange]) -> tuple[dict[str, Tensor], Tensor]:
        """Returns a language model's arguments, padded on the right, and what its logits are to say.

        A decoder alone is asked for logits where some text has its answer only: of a vocabulary, they are wide.

        Returns:
            Arguments and targets `[B, n]`, `IGNORED` where nothing is to be said.
        """
        if self.has_encoder:
            prompts, mask = self._padded([e.prompt for e in exchanges])
            said, _ = self._padded([[self.start, *e.answer[:-1]] for e in exchanges])
            targets, _ = self._padded([e.answer for e in exchanges], IGNORED)
            return {"input_ids": prompts, "attention_mask": mask, "decoder_input_ids": said}, targets
        tokens, mask = self._padded([[*e.prompt, *e.answer[:-1]] for e in exchanges])
        silent = [[IGNORED] * (len(e.prompt) - 1) for e in exchanges]
        targets, _ = self._padded([[*s, *e.answer] for s, e in zip(silent, exchanges, strict=True)], IGNORED)
        places = (targets != IGNORED).any(0).nonzero()[:, 0]
        return {"input_ids": tokens, "attention_mask": mask, "logits_to_keep": places}, targets[:, places]

    def to_answer(self, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
        """Returns a language model's arguments to go on from: a decoder alone wants its padding on the left."""
        tokens, mask = self._padded(prompts, side="right" if self.has_encoder else "left")
        return {"input_ids": tokens, "attention_mask": mask}

    def new(self, tokens: Tensor, arguments: dict[str, Tensor]) -> Tensor:
        """Returns the part of generated tokens `[B, L]` that is the answer: without prompt, or the decoder's start."""
        return tokens[:, 1 if self.has_encoder else arguments["input_ids"].shape[1] :]

    def read(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Returns what answers say, without special tokens and the space around."""
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _prompts(self, questions: Sequence[str]) -> list[list[int]]:
        found = self._tokens([self.template.replace(_PLACE, question) for question in questions])
        # some tokenizers end every text, and nothing would follow an end
        return found if self.has_encoder else [self._closed(tokens) for tokens in found]

    def _continued(
        self, questions: Sequence[str], prompts: Sequence[list[int]], answers: Sequence[str]
    ) -> list[list[int]]:
        """Returns the tokens of answers behind their prompts, each with its end."""
        gap = "" if self.template[-1:].isspace() else " "
        filled = [self.template.replace(_PLACE, question) for question in questions]
        behind = [f"{gap}{answer}" for answer in answers]
        whole = self._tokens([prompt + answer for prompt, answer in zip(filled, behind, strict=True)])
        found = []
        for prompt, tokens, answer in zip(prompts, whole, behind, strict=True):
            rest = self._closed(tokens)[len(prompt) :]
            if tokens[: len(prompt)] != prompt:
                # prompt and answer share a token, which generation cannot give: the answer's own tokens then
                rest = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            found.append([*rest, self.end])
        return found

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []

    def _closed(self, tokens: list[int]) -> list[int]:
        return tokens[:-1] if tokens[-1:] == [self.end] else tokens

    def _check(self, question: str, prompt: list[int], num_new: int) -> None:
        if not prompt:
            raise TaskError(f"the question {question!r} has no token in the template {self.template!r}")
        needed = max(len(prompt), num_new) if self.has_encoder else len(prompt) + num_new
        if self.limit is not None and needed > self.limit:
            short = question if len(question) <= 60 else f"{question[:57]}..."
            raise TaskError(
                f"the question {short!r} has {len(prompt)} tokens and its answer up to {num_new}, the language model "
                f"has {self.limit} positions: shorten it"
            )

    def _padded(self, rows: Sequence[list[int]], fill: int | None = None, side: str = "right") -> tuple[Tensor, Tensor]:
        """Returns rows as one tensor `[B, longest]`, and a mask of what is not padding."""
        value, tokens = self.pad if fill is None else fill, [torch.tensor(row) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True, padding_side=side)
        return pad_sequence(tokens, batch_first=True, padding_value=value, padding_side=side), mask
