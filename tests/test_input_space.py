"""The baseline of MemVP's measurements: patches in front of the text."""

import importlib.util
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import petiole as pt
from language_models import D_IMAGE, DECODERS, LANGUAGE_MODELS, random, tokens
from models import MODELS
from petiole.vision_language.eyes import Eyes

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

every_decoder = pytest.mark.parametrize("name", DECODERS)


@pytest.fixture(scope="module")
def input_space() -> types.ModuleType:
    """The benchmark's file as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / "input_space.py"
    spec = importlib.util.spec_from_file_location("input_space", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompted(input_space: types.ModuleType, name: str = "llama", eyes: Any = None, **settings: Any) -> Any:
    """A decoder with prompts that show: random LoRA and projector."""
    width = D_IMAGE if eyes is None else eyes.width
    model = input_space.InputSpace(LANGUAGE_MODELS[name](), eyes, d_image=width, hidden=8, rank=2, **settings).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in model.trained():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model


def left_padded(*rows: list[int]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@every_decoder
def test_constant_patches_are_a_token_repeated_in_front(input_space: types.ModuleType, name: str) -> None:
    plain, ids = LANGUAGE_MODELS[name]().eval(), tokens(2, 5)
    model = input_space.InputSpace(plain, None, d_image=D_IMAGE, hidden=8, rank=2)
    with torch.no_grad():
        model.plugin.up.weight.zero_()
        model.plugin.up.bias.copy_(plain.get_input_embeddings().weight[7])
        found = model(features=random(2, 4, D_IMAGE), input_ids=ids, labels=ids)
        expected = plain(torch.cat([torch.full((2, 4), 7), ids], dim=1)).logits[:, 4:]
    torch.testing.assert_close(found.logits, expected)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found.loss, loss)


@every_decoder
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_with_cache_is_that_without(
    input_space: types.ModuleType, name: str, settings: dict[str, int]
) -> None:
    model, features = prompted(input_space, name), random(2, 4, D_IMAGE)
    texts = {**left_padded([5, 6, 7], [8, 9, 10, 11]), "max_new_tokens": 6, "do_sample": False, **settings}
    cached, plain = (model.generate(features=features, use_cache=use, **texts) for use in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (2 * settings.get("num_return_sequences", 1), 4 + 6)
    assert torch.equal(cached[0, :4], texts["input_ids"][0])


@every_decoder
def test_rows_of_a_mixed_batch_answer_as_alone(input_space: types.ModuleType, name: str) -> None:
    model, features = prompted(input_space, name), random(3, 4, D_IMAGE)
    rows, indicator = ([5, 6, 7], [8, 9, 10, 11, 12], [13, 14]), torch.tensor([1, 0, 1])
    settings = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        together = model(features=features, indicator=indicator, **left_padded(*rows)).logits
        answers = model.generate(features=features, indicator=indicator, **left_padded(*rows), **settings)
        for i, row in enumerate(rows):
            image = {"features": features[i : i + 1]} if indicator[i] else {}
            alone = model(**image, input_ids=torch.tensor([row])).logits
            torch.testing.assert_close(together[i : i + 1, -len(row) :], alone, rtol=1e-4, atol=1e-4)
            answer = model.generate(**image, input_ids=torch.tensor([row]), **settings)
            assert torch.equal(answers[i, -6:], answer[0, -6:])


def test_logits_are_kept_at_places_of_the_text(input_space: types.ModuleType) -> None:
    model, features, texts = prompted(input_space), random(2, 4, D_IMAGE), {"input_ids": tokens(2, 5)}
    with torch.no_grad():
        whole = model(features=features, **texts).logits
        for kept, expected in ((2, whole[:, -2:]), (torch.tensor([1, 3]), whole[:, [1, 3]])):
            found = model(features=features, **texts, logits_to_keep=kept).logits
            torch.testing.assert_close(found, expected)


def test_images_are_their_features(input_space: types.ModuleType) -> None:
    eyes = Eyes(pt.adapt(MODELS["vit_no_classifier"](), prove=False))
    model, images = prompted(input_space, eyes=eyes), random(2, 2, *eyes.blank().shape[1:])
    texts = {"input_ids": tokens(2, 5), "indicator": torch.tensor([[1, 0], [1, 1]])}
    with torch.no_grad():
        features = torch.cat([eyes(images[:, 0]), eyes(images[:, 1])], dim=1)
        assert torch.equal(model(images, **texts).logits, model(features=features, **texts).logits)
        there = {"input_ids": texts["input_ids"][:1], "indicator": torch.tensor([1])}
        first = model(images[:1, 0], **there).logits
    torch.testing.assert_close(model(images[:1], **texts | there | {"indicator": torch.tensor([[1, 0]])}).logits, first)


def test_trains_projector_and_lora_and_never_the_model(input_space: types.ModuleType) -> None:
    plain = LANGUAGE_MODELS["llama"]()
    before = {name: p.clone() for name, p in plain.named_parameters()}
    model, ids = input_space.InputSpace(plain, None, d_image=D_IMAGE, hidden=8, rank=2), tokens(2, 5)
    optimizer = torch.optim.SGD([p for _, p in model.trained()], lr=0.1)
    for _ in range(2):  # LoRA's first factor has no gradient while its second one is zero
        optimizer.zero_grad()
        model(features=random(2, 4, D_IMAGE), input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trained())
    assert {name.partition(".")[0] for name, _ in model.trained()} == {"plugin", "language_model"}
    assert all("lora_" in name for name, _ in model.trained() if not name.startswith("plugin."))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in plain.named_parameters())


def test_seed_alone_decides_initial_values(input_space: types.ModuleType) -> None:
    plain, before = LANGUAGE_MODELS["llama"](), torch.get_rng_state()
    first, again, other = (
        [p.detach() for _, p in input_space.InputSpace(plain, None, d_image=D_IMAGE, seed=seed).trained()]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("slots", [5, 10, 40])
def test_rank_is_the_smallest_of_at_least_equal_size(input_space: types.ModuleType, slots: int) -> None:
    plain = LANGUAGE_MODELS["llama"]()
    memory = pt.give_eyes(plain, None, pt.MemVP(slots=slots, hidden=8), d_image=D_IMAGE, prove=False)
    budget, sizes = input_space.num_trained(memory), {"d_image": D_IMAGE, "hidden": 8}
    rank = input_space.rank_for(budget, plain, **sizes)
    found = [input_space.num_trained(input_space.InputSpace(plain, None, rank=r, **sizes)) for r in range(1, rank + 1)]
    assert found[-1] >= budget > max(found[:-1], default=0)


def test_rank_5_is_as_large_as_the_memory_of_llama_7b(input_space: types.ModuleType) -> None:
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    projector = 128 * (1024 + 4096 + 1) + 4096
    memory, lora = projector + 2 * 320 * 4096, projector + 5 * 32 * 2 * (4096 + 4096)
    assert input_space.rank_for(memory, llama, d_image=1024) == 5
    assert memory == lora
