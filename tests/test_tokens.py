"""Token compression on every family: what changes nothing, what is protected, and what is refused."""

import threading
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import petiole as pt
from models import MODELS
from petiole.backbones import view_of
from petiole.core.adapted import Adapted
from petiole.core.attended import Attended
from petiole.core.flow import Flow
from petiole.core.site import Site

CLASSES = ["a", "b", "c"]


def shortened() -> list[str]:
    """The tiny models in which tokens can go."""
    with torch.random.fork_rng():
        return [n for n, make in MODELS.items() if any(s.kind == "tokens" for s in view_of(make()).sites(make()))]


SHORTENED = shortened()
# their pooling has no weights
UNWEIGHED = ("open_clip_attn_pool", "open_clip_avg")


@pytest.mark.parametrize("name", SHORTENED)
def test_budget_of_nothing_changes_no_bit(name: str) -> None:
    backbone = MODELS[name]().eval()
    images = view_of(backbone).probe(backbone)
    # the walk without plugins equals the model's own forward: that is proven whenever a model is adapted
    assert torch.equal(pt.compress(backbone, 0)(images), pt.adapt(backbone)(images))


@torch.no_grad()
def without_positions(name: str) -> nn.Module:
    """A model that gives equal patches equal tokens."""
    backbone = MODELS[name]().eval().double()
    for parameter, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if "pos" in parameter.lower() and tensor.is_floating_point():
            tensor.zero_()
    return backbone


@pytest.mark.parametrize("name", SHORTENED)
def test_merging_equal_tokens_changes_nothing(name: str) -> None:
    # attention counts a merged token as often as it stands for, and pooling weighs it so: the law of both
    backbone = without_positions(name)
    images = torch.ones_like(view_of(backbone).probe(backbone))
    images *= torch.tensor([0.5, -1.0], dtype=images.dtype).reshape(2, 1, 1, 1)
    if name in UNWEIGHED:
        with pytest.raises(pt.PluginError, match="token compression"):
            pt.compress(backbone, 3)
    else:
        expected = pt.adapt(backbone)(images)
        # an eager kernel of transformers takes its softmax in float32
        torch.testing.assert_close(pt.compress(backbone, 3)(images), expected, rtol=1e-5, atol=1e-5)


class Watch(pt.ToMe):
    """Keeps what it sees."""

    seen: list[tuple[Tensor, Flow, Tensor, Flow]]

    def reduce(self, site: Site, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        y, after = super().reduce(site, x, attended, flow)
        self.seen.append((x, flow, y, after))
        return y, after


def watched(backbone: nn.Module, *plugins: Any, budget: Any = 2) -> tuple[Adapted, Watch]:
    watch = Watch(budget=budget)
    watch.seen = []
    model = pt.adapt(backbone, *plugins, watch, prove=False).eval()
    return model, watch


@pytest.mark.parametrize("name", SHORTENED)
def test_prefix_tokens_are_protected_and_sizes_add_up(name: str) -> None:
    backbone = MODELS[name]().eval()
    view = view_of(backbone)
    model, watch = watched(backbone)
    view.run(model.backbone, view.probe(backbone), model.taps)
    total = watch.seen[0][0].shape[1]
    for x, before, y, after in watch.seen:
        assert torch.equal(y[:, : before.num_prefix], x[:, : before.num_prefix])
        assert x.shape[1] - y.shape[1] == min(2, (x.shape[1] - before.num_prefix) // 2)
        if y.shape[1] < x.shape[1]:
            assert after.grid is None
            assert after.sizes.sum(dim=1).tolist() == [total] * len(x)
            torch.testing.assert_close(after.bias, after.sizes.log()[:, None, None])


def test_prompts_leave_with_their_sizes() -> None:
    backbone = MODELS["vit"]().eval()
    model, watch = watched(backbone, pt.VPT(num_prompts=3))
    tokens, flow = model.view.run(model.backbone, model.view.probe(backbone), model.taps)
    before = watch.seen[-1][3]
    assert flow.sizes.shape == tokens.shape[:2]
    assert flow.sizes.sum() == before.sizes.sum() - 3 * len(tokens)
    assert (flow.num_prefix, flow.num_prompts) == (before.num_prefix - 3, 0)


def test_two_threads_do_not_meet() -> None:
    backbone = MODELS["vit"]().eval()
    model = pt.compress(backbone, 3)
    batches = [model.view.probe(backbone, n) for n in (1, 2, 3, 4)]
    expected, found = [model(images) for images in batches], dict[int, Tensor]()

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = model(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_compressed_model_is_exported() -> None:
    backbone = MODELS["vit"]().eval()
    model = pt.compress(backbone, 3)
    images = model.view.probe(backbone)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


def test_compressing_keeps_plugins_head_and_replaces_an_earlier_budget(tmp_path: Any) -> None:
    model = pt.adapt(pt.backbone("micro"), pt.LoRA(rank=2), classes=CLASSES)
    fast = pt.compress(pt.compress(model, 2), [4, 0, 4])
    assert [plugin.method for plugin in fast.taps.plugins] == ["lora", "tome"]
    assert torch.equal(fast.head.weight, model.head.weight)
    images = model.view.probe(model.backbone)
    assert not torch.equal(fast(images), model(images))
    pt.save(fast, tmp_path / "fast.safetensors")
    again = pt.load(tmp_path / "fast.safetensors", pt.backbone("micro"))
    assert torch.equal(again(images), fast.eval()(images))
    assert pt.inspect(tmp_path / "fast.safetensors").token_budget == [4, 0, 4]
    assert torch.equal(pt.compress(fast, 0).eval()(images), model.eval()(images))


def test_what_cannot_be_shortened_is_refused() -> None:
    with pytest.raises(pt.PluginError, match="ToMe needs a place where tokens can go"):
        pt.compress(MODELS["swin"](), 2)
    convpass = pt.adapt(pt.backbone("micro"), pt.Convpass(), classes=CLASSES)
    with pytest.raises(pt.PluginError, match="Convpass needs the whole patch grid, which ToMe takes apart"):
        pt.compress(convpass, 2)
    with pytest.raises(pt.PluginError, match="full has trained the backbone itself"):
        pt.compress(pt.adapt(pt.backbone("micro"), pt.Full(), classes=CLASSES), 2)
    with pytest.raises(pt.PluginError, match=r"0 or more, .* got -1"):
        pt.ToMe(budget=-1)


def test_model_that_pools_by_the_maximum_is_refused() -> None:
    backbone = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3, global_pool="max"
    )
    with pytest.raises(pt.PluginError, match="pools by 'max', which has no weights for merged tokens"):
        pt.compress(backbone, 2)


@pytest.mark.compile
def test_each_budget_is_compiled_once() -> None:
    model = pt.compress(MODELS["vit"]().eval(), r=3)
    images, counter = model.view.probe(model.backbone), CompileCounter()
    reducer = model.taps.plugins[0]
    assert isinstance(reducer, pt.ToMe)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for r, num_compiled in ((3, 1), (3, 1), (2, 2), (3, 2), (2, 2), (1, 3)):
        reducer.set_budget(r)
        assert torch.equal(compiled(images), model(images))
        assert counter.frame_count == num_compiled
