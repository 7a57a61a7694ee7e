"""MemVP: its sum, its memory, its hooks on a twin, and its eyes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from language_models import D_IMAGE, LANGUAGE_MODELS, SEQ2SEQ, WIDTH, random, sighted, tokens
from models import MODELS
from petiole.backbones import view_of
from petiole.backbones.decoder import Decoder
from petiole.backbones.language import LANGUAGE_VIEWS, language_view_of
from petiole.core.language import FeedForward
from petiole.nn.memory import attend_memory
from petiole.vision_language.eyes import Eyes
from petiole.vision_language.prove import prove_language_view
from test_golden import det, golden

transformers = pytest.importorskip("transformers")

every_model = pytest.mark.parametrize("name", LANGUAGE_MODELS)


def eyes(name: str = "vit_no_classifier") -> nn.Module:
    return MODELS[name]()


def losses(model: pt.Sighted, seed: int = 0, **images: Any) -> Tensor:
    ids = tokens(2, 5, seed)
    return model(**images, input_ids=ids, labels=ids).loss


def gradients(model: pt.Sighted) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.trained()}
    model.zero_grad()
    return found


# the sum


def plain_sum(x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, on_factors: bool, drop_share: float) -> Tensor:
    """The formula, row by row, token by token, entry by entry."""
    per_sample = len(x) // len(keys)
    out = torch.zeros_like(x)
    for row, text in enumerate(x):
        k, v, counts = (t[row // per_sample] for t in (keys, values, mask))
        for place, token in enumerate(text):
            scores = {}
            for j in range(len(k)):
                if counts[j]:
                    product = F.silu(token) @ F.silu(k[j]) if on_factors else F.silu(token @ k[j])
                    scores[j] = product.item()
            for j in sorted(scores, key=scores.__getitem__)[int(drop_share * len(scores)) :]:
                out[row, place] += scores[j] * v[j]
    return out


@pytest.mark.parametrize("drop_share", [0.0, 0.4])
@pytest.mark.parametrize("on_factors", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_attended_memory_is_the_plain_sum(has_mask: bool, on_factors: bool, drop_share: float) -> None:
    x, keys, values = (random(*shape, seed=i) for i, shape in enumerate([(6, 3, 4), (2, 5, 4), (2, 5, 4)]))
    mask = torch.tensor([[True, False, True, True, True], [False, False, True, True, False]])
    found = attend_memory(
        x, keys, values, F.silu, mask=mask if has_mask else None, on_factors=on_factors, drop_share=drop_share
    )
    every = mask if has_mask else torch.ones_like(mask)
    torch.testing.assert_close(found, plain_sum(x, keys, values, every, on_factors, drop_share))


def test_dropout_of_scores_keeps_their_mean() -> None:
    x, keys, values = random(1, 1, 4), random(1, 4000, 4, seed=1), torch.ones(1, 4000, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(
        attend_memory(x, keys, values, torch.sigmoid, dropout=0.5),
        attend_memory(x, keys, values, torch.sigmoid),
        rtol=0.1,
        atol=0.0,
    )


def test_rows_that_share_no_memory_are_refused() -> None:
    with pytest.raises(pt.PluginError, match="5 rows of text cannot share the memory of 2 samples"):
        attend_memory(random(5, 3, 4), random(2, 6, 4), random(2, 6, 4), F.silu)


# the method


def golden_model() -> tuple[pt.Sighted, dict[str, Any]]:
    expected = golden("memvp_llama")
    config = {k: v for k, v in expected["config"].items() if k != "rope_theta"}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).double().eval()
    tensors = {
        name: det(f"memvp.{name}", tuple(t["shape"]), t["std"]) + t.get("offset", 0.0)
        for part in ("backbone", "plugin")
        for name, t in expected[part].items()
    }
    with torch.no_grad():
        for name, p in llama.named_parameters():
            p.copy_(tensors[name])
    plugin = pt.MemVP(slots=expected["memory_slots"], hidden=len(tensors["projector.fc1.bias"]), dropout=0.0)
    model = pt.give_eyes(llama, None, plugin, d_image=expected["feature_dim"], prove=False)
    plugin.double()
    with torch.no_grad():
        for maps, name in ((plugin.down, "fc1"), (plugin.up, "fc2")):
            maps.weight[0].copy_(tensors[f"projector.{name}.weight"])
            maps.bias[0].copy_(tensors[f"projector.{name}.bias"])
        plugin.key_positions.copy_(tensors["key_position_embedding"])
        plugin.value_positions.copy_(tensors["value_position_embedding"])
    return model, expected


@pytest.mark.parametrize("indicator", [[1, 1], [1, 0]])
def test_memvp_agrees_with_the_authors_code(indicator: list[int]) -> None:
    model, expected = golden_model()
    features = det("memvp.image_features", (2, expected["image_tokens"], expected["feature_dim"]), 1.0)
    ids, result = torch.tensor(expected["input_ids"]), expected["results"][str(indicator)]
    logits = model(features=features, indicator=torch.tensor(indicator), input_ids=ids).logits
    last = torch.tensor(result["last_logits"], dtype=torch.float64)
    # their rotary tables are float32
    torch.testing.assert_close(logits[:, -1, : last.shape[1]], last, rtol=1e-5, atol=1e-5)
    assert logits.sum().item() == pytest.approx(result["sum"], rel=1e-5)
    (logits * det("memvp.cotangent", tuple(logits.shape), 1.0)).sum().backward()
    plugin = model.plugin
    norms = {
        "key_position_embedding": plugin.key_positions.grad.norm().item(),
        "value_position_embedding": plugin.value_positions.grad.norm().item(),
        "projector.fc1.weight": plugin.down.weight[0].grad.norm().item(),
        "projector.fc2.bias": plugin.up.bias[0].grad.norm().item(),
    }
    assert norms == pytest.approx(result["grad_norms"], rel=1e-5)


@pytest.mark.parametrize(
    ("d", "slots", "own", "total"), [(4096, 320, 3_281_024, 3_879_040), (5120, 400, 4_887_680, 5_487_744)]
)
def test_counts_are_the_papers(d: int, slots: int, own: int, total: int) -> None:
    # all layers share the memory, so that one stands for the 32 of LLaMA-7B and the 40 of LLaMA-13B
    config = transformers.LlamaConfig(hidden_size=d, num_hidden_layers=1)
    import timm

    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(config)
        clip = timm.create_model("vit_large_patch14_clip_224", num_classes=0)
    plugin, adapters = pt.MemVP(slots=slots), pt.AdaptFormer(dim=12, bias=False)
    plugin.attach(language_view_of(llama).sites(llama, d_image=1024))
    adapters.attach(view_of(clip).sites(clip))
    counts = [sum(p.numel() for p in module.parameters()) for module in (plugin, adapters)]
    assert counts == [own, 589_824]
    assert own == 2 * slots * d + 128 * (1024 + d + 1) + d
    # the paper's total counts a modality embedding of two vectors, which nothing reads
    assert sum(counts) + 2 * d == total


def test_fresh_memory_is_as_the_paper_starts() -> None:
    plugin = pt.give_eyes(LANGUAGE_MODELS["llama"](), None, pt.MemVP(), d_image=D_IMAGE, prove=False).plugin
    assert plugin.key_positions.shape == (1, 320, WIDTH)
    assert plugin.key_positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert not plugin.value_positions.any()
    bound = (6 / (D_IMAGE + 128)) ** 0.5
    assert 0.9 * bound < plugin.down.weight[0].max().item() <= bound


def test_memory_is_its_formula() -> None:
    plugin = sighted(scale=0.3, image_scale=0.2).plugin
    features, indicator = random(2, 4, D_IMAGE), torch.tensor([1.0, 0.0])
    keys, values = plugin.memory(features, indicator)
    for row in range(2):
        for slot in range(10):
            entry = torch.zeros(WIDTH)
            if slot < 4 and indicator[row]:
                code = F.silu(plugin.down.weight[0] @ features[row, slot] + plugin.down.bias[0])
                entry = 0.2 * (plugin.up.weight[0] @ code + plugin.up.bias[0])
            torch.testing.assert_close(keys[row, slot], entry + plugin.key_positions[0, slot])
            torch.testing.assert_close(values[row, slot], 0.3 * (entry + plugin.value_positions[0, slot]))


def test_layer_adds_the_plain_sum() -> None:
    model = sighted(on_factors=True, drop_share=0.3)
    memory = model.plugin.memory(random(2, 4, D_IMAGE), torch.ones(2))
    site, x = model.plugin.sites[1], random(4, 3, WIDTH, seed=1)
    every = torch.ones(2, 10, dtype=torch.bool)
    expected = plain_sum(x, *memory, every, on_factors=True, drop_share=0.3)
    torch.testing.assert_close(model.plugin.recall(site, x, memory, F.silu), expected, rtol=1e-4, atol=1e-4)


@every_model
def test_indicator_of_zero_leaves_the_static_memory(name: str) -> None:
    model, ids = sighted(name), tokens(2, 5)
    features = random(2, 4, D_IMAGE)
    texts = {"input_ids": ids, "labels": ids}
    unseen = model(features=features, indicator=torch.tensor([0, 1]), **texts).logits[0]
    torch.testing.assert_close(unseen, model(**texts).logits[0], rtol=1e-4, atol=1e-5)
    seen = model(features=features, **texts).logits[0]
    assert (seen - unseen).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_memory_beside_is_memory_within_an_ungated_layer(name: str) -> None:
    model, wide = sighted(name), LANGUAGE_MODELS[name]()
    keys, values = (t[0].detach() for t in model.memory())
    for part in language_view_of(wide).feed_forwards(wide):
        first, last = (part.entry, part.exit) if name == "bart" else (part.entry.wi, part.entry.wo)
        first.weight = nn.Parameter(torch.cat([first.weight, keys]))
        if first.bias is not None:
            first.bias = nn.Parameter(F.pad(first.bias, (0, len(keys))))
        last.weight = nn.Parameter(torch.cat([last.weight, values.T], dim=1))
    texts = {"input_ids": tokens(2, 5), "labels": tokens(2, 4, seed=1)}
    torch.testing.assert_close(model(**texts).logits, wide(**texts).logits, rtol=1e-4, atol=1e-5)


def test_several_images_are_their_entries_side_by_side() -> None:
    model, ids = sighted(eyes=eyes(), slots=40), tokens(2, 5)
    images = random(2, 2, 3, 32, 32)
    both = model(images, input_ids=ids).logits
    features = torch.cat([model.eyes(images[:, 0]), model.eyes(images[:, 1])], dim=1)
    torch.testing.assert_close(both, model(features=features, input_ids=ids).logits)
    # the first text has one image only: as if it were alone with it
    fewer = model(images, torch.tensor([[1, 0], [1, 1]]), input_ids=ids).logits
    torch.testing.assert_close(fewer[:1], model(images[:1, 0], input_ids=ids[:1]).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fewer[1], both[1])


def test_one_image_serves_all_texts() -> None:
    model, ids, features = sighted(), tokens(3, 5), random(1, 4, D_IMAGE)
    shared = model(features=features, input_ids=ids).logits
    torch.testing.assert_close(shared, model(features=features.expand(3, -1, -1), input_ids=ids).logits)


# gradients


@every_model
def test_text_alone_gives_every_tensor_a_gradient(name: str) -> None:
    vision = pt.adapt(eyes(), pt.AdaptFormer(dim=2), prove=False)
    model = sighted(name, vision, slots=20).train()
    losses(model).backward()
    names = [name for name, _ in model.trained()]
    assert {name.split(".")[0] for name in names} == {"eyes", "plugin"}
    assert [name for name, p in model.trained() if p.grad is None] == []
    found = gradients(model)
    # with images, nothing is left at zero
    losses(model, images=random(2, 3, 32, 32)).backward()
    dead = [name for name, p in model.trained() if not p.grad.any() and "eyes" not in name]
    assert dead == []
    assert found["plugin.key_positions"].any()
    assert not found["plugin.down.weight.0"].any()


@every_model
def test_checkpointed_gradients_are_equal(name: str) -> None:
    model = sighted(name, dropout=0.3).train()
    found = []
    for is_on in (False, True):
        model.set_checkpointing(is_on)
        torch.manual_seed(5)
        # two passes before one backward: what is computed again must read its own memory
        first = losses(model, features=random(2, 4, D_IMAGE))
        second = losses(model, 1, features=random(2, 6, D_IMAGE, seed=1), indicator=torch.tensor([1, 0]))
        (first + 3 * second).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert all(grad.any() for grad in found[0].values())


@every_model
def test_two_passes_give_the_sum_of_their_gradients(name: str) -> None:
    model = sighted(name).train()
    batches = [{"seed": i, "features": random(2, 4, D_IMAGE, seed=i)} for i in range(2)]
    for batch in batches:
        losses(model, **batch).backward()
    apart = gradients(model)
    model.set_checkpointing(True)
    sum(losses(model, **batch) for batch in batches).backward()
    torch.testing.assert_close(gradients(model), apart, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused() -> None:
    model = sighted().train()
    model.language_model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(pt.BackboneError, match="reentrant, which would lose the memory's gradient"):
        losses(model)


# the hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_is_independent(duplicate: Any) -> None:
    model, ids, features = sighted(), tokens(2, 5), random(2, 4, D_IMAGE)
    before = model(features=features, input_ids=ids).logits
    other = duplicate(model)
    torch.testing.assert_close(other(features=features, input_ids=ids).logits, before, rtol=0, atol=0)
    with torch.no_grad():
        for p in other.plugin.parameters():
            p.zero_()
    other.plugin.scale, other.plugin.on_factors = 0.0, True
    assert not torch.allclose(other(features=features, input_ids=ids).logits, before)
    torch.testing.assert_close(model(features=features, input_ids=ids).logits, before, rtol=0, atol=0)


@every_model
def test_language_model_is_never_touched(name: str) -> None:
    plain, ids = LANGUAGE_MODELS[name](), tokens(2, 5)
    texts = {"input_ids": ids, "labels": ids}
    before, state = plain(**texts).logits, {k: v.clone() for k, v in plain.state_dict().items()}
    model = pt.give_eyes(plain, None, pt.MemVP(slots=8), d_image=D_IMAGE).train()
    model.set_checkpointing(True)
    losses(model, features=random(2, 4, D_IMAGE)).backward()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in plain.modules())
    assert all(p.requires_grad and p.grad is None for p in plain.parameters())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in plain.modules())
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert torch.equal(plain(**texts).logits, before)
    weights = zip(plain.parameters(), model.language_model.parameters(), strict=True)
    assert all(p.data_ptr() == q.data_ptr() for p, q in weights)


def test_passes_in_two_threads_keep_their_memories() -> None:
    models = [sighted(), sighted("bart")]
    work = [(models[i % 2], tokens(2, 5, i), random(2, 4, D_IMAGE, seed=i)) for i in range(6)]

    @torch.no_grad()
    def run(case: tuple[pt.Sighted, Tensor, Tensor]) -> Tensor:
        model, ids, features = case
        return torch.stack([model(features=features, input_ids=ids).logits for _ in range(3)])

    expected = [run(case) for case in work]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, work))
    torch.testing.assert_close(found, expected)


def test_pass_within_another_reads_its_own_memory() -> None:
    outer, inner, ids = sighted(), sighted("qwen2"), tokens(2, 5)
    features = random(2, 4, D_IMAGE)
    expected = [model(features=features, input_ids=ids).logits for model in (outer, inner)]
    found = []
    embed = outer.language_model.get_input_embeddings()
    embed.register_forward_hook(lambda *_: found.append(inner(features=features, input_ids=ids).logits))
    torch.testing.assert_close([outer(features=features, input_ids=ids).logits, *found], expected)


def test_language_model_inside_is_not_to_be_called_alone() -> None:
    model = sighted()
    with pytest.raises(pt.PluginError, match="call the model with eyes"):
        model.language_model(input_ids=tokens(2, 5))


@pytest.mark.compile
def test_compiled_language_model_is_one_graph_and_reads_each_memory() -> None:
    from torch._dynamo.testing import CompileCounter

    model, ids, counter = sighted(), tokens(2, 5), CompileCounter()
    memories = [random(2, 4, D_IMAGE, seed=i) for i in range(2)]
    with torch.no_grad():
        expected = [model(features=features, input_ids=ids).logits for features in memories]
        model.language_model.compile(backend=counter, fullgraph=True)
        found = [model(features=features, input_ids=ids).logits for features in memories]
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected)


@every_model
def test_half_precision_keeps_the_plugin_whole(name: str) -> None:
    plain = LANGUAGE_MODELS[name]().bfloat16()
    for part in language_view_of(plain).feed_forwards(plain):
        if name.startswith("t5"):
            part.entry.wo.float()  # as `from_pretrained` loads it
    model = pt.give_eyes(plain, None, pt.MemVP(slots=8), d_image=D_IMAGE).train()
    losses(model, features=random(2, 4, D_IMAGE)).backward()
    assert {p.dtype for _, p in model.trained()} == {torch.float32}
    assert model.memory().keys.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for _, p in model.trained())


# the eyes


@pytest.mark.parametrize("block", [-1, -2, 0])
def test_features_are_those_of_the_block(block: int) -> None:
    vit, images = eyes("dinov2_registers"), random(2, 3, 32, 32)
    found = Eyes(pt.adapt(vit, prove=False), block)(images)
    (expected,) = vit.get_intermediate_layers(images, n=[range(2)[block]], norm=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["hf_clip", "hf_siglip", "siglip", "swin", "hf_dinov2_registers", "open_clip_plain"])
def test_every_encoder_with_a_view_can_be_eyes(name: str) -> None:
    model = sighted(eyes=eyes(name), slots=80)
    found = model(random(2, 3, 32, 32), input_ids=tokens(2, 5)).logits
    assert not torch.allclose(found, model(input_ids=tokens(2, 5)).logits)
    assert [name for name, _ in model.trained() if name.startswith("eyes")] == []


def test_trained_eyes_learn_with_the_memory() -> None:
    vision = pt.adapt(eyes(), pt.AdaptFormer(dim=2), prove=False)
    model = shown_block(vision, -2)
    names = [name for name, _ in model.trained() if name.startswith("eyes")]
    # one of two blocks runs
    assert len(names) == 4
    torch.nn.init.ones_(model.get_parameter(names[0]))
    losses(model, images=random(2, 3, 32, 32)).backward()
    assert any(model.get_parameter(name).grad.any() for name in names)


def shown_block(vision: pt.Adapted, block: int) -> pt.Sighted:
    plugin = pt.MemVP(slots=20, image_scale=1.0)
    return pt.give_eyes(LANGUAGE_MODELS["llama"](), vision, plugin, block=block, prove=False).train()


# refusals


def test_language_models_without_a_view_are_refused() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)
    with pytest.raises(pt.BackboneError, match=r"GPT2LMHeadModel: looked for(.|\n)*LlamaForCausalLM"):
        pt.give_eyes(transformers.GPT2LMHeadModel(config), eyes(), pt.MemVP())


def test_missing_part_is_named() -> None:
    plain = LANGUAGE_MODELS["llama"]()
    plain.model.layers[1].mlp.act_fn = None
    with pytest.raises(pt.BackboneError, match=r"looked for mlp\.act_fn of type Module, found NoneType"):
        pt.give_eyes(plain, eyes(), pt.MemVP())


class _Elsewhere(Decoder):
    """Says that the last layer's feed-forward part is a module that never runs."""

    def feed_forwards(self, model: Any) -> list[FeedForward]:
        *parts, last = super().feed_forwards(model)
        away = nn.Identity()
        return [*parts, FeedForward(last.site, last.layer, last.handed, away, away, last.activation)]


def test_layer_that_is_not_reached_fails_the_proof() -> None:
    with pytest.raises(pt.ProofError, match=r"never calls layers\.1\.mlp: it would read no image there"):
        prove_language_view(_Elsewhere(), LANGUAGE_MODELS["llama"]())


@every_model
def test_every_view_passes_its_proof(name: str) -> None:
    model = LANGUAGE_MODELS[name]()
    view = language_view_of(model)
    prove_language_view(view, model)
    names = [site.name for site in view.sites(model, 7)[1:]]
    assert len(set(names)) == len(names) == (4 if name in SEQ2SEQ else 2)


@pytest.mark.parametrize("name", LANGUAGE_VIEWS)
def test_row_of_the_language_view_table_is_a_class_of_transformers(name: str) -> None:
    cls = getattr(transformers, name.rpartition(".")[2])
    assert f"{cls.__module__}.{cls.__qualname__}" == name


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda m: m(features=random(2, 11, D_IMAGE)), r"11 image features do not fit into 10 slots: use MemVP"),
        (lambda m: m(features=random(2, 4, D_IMAGE), input_ids=tokens(4, 5)), "4 texts and images of 2"),
        (lambda m: m(features=random(2, 4, D_IMAGE), indicator=torch.ones(3)), r"\(3,\) does not fit 2 samples of 4"),
        (lambda m: m(random(2, 3, 32, 32)), "images were given, and the model has no eyes for them"),
        (lambda m: m(indicator=torch.tensor([0, 1])), "the indicator says that there are images"),
    ],
)
def test_images_that_do_not_fit_are_refused(call: Any, fault: str) -> None:
    with pytest.raises(pt.PluginError, match=fault):
        call(sighted())


def test_settings_that_do_not_fit_are_refused() -> None:
    llama = LANGUAGE_MODELS["llama"]()
    with pytest.raises(pt.PluginError, match="16 image features do not fit into 8 slots"):
        pt.give_eyes(llama, eyes(), pt.MemVP(slots=8), prove=False)
    with pytest.raises(pt.BackboneError, match="block 2 was asked for; this VisionTransformer has 2 blocks"):
        pt.give_eyes(llama, eyes(), pt.MemVP(), block=2, prove=False)
    with pytest.raises(pt.PluginError, match="without eyes it is d_image"):
        pt.give_eyes(llama, None, pt.MemVP(), prove=False)
    vision = pt.adapt(eyes(), classes=["cat", "dog"], prove=False)
    with pytest.raises(pt.PluginError, match="eyes need no head"):
        pt.give_eyes(llama, vision, pt.MemVP(), prove=False)
    with pytest.raises(pt.PluginError, match="give_eyes"):
        pt.adapt(eyes(), pt.MemVP(), prove=False)
    with pytest.raises(pt.PluginError, match=r"drop_share is at least 0 and below 1, got 1\.0"):
        pt.MemVP(drop_share=1.0)
    with pytest.raises(pt.PluginError, match="slots and hidden are at least 1, got 0 and 128"):
        pt.MemVP(slots=0)


# the cost


def test_reading_costs_two_products_a_layer() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    d, length, slots = 256, 64, 20
    config = {"hidden_size": d, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **config)).eval()
    model = pt.give_eyes(llama, None, pt.MemVP(slots=slots), d_image=D_IMAGE, prove=False)
    texts = {"input_ids": tokens(1, length)}

    def flops(run: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    plain, memory = flops(lambda: llama(**texts)), flops(lambda: model.memory())
    # L tokens meet m keys, then m values, in each of two layers; the memory is computed once
    assert flops(lambda: model(**texts)) == plain + memory + 2 * (2 * 2 * length * slots * d)
    found = model(features=random(1, 4, D_IMAGE), **texts)
    # versions of transformers call it by two names
    cache = found["cache" if "cache" in found else "past_key_values"]
    assert cache.get_seq_length() == length
