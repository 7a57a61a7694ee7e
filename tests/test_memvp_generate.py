"""Generation with eyes: the cache, batches, beams, and one look at the images."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import petiole as pt
from language_models import D_IMAGE, DECODERS, LANGUAGE_MODELS, PAD, random, sighted, tokens
from models import MODELS

pytest.importorskip("transformers")

every_model = pytest.mark.parametrize("name", LANGUAGE_MODELS)
LENGTHS = (3, 6, 5)
FEATURES = random(3, 4, D_IMAGE)
INDICATOR = torch.tensor([1, 0, 1])


def batch(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Prompts of several lengths, and the same as one padded batch."""
    prompts = [tokens(1, length, seed=length) for length in LENGTHS]
    longest = max(LENGTHS)
    sides = [(longest - n, 0) if name in DECODERS else (0, longest - n) for n in LENGTHS]
    ids = torch.cat([F.pad(p, side, value=PAD) for p, side in zip(prompts, sides, strict=True)])
    return prompts, {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def new_tokens(name: str, prompt: Tensor, answer: Tensor) -> Tensor:
    """What was generated, without the prompt that a decoder repeats."""
    return answer[:, prompt.shape[1] :] if name in DECODERS else answer


def assert_batch_is_one_by_one(name: str, num_rows: int, **settings: Any) -> None:
    model = sighted(name)
    prompts, texts = batch(name)
    images = {"features": FEATURES, "indicator": INDICATOR}
    together = model.generate(**images, **texts, max_new_tokens=5, **settings)
    together = new_tokens(name, texts["input_ids"], together).view(len(prompts), num_rows, -1)
    for i, prompt in enumerate(prompts):
        alone = {key: value[i : i + 1] for key, value in images.items()}
        answer = model.generate(**alone, input_ids=prompt, max_new_tokens=5, **settings)
        assert torch.equal(new_tokens(name, prompt, answer), together[i])


@every_model
def test_cached_generation_is_uncached(name: str) -> None:
    model = sighted(name)
    texts = {"input_ids": tokens(3, 4), "max_new_tokens": 6}
    cached, uncached = (model.generate(features=FEATURES, use_cache=on, **texts) for on in (True, False))
    assert torch.equal(cached, uncached)
    # else the cache would be tried on a model that sees nothing
    assert not torch.equal(cached, model.generate(**texts))


@every_model
def test_greedy_batch_is_one_by_one(name: str) -> None:
    assert_batch_is_one_by_one(name, 1)


@every_model
def test_beams_of_a_batch_are_those_of_one_by_one(name: str) -> None:
    assert_batch_is_one_by_one(name, 2, num_beams=3, num_return_sequences=2)


@every_model
def test_samples_share_the_memory_of_their_text(name: str) -> None:
    model, ids = sighted(name), tokens(3, 4)
    settings = {"do_sample": True, "max_new_tokens": 4}
    torch.manual_seed(0)
    found = model.generate(features=FEATURES, input_ids=ids, num_return_sequences=2, **settings)
    torch.manual_seed(0)
    rows = FEATURES.repeat_interleave(2, dim=0)
    assert torch.equal(found, model.generate(features=rows, input_ids=ids.repeat_interleave(2, dim=0), **settings))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_images_are_encoded_once(name: str) -> None:
    model = sighted(name, MODELS["vit_no_classifier"](), slots=20)
    calls = {"eyes": 0, "memory": 0}

    def counting(key: str, function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls[key] += 1
            return function(*args, **kwargs)

        return called

    model.eyes.forward = counting("eyes", model.eyes.forward)
    model.plugin.memory = counting("memory", model.plugin.memory)
    model.generate(random(2, 3, 32, 32), input_ids=tokens(2, 4), max_new_tokens=5, num_beams=2)
    assert calls == {"eyes": 1, "memory": 1}
    model.generate(input_ids=tokens(2, 4), max_new_tokens=2)
    assert calls["eyes"] == 1


def test_memory_is_gone_after_a_failure() -> None:
    model = sighted()
    with pytest.raises(ValueError, match="model_kwargs"):
        model.generate(features=FEATURES, input_ids=tokens(3, 4), no_such_setting=1)
    with pytest.raises(pt.PluginError, match="no memory to read"):
        model.language_model(input_ids=tokens(3, 4))


def test_draft_model_reads_no_memory() -> None:
    model, draft = sighted(), LANGUAGE_MODELS["qwen2"]()
    texts = {"input_ids": tokens(1, 4), "max_new_tokens": 6}
    expected = model.generate(features=FEATURES[:1], **texts)
    assert torch.equal(model.generate(features=FEATURES[:1], assistant_model=draft, **texts), expected)


def test_language_model_of_another_reads_no_memory_of_this_one() -> None:
    model, draft = sighted(), sighted("qwen2").language_model
    with pytest.raises(pt.PluginError, match="no memory to read"):
        model.generate(features=FEATURES[:1], input_ids=tokens(1, 4), max_new_tokens=4, assistant_model=draft)


def test_generation_keeps_no_graph_and_no_state() -> None:
    model = sighted()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.generate(features=FEATURES, input_ids=tokens(3, 4), max_new_tokens=3)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
