"""Options of MemVP's successor: entries at several scales, and the class token as an input token."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from asking import MIXED, fit_answers, make_images, make_language_model, make_task, make_tokenizer
from fitting import vit
from language_models import D_IMAGE, DECODERS, LANGUAGE_MODELS, PAD, SEQ2SEQ, random, tokens
from models import MODELS
from petiole.cli import main
from petiole.files import container
from petiole.train.world import World
from petiole.vision_language import eyes_file
from petiole.vision_language.answering import look_at
from petiole.vision_language.eyes import Eyes
from petiole.vision_language.prefix import Prefix, forward_behind

transformers = pytest.importorskip("transformers")

every_decoder = pytest.mark.parametrize("name", DECODERS)
# of each text: a class token, then four patches
FEATURES = random(3, 5, D_IMAGE)
INDICATOR = torch.tensor([1, 0, 1])
LENGTHS = (3, 6, 5)


def eyes_of(name: str = "vit_no_classifier", **settings: Any) -> Eyes:
    return Eyes(pt.adapt(MODELS[name](), prove=False), **settings)


def shown(model: pt.Sighted) -> pt.Sighted:
    """The model with random tensors in place of its initial ones, so that memory and class token show."""
    generator = torch.Generator().manual_seed(3)
    readers = filter(None, (model.plugin, model.class_token))
    with torch.no_grad():
        for p in (p for module in readers for p in module.parameters()):
            p.copy_(0.4 * torch.randn(p.shape, generator=generator))
    return model


def sighted(
    name: str = "llama", eyes: nn.Module | None = None, class_token: bool = True, **settings: Any
) -> pt.Sighted:
    """A decoder that reads a class token, whose memory shows."""
    plugin = pt.MemVP(slots=settings.pop("slots", 10), hidden=8, scale=1.0, image_scale=1.0, dropout=0.0)
    width = D_IMAGE if eyes is None else None
    return shown(
        pt.give_eyes(
            LANGUAGE_MODELS[name](), eyes, plugin, d_image=width, class_token=class_token, prove=False, **settings
        )
    )


def padded(side: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Prompts of several lengths, and the same as one batch."""
    prompts = [tokens(1, length, seed=length) for length in LENGTHS]
    gaps = [max(LENGTHS) - n for n in LENGTHS]
    both = zip(prompts, gaps, strict=True)
    ids = torch.cat([F.pad(p, (gap, 0) if side == "left" else (0, gap), value=PAD) for p, gap in both])
    return prompts, {"input_ids": ids, "attention_mask": (ids != PAD).long()}


# scales


@pytest.mark.parametrize(("name", "grid"), [("vit_no_classifier", (4, 4)), ("vit_non_square", (3, 5))])
@pytest.mark.parametrize("scales", [(1, 2), (3, 1, 2), (2,), (1, 4), (7,)])
def test_averages_are_plain_loops_over_neighbours(name: str, grid: tuple[int, int], scales: tuple[int, ...]) -> None:
    images = torch.randn(2, 3, 8 * grid[0], 8 * grid[1], generator=torch.Generator().manual_seed(0))
    fine = eyes_of(name)(images).detach().double().numpy().reshape(2, *grid, -1)
    expected = []
    for scale in sorted(scales):
        for top in range(0, grid[0], scale):
            for left in range(0, grid[1], scale):
                # at a ragged edge, of what is there
                expected.append(fine[:, top : top + scale, left : left + scale].mean(axis=(1, 2)))
    eyes = eyes_of(name, scales=scales)
    found = eyes(images)
    assert found.shape[1] == eyes.num_features == len(expected)
    np.testing.assert_allclose(found.detach().numpy(), np.stack(expected, axis=1), rtol=1e-5, atol=1e-6)


def test_scale_of_one_is_bit_for_bit_what_it_was() -> None:
    eyes, images = eyes_of(), random(2, 3, 32, 32)
    model = eyes.model
    features, flow = model.view.run(model.backbone, images, model.taps)
    assert torch.equal(eyes(images), features[:, flow.num_prefix :])
    fine, both = (sighted(eyes=MODELS["vit_no_classifier"](), class_token=False, slots=20, **s)
                  for s in ({}, {"scales": [1]}))  # fmt: skip
    ids = tokens(2, 5)
    assert torch.equal(fine(images, input_ids=ids).logits, both(images, input_ids=ids).logits)
    assert torch.equal(eyes_of(scales=(1, 2))(images)[:, :16], eyes(images))


def test_clip_l14_has_256_and_64_entries() -> None:
    import timm

    # one narrow block stands for the 24 of CLIP ViT-L/14: the grid is its own
    clip = timm.create_model(
        "vit_large_patch14_clip_224", num_classes=0, depth=1, embed_dim=8, num_heads=1, pretrained=False
    )
    host = pt.adapt(clip, prove=False)
    assert Eyes(host, scales=(1, 2)).num_features == 256 + 64
    assert Eyes(host, scales=(1, 2), class_token=True).num_features == 1 + 256 + 64


def test_averages_train_the_eyes() -> None:
    host = pt.adapt(MODELS["vit_no_classifier"](), pt.AdaptFormer(dim=2), prove=False)
    model = sighted(eyes=host, slots=20, scales=(2,)).train()
    for p in host.plugins.parameters():
        nn.init.constant_(p, 0.1)
    ids = tokens(2, 5)
    model(random(2, 3, 32, 32), input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.trained())


# the class token


def test_map_has_the_parameters_of_its_formula_and_the_plugin_stays() -> None:
    model, without = (
        pt.give_eyes(LANGUAGE_MODELS["llama"](), None, pt.MemVP(), d_image=D_IMAGE, class_token=has, prove=False)
        for has in (True, False)
    )
    d = model.language_model.config.hidden_size
    counts = [sum(p.numel() for _, p in m.trained()) for m in (model, without)]
    assert counts[0] - counts[1] == (D_IMAGE + 1) * d == sum(p.numel() for p in model.class_token.parameters())
    bound = (6 / (D_IMAGE + d)) ** 0.5
    assert 0.9 * bound < model.class_token.weight.max().item() <= bound
    assert not model.class_token.bias.any()
    assert all(torch.equal(t, model.task_state()[name]) for name, t in without.task_state().items())


@every_decoder
def test_class_token_is_one_embedding_in_front_of_the_text(name: str) -> None:
    model, ids = sighted(name), tokens(3, 5)
    found = model(features=FEATURES, input_ids=ids, labels=ids)
    token = FEATURES[:, :1] @ model.class_token.weight.T + model.class_token.bias
    with model.binding.bind(model.memory(features=FEATURES)):
        inputs = torch.cat([token, model.language_model.get_input_embeddings()(ids)], dim=1)
        expected = model.language_model(inputs_embeds=inputs).logits[:, 1:]
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(found.loss, F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    # the memory is that of the patches alone
    plain = sighted(name, class_token=False)
    torch.testing.assert_close(model.memory(features=FEATURES), plain.memory(features=FEATURES[:, 1:]))


def test_class_token_is_the_encoders_own() -> None:
    host = MODELS["dinov2_registers"]()
    model, images = sighted(eyes=host, slots=20, block=-2), random(2, 3, 32, 32)
    ((patches, first),) = host.get_intermediate_layers(images, n=[0], norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(model.eyes(images), torch.cat([first[:, :1], patches], dim=1))


@every_decoder
def test_text_alone_is_bit_for_bit_what_it_was(name: str) -> None:
    model, plain = sighted(name), sighted(name, class_token=False)
    _, texts = padded("left")
    assert torch.equal(model(**texts).logits, plain(**texts).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**texts, **settings), plain.generate(**texts, **settings))


@every_decoder
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_mixed_batch_read_as_alone(name: str, side: str) -> None:
    model, (prompts, texts) = sighted(name), padded(side)
    together = model(features=FEATURES, indicator=INDICATOR, **texts).logits
    for i, prompt in enumerate(prompts):
        image = {"features": FEATURES[i : i + 1]} if INDICATOR[i] else {}
        row = together[i : i + 1][texts["attention_mask"][i : i + 1].bool()]
        torch.testing.assert_close(row, model(**image, input_ids=prompt).logits[0], rtol=1e-4, atol=1e-4)


def test_several_images_have_a_token_each() -> None:
    model, ids = sighted(eyes=MODELS["vit_no_classifier"](), slots=40), tokens(2, 5)
    images, there = random(2, 2, 3, 32, 32), torch.tensor([[1, 0], [1, 1]])
    found = model(images, there, input_ids=ids)
    features = model.eyes(images.flatten(0, 1)).unflatten(0, (2, 2))
    parts = model.class_token(features[:, :, 0]), model.language_model.get_input_embeddings()(ids)
    with model.binding.bind(model.memory(images, there)):
        inputs, mask = torch.cat(parts, dim=1), F.pad(there, (0, 5), value=1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model.language_model(inputs_embeds=inputs, attention_mask=mask, position_ids=places).logits[:, 2:]
    torch.testing.assert_close(found.logits, expected)
    torch.testing.assert_close(model(features=features.flatten(1, 2), indicator=there, input_ids=ids).logits, expected)
    one = model(images[:1, 0], input_ids=ids[:1]).logits
    torch.testing.assert_close(found.logits[:1], one, rtol=1e-4, atol=1e-4)


def test_features_of_several_images_are_parted_by_the_indicator() -> None:
    model, ids, features = sighted(), tokens(1, 5), random(1, 10, D_IMAGE)
    prefix = Prefix(model.class_token(features[:, [0, 5]]), torch.ones(1, 2))
    with model.binding.bind(model.plugin.memory(features[:, [1, 2, 3, 4, 6, 7, 8, 9]], torch.ones(1))):
        expected = forward_behind(model.language_model, prefix, {"input_ids": ids}).logits
    found = model(features=features, indicator=torch.ones(1, 2), input_ids=ids).logits
    torch.testing.assert_close(found, expected)


def test_one_image_serves_all_texts() -> None:
    model, ids = sighted(), tokens(3, 5)
    shared = model(features=FEATURES[:1], input_ids=ids).logits
    torch.testing.assert_close(shared, model(features=FEATURES[:1].expand(3, -1, -1), input_ids=ids).logits)


def test_kept_logits_are_counted_over_the_text() -> None:
    model, ids = sighted(), tokens(3, 5)
    whole = model(features=FEATURES, input_ids=ids).logits
    cases = [(0, slice(None)), (2, slice(-2, None)), (9, slice(None)), (torch.tensor([1, 3, -1]), [1, 3, 4])]
    for kept, places in cases:
        found = model(features=FEATURES, input_ids=ids, logits_to_keep=kept).logits
        torch.testing.assert_close(found, whole[:, places])


def test_text_may_come_as_embeddings() -> None:
    model, ids = sighted(), tokens(3, 5)
    embeddings = model.language_model.get_input_embeddings()(ids)
    expected = model(features=FEATURES, input_ids=ids).logits
    assert torch.equal(model(features=FEATURES, inputs_embeds=embeddings).logits, expected)
    settings = {"max_new_tokens": 4, "do_sample": False}
    whole = model.generate(features=FEATURES, inputs=ids, **settings)
    assert torch.equal(model.generate(features=FEATURES, inputs_embeds=embeddings, **settings), whole[:, 5:])


# generation


@every_decoder
def test_generation_with_a_cache_is_greedy_without(name: str) -> None:
    model, (_, texts) = sighted(name), padded("left")
    images = {"features": FEATURES, "indicator": INDICATOR}
    found = model.generate(**images, **texts, max_new_tokens=5, do_sample=False)
    ids, mask = texts["input_ids"], texts["attention_mask"]
    # transformers always takes its cache behind embeddings: here each token is computed from scratch
    for _ in range(5):
        with torch.no_grad():
            new = model(**images, input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].argmax(-1)
        ids, mask = torch.cat([ids, new[:, None]], dim=1), F.pad(mask, (0, 1), value=1)
    assert torch.equal(found, ids)
    # else the cache would be tried on a model that does not read its first token
    blank = FEATURES * (torch.arange(5) > 0)[:, None]
    assert not torch.equal(model.generate(features=blank, **texts, max_new_tokens=5, do_sample=False), found)


@every_decoder
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_answers_of_a_batch_are_those_of_one_by_one(name: str, settings: dict[str, int]) -> None:
    model, (prompts, texts) = sighted(name), padded("left")
    settings = {"max_new_tokens": 5, "do_sample": False, **settings}
    together = model.generate(features=FEATURES, indicator=INDICATOR, **texts, **settings)
    together = together.view(len(prompts), -1, together.shape[1])
    for i, prompt in enumerate(prompts):
        alone = {"features": FEATURES[i : i + 1], "indicator": INDICATOR[i : i + 1]}
        for image in (alone, *([{}] if not INDICATOR[i] else [])):
            answers = model.generate(**image, input_ids=prompt, **settings)
            assert torch.equal(answers[:, : prompt.shape[1]], prompt.expand(len(answers), -1))
            assert torch.equal(answers[:, prompt.shape[1] :], together[i, :, max(LENGTHS) :])


def test_prompt_stands_in_front_whatever_generate_returns() -> None:
    model, ids = sighted(), tokens(3, 4)
    settings = {"features": FEATURES, "input_ids": ids, "do_sample": False}
    expected = model.generate(**settings, max_new_tokens=5)
    assert torch.equal(model.generate(**settings, max_length=9, min_length=9), expected)
    told = model.generate(**settings, max_new_tokens=5, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(told.sequences, expected)
    assert len(told.scores) == 5


# gradients


@pytest.mark.parametrize("features", [None, FEATURES])
@pytest.mark.parametrize("has_eyes", [False, True])
def test_every_tensor_has_a_gradient(features: Tensor | None, has_eyes: bool) -> None:
    host = pt.adapt(MODELS["vit_no_classifier"](), pt.AdaptFormer(dim=2), prove=False) if has_eyes else None
    model, ids = sighted(eyes=host, slots=20).train(), tokens(3, 5)
    images = {}
    if features is not None:
        images = {"images": random(3, 3, 32, 32)} if has_eyes else {"features": features}
    model(**images, input_ids=ids, labels=ids).loss.backward()
    assert {name.split(".")[0] for name, _ in model.trained()} >= {"plugin", "class_token"}
    assert [name for name, p in model.trained() if p.grad is None] == []
    assert bool(model.class_token.weight.grad.any()) == bool(images)
    model.zero_grad()
    # images are given, and no text has its own
    model(**images, **({"indicator": torch.zeros(3)} if images else {}), input_ids=ids, labels=ids).loss.backward()
    assert [name for name, p in model.trained() if p.grad is None or not p.grad.isfinite().all()] == []
    assert not model.class_token.weight.grad.any()


@every_decoder
def test_checkpointed_gradients_are_equal(name: str) -> None:
    model, ids = sighted(name).train(), tokens(3, 5)
    found = []
    for is_on in (False, True):
        model.set_checkpointing(is_on)
        # two passes before one backward
        first = model(features=FEATURES, indicator=INDICATOR, input_ids=ids, labels=ids).loss
        second = model(features=2 * FEATURES, input_ids=ids, labels=ids).loss
        (first + 3 * second).backward()
        found.append({name: p.grad for name, p in model.trained()})
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert all(grad.any() for grad in found[0].values())


def test_half_precision_keeps_the_map_whole() -> None:
    plain, ids = LANGUAGE_MODELS["llama"]().bfloat16(), tokens(3, 5)
    model = pt.give_eyes(plain, None, pt.MemVP(slots=8), d_image=D_IMAGE, class_token=True, prove=False).train()
    model(features=FEATURES, input_ids=ids, labels=ids).loss.backward()
    assert {p.dtype for _, p in model.trained()} == {torch.float32}
    assert all(p.grad.isfinite().all() for _, p in model.trained())


# files and questions


def asked_model(**settings: Any) -> pt.Sighted:
    """A model of words that looks through the tiny ViT of 2 x 2 patches."""
    plugin = pt.MemVP(slots=12, hidden=8, scale=1.0, image_scale=1.0, dropout=0.0)
    return shown(pt.give_eyes(make_language_model(), vit(), plugin, prove=False, **settings))


def test_file_gives_the_same_answers_bit_for_bit(tmp_path: Path) -> None:
    model, file, ids = asked_model(scales=(1, 2), class_token=True), tmp_path / "a.safetensors", tokens(2, 5) % 15
    pt.save_eyes(model, file)
    info = pt.inspect_eyes(file)
    assert (info.class_token, info.eyes["scales"]) == (True, [1, 2])
    assert {"class_token.weight", "class_token.bias"} < {tensor.name for tensor in info.tensors}
    again, images = pt.load_eyes(file, make_language_model(), vit()), random(2, 3, 32, 32)
    assert again.eyes.scales == (1, 2)
    assert torch.equal(again(images, input_ids=ids).logits, model.eval()(images, input_ids=ids).logits)
    pt.save_eyes(again, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


def test_file_of_features_keeps_the_class_token(tmp_path: Path) -> None:
    plugin, file = pt.MemVP(slots=6), tmp_path / "a.safetensors"
    model = pt.give_eyes(make_language_model(), None, plugin, d_image=D_IMAGE, class_token=True, prove=False)
    pt.save_eyes(model, file)
    again, texts = pt.load_eyes(file, make_language_model()), {"features": FEATURES, "input_ids": tokens(3, 5) % 15}
    assert torch.equal(again(**texts).logits, model(**texts).logits)


def test_file_from_before_the_options_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, describe = asked_model(), eyes_file.describe

    def old(*args: Any) -> dict[str, Any]:
        info = describe(*args)
        del info["class_token"], info["eyes"]["scales"]
        return info

    monkeypatch.setattr(eyes_file, "describe", old)
    pt.save_eyes(model, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    assert "class_token" not in container.parse(data, "a")[1]
    info = pt.inspect_eyes(tmp_path / "a.safetensors")
    assert (info.class_token, info.eyes["scales"]) == (False, [1])
    again, ids = pt.load_eyes(tmp_path / "a.safetensors", make_language_model(), vit()), tokens(2, 5) % 15
    images = random(2, 3, 32, 32)
    assert torch.equal(again(images, input_ids=ids).logits, model(images, input_ids=ids).logits)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("class_token", 1, "`class_token` should be true or false"),
        ("scales", 2, r"`eyes\.scales` should be a list"),
        ("scales", [0], "describes plugins that do not fit: scales are different whole numbers"),
    ],
)
def test_file_with_other_options_than_there_are_is_refused(
    key: str, value: Any, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = eyes_file.describe

    def odd(*args: Any) -> dict[str, Any]:
        info = describe(*args)
        (info if key == "class_token" else info["eyes"])[key] = value
        return info

    monkeypatch.setattr(eyes_file, "describe", odd)
    pt.save_eyes(asked_model(), tmp_path / "a.safetensors")
    with pytest.raises(pt.PluginFileError, match=fault):
        pt.load_eyes(tmp_path / "a.safetensors", make_language_model(), vit())


def test_map_that_was_converted_is_not_saved(tmp_path: Path) -> None:
    model = asked_model(class_token=True)
    model.class_token.bfloat16()
    with pytest.raises(pt.PluginFileError, match=r"class_token\.weight is bfloat16.*back by model\.class_token\.float"):
        pt.save_eyes(model, tmp_path / "a.safetensors")


def test_features_seen_once_are_what_the_eyes_give() -> None:
    model = asked_model(scales=(1, 2), class_token=True)
    look = look_at(model, make_images(6), MIXED, World("fp32"))
    ids, found = tokens(3, 5) % 15, look.of(MIXED)
    assert found["features"].shape[1] == 2 * model.eyes.num_features == 2 * (1 + 4 + 1)
    first, patches = found["features"][0].view(2, 6, -1)[:, 0], found["features"][0].view(2, 6, -1)[:, 1:].flatten(0, 1)
    expected = torch.cat([model.class_token(first), model.language_model.get_input_embeddings()(ids[0])])
    with model.binding.bind(model.plugin.memory(patches[None], torch.ones(1))):
        expected = model.language_model(inputs_embeds=expected[None]).logits[:, 2:]
    torch.testing.assert_close(model(**found, input_ids=ids).logits[:1], expected, rtol=1e-4, atol=1e-4)


def test_run_with_options_trains_the_map_and_is_told_from_one_without(tmp_path: Path) -> None:
    model = asked_model(scales=(1, 2), class_token=True)
    before, recipe = model.class_token.weight.detach().clone(), pt.Recipe(epochs=1, batch_size=6)
    task = replace(make_task(6, 2, 2), train=(*make_task(6, 2, 2).train, *MIXED[2:]))
    fit_answers(model, make_tokenizer(), task, recipe, out=tmp_path, progress=False)
    assert not torch.equal(model.class_token.weight, before)
    again = pt.load_eyes(tmp_path / "plugin.safetensors", make_language_model(), vit())
    assert torch.equal(again.class_token.weight, model.class_token.weight)
    with pytest.raises(
        pt.FitError, match=r"class_token True -> False(.|\n)*eyes\.scales|eyes\.scales(.|\n)*class_token"
    ):
        fit_answers(asked_model(), make_tokenizer(), task, recipe, out=tmp_path, progress=False)


def test_positions_of_class_tokens_count() -> None:
    # 40 positions: 34 words, one that begins and 4 of the answer leave one
    model, tokenizer, images = asked_model(class_token=True), make_tokenizer(), make_images(2)
    model.template = "{question}"
    asked = [pt.Question("the " * 33 + "?", images=places) for places in ((0,), (0, 1))]
    assert len(pt.answer(model, tokenizer, asked[:1], images, max_new_tokens=4)) == 1
    with pytest.raises(pt.TaskError, match="up to 39 tokens, and 2 in front for its images; the language model has 40"):
        pt.answer(model, tokenizer, asked[1:], images, max_new_tokens=4)


def test_model_says_its_options() -> None:
    assert repr(asked_model()).endswith("drop_share=0.0))")
    assert repr(asked_model(scales=[2, 1], class_token=True)).endswith("), scales=(1, 2), class_token=True)")


# refusals


@pytest.mark.parametrize("scales", [(), (0,), (1, 1), (1.5,), (True,)])
def test_scales_that_are_none_are_refused(scales: Any) -> None:
    with pytest.raises(pt.PluginError, match="scales are different whole numbers from 1"):
        eyes_of(scales=scales)


def test_patches_without_a_grid_have_no_scales() -> None:
    merging = pt.adapt(MODELS["vit_no_classifier"](), pt.ToMe(budget=2), prove=False)
    with pytest.raises(pt.PluginError, match=r"scales \(1, 2\) average neighbours of a grid, and the 1[0-9] patches"):
        Eyes(merging, scales=(1, 2))
    with pytest.raises(pt.PluginError, match="scales are of the eyes, and there are none"):
        sighted(scales=(1, 2))


@pytest.mark.parametrize("name", ["siglip", "swin"])
def test_encoder_without_a_class_token_is_refused(name: str) -> None:
    with pytest.raises(pt.BackboneError, match="has no class token: leave class_token out"):
        eyes_of(name, class_token=True)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_language_model_with_an_encoder_reads_no_class_token(name: str) -> None:
    with pytest.raises(
        pt.PluginError, match=r"in front of a decoder's text, and \w+ForConditionalGeneration has an enc"
    ):
        sighted(name)


def test_more_entries_than_slots_are_counted_without_the_class_token() -> None:
    sighted(eyes=MODELS["vit_no_classifier"](), slots=20, scales=(1, 2))
    with pytest.raises(pt.PluginError, match="20 image features do not fit into 19 slots"):
        sighted(eyes=MODELS["vit_no_classifier"](), slots=19, scales=(1, 2))


def cached(model: pt.Sighted) -> Any:
    """The cache of a call, whatever its argument is called, and under that name."""
    found = model(features=FEATURES, input_ids=tokens(3, 5), use_cache=True)
    return next({key: value} for key, value in found.items() if hasattr(value, "get_seq_length"))


IDS = {"input_ids": tokens(3, 5)}


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda m: m(features=FEATURES), "in front of a text, and there is none: give input_ids"),
        (lambda m: m(features=FEATURES, **IDS, position_ids=torch.arange(5)), "position_ids were given"),
        (lambda m: m(features=FEATURES, **IDS, attention_mask=torch.ones(3, 9)), r"got \(3, 9\) for \(3, 5\)"),
        (lambda m: m(features=FEATURES, **IDS, **cached(m)), "or a cache to go on from: take `generate`"),
        (lambda m: m.generate(features=FEATURES, **IDS, assistant_model=m.language_model), "a draft model cannot read"),
        (lambda m: m(features=FEATURES, indicator=torch.ones(3, 2), **IDS), "5 features are not those of 2 images"),
    ],
)
def test_texts_that_do_not_fit_a_class_token_are_refused(call: Any, fault: str) -> None:
    with pytest.raises(pt.PluginError, match=fault):
        call(sighted())


def test_images_that_do_not_fit_a_class_token_are_refused() -> None:
    model, images = sighted(eyes=MODELS["vit_no_classifier"](), slots=40), random(3, 3, 32, 32)
    with pytest.raises(pt.PluginError, match="the indicator is of 4 images a text, the features of 1"):
        model(images, torch.ones(3, 4), **IDS)
    with pytest.raises(pt.PluginError, match="18 features are not those of images of 17 each"):
        model(features=random(3, 18, 32), **IDS)


# the command line


@pytest.fixture
def petiole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command beside rows on squares, with the tiny ViT and the tiny language model of words."""
    pixels, rows = make_images(6), []
    for i, split in enumerate(("train", "train", "train", "train", "val", "test")):
        pixels[i].save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "the colour ?", "answer": "red", "split": split})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("petiole.backbones.bundled.backbone", lambda name, **settings: vit())
    words = (make_language_model(), make_tokenizer())
    monkeypatch.setattr("petiole.cli._language.load_language_model", lambda place, dtype: words)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["petiole", *arguments])
        with contextlib.suppress(SystemExit):
            main()
        said = capsys.readouterr()
        return said.out + said.err

    return run


def test_options_go_from_the_command_line_into_the_file(petiole: Any, tmp_path: Path) -> None:
    fit = (
        "vqa",
        "fit",
        "rows.jsonl",
        "-l",
        "words",
        "--epochs",
        "1",
        "--set",
        "slots=8",
        "--out",
        "run",
        "--block",
        "-1",
    )
    said = petiole(*fit, "--scales", "1,2", "--class-token")
    assert "scales=(1, 2), class_token=True)" in said
    info = pt.inspect_eyes("run/plugin.safetensors")
    assert (info.class_token, info.eyes["scales"]) == (True, [1, 2])
    told = petiole("inspect", "run/plugin.safetensors")
    assert "block 1, scales 1, 2" in told
    assert "one token in front of the text" in told
    assert json.loads(petiole("inspect", "run/plugin.safetensors", "--json"))["class_token"] is True
    assert "--scales takes whole numbers, e.g. 1,2, got 'one'" in petiole(*fit, "--scales", "one")
    assert "scales are different whole numbers from 1, e.g. (1, 2), got (1, 1)" in petiole(*fit, "--scales", "1,1")
