"""Where the patches of an image go: traced against a plain loop over sets, drawn against means by hand; the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import petiole as pt
import test_cli
from fitting import make_model
from models import MODELS
from petiole.cli._options import read_budget
from petiole.core.adapted import Adapted
from petiole.core.attended import Attended
from petiole.core.flow import Flow
from petiole.core.site import Site
from petiole.core.taps import Taps
from petiole.train.merge_map import CAPTION, MARGIN, PANEL, MergeMap, draw, paint, trace
from test_cli import Command

petiole, plugin = test_cli.petiole, test_cli.plugin

Groups = list[list[set[int]]]


class Seen(Taps):
    """Taps that keep what each reducer decided by."""

    def tokens(self, name: str, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        self.kept.append((attended.keys[0].mean(dim=0), attended, flow))
        return super().tokens(name, x, attended, flow)


def seen_by(model: Adapted, image: Tensor) -> tuple[list[Any], Flow]:
    """What the reducers of a model saw, and the facts about its final tokens."""
    taps = Seen(model.taps.plugins)
    taps.kept = []
    _, flow = model.view.run(model.backbone, image[None], taps)
    return taps.kept, flow


def merged_by_loop(model: Adapted, image: Tensor, count: int) -> Groups:
    """The patches in each token after each block, where each merges `count` pairs: sets, token by token."""
    kept, _ = seen_by(model, image)
    groups: Groups = [[{i} for i in range(len(kept[0][0]) - kept[0][2].num_prefix)]]
    for keys, _, flow in kept:
        start, now = flow.num_prefix, groups[-1]
        even, odd = ([i for i in range(start, len(keys)) if i % 2 == parity] for parity in (0, 1))
        best = {i: max((F.cosine_similarity(keys[i], keys[j], dim=0).item(), -j) for j in odd) for i in even}
        order = sorted(even, key=lambda i: -best[i][0])
        joining = order[:count]
        joined = {j: now[j - start].union(*(now[i - start] for i in joining if -best[i][1] == j)) for j in odd}
        stay = [i for i in (even if start else order) if i not in joining]
        groups.append([now[i - start] for i in stay] + list(joined.values()))
    return groups


def pruned_by_loop(model: Adapted, image: Tensor, count: int) -> Groups:
    """The patches in each token after each block, where each fuses the `count + 1` of least attention."""
    kept, _ = seen_by(model, image)
    groups: Groups = [[{i} for i in range(len(kept[0][0]) - kept[0][2].num_prefix)]]
    for _, attended, flow in kept:
        scores, now = attended.class_attention(flow)[0, flow.num_prefix :].tolist(), groups[-1]
        dropped = sorted(range(len(now)), key=lambda i: scores[i])[: count + 1]
        groups.append([g for i, g in enumerate(now) if i not in dropped] + [set().union(*(now[i] for i in dropped))])
    return groups


def as_sets(merges: MergeMap) -> Groups:
    return [
        [{i for i, token in enumerate(ended) if token == n} for n in range(max(ended) + 1)]
        for ended in merges.groups.flatten(1).tolist()
    ]


def compressed(name: str, method: str = "tome", budget: Any = 3) -> tuple[Adapted, Tensor]:
    model = pt.compress(MODELS[name](), budget, method=method).eval()
    return model, model.view.probe(model.backbone, 1)[0]


@pytest.mark.parametrize(
    "name", ["vit", "deit_distilled", "dinov2_registers", "siglip", "vit_non_square", "hf_vit", "torchvision"]
)
def test_merged_patches_are_those_of_the_plain_loop(name: str) -> None:
    model, image = compressed(name)
    merges, (_, flow) = trace(model, image), seen_by(model, image)
    assert as_sets(merges) == merged_by_loop(model, image, 3)
    assert [len(group) for group in as_sets(merges)[-1]] == flow.sizes[0, flow.num_prefix :].tolist()
    first = flow.num_prefix + merges.groups[0].numel()
    assert merges.num_tokens == (first, first - 3, first - 6)
    assert merges.largest(2) == max(flow.sizes[0])
    assert not merges.pruned.any()


def test_grid_is_that_of_the_image() -> None:
    model, image = compressed("vit_non_square")
    merges = trace(model, image)
    assert merges.grid == (3, 5)
    assert merges.groups[0].tolist() == torch.arange(15).reshape(3, 5).tolist()


@pytest.mark.parametrize("name", ["vit", "dinov2_registers", "hf_vit"])
def test_pruned_patches_are_those_of_the_plain_loop(name: str) -> None:
    model, image = compressed(name, "evit")
    merges, expected = trace(model, image), pruned_by_loop(model, image, 3)
    assert as_sets(merges) == expected
    fused = [set().union(*(group for group in groups if len(group) > 1)) for groups in expected]
    assert [set(row.nonzero().flatten().tolist()) for row in merges.pruned.flatten(1)] == fused


def test_prompts_are_no_patches_and_mode_and_answer_stay() -> None:
    model = pt.adapt(MODELS["vit"](), pt.VPT(num_prompts=2), pt.ToMe(budget=3), prove=False).train()
    image = model.view.probe(model.backbone, 1)[0]
    merges = trace(model, image)
    assert merges.num_tokens == (19, 16, 13)
    assert model.training
    assert as_sets(merges) == merged_by_loop(model.eval(), image, 3)


def test_budget_of_nothing_leaves_every_patch_by_itself() -> None:
    merges = trace(*compressed("vit", budget=0))
    assert as_sets(merges) == [[{i} for i in range(16)]] * 3


class Dropping(pt.ToMe):
    """Drops the patches whose keys, or whose values, are the smallest."""

    by_values = False

    def reduce(self, site: Site, x: Tensor, attended: Attended, flow: Flow) -> tuple[Tensor, Flow]:
        scores = x.norm(dim=-1) if self.by_values else attended.keys.mean(dim=1).norm(dim=-1)
        kept = scores[0, flow.num_prefix :].argsort()[2:].sort().values + flow.num_prefix
        return torch.cat([x[:, : flow.num_prefix], x[:, kept]], dim=1), replace(flow, grid=None)


def test_dropped_patches_have_no_token() -> None:
    model = pt.adapt(MODELS["vit"](), Dropping(), prove=False).eval()
    merges = trace(model, model.view.probe(model.backbone, 1)[0])
    assert [int((groups < 0).sum()) for groups in merges.groups] == [0, 2, 4]
    assert torch.equal(merges.pruned, merges.groups < 0)
    assert sorted(merges.groups[2].flatten().tolist()) == [-1] * 4 + list(range(12))


def test_what_cannot_be_traced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dropping, "by_values", True)
    model = pt.adapt(MODELS["vit"](), Dropping(), prove=False).eval()
    with pytest.raises(pt.PluginError, match=r"Dropping at blocks.0.tokens decides by the tokens' values"):
        trace(model, model.view.probe(model.backbone, 1)[0])
    model = pt.adapt(MODELS["swin"](), prove=False)
    with pytest.raises(pt.PluginError, match="no token can go in this SwinTransformer"):
        trace(model, model.view.probe(model.backbone, 1)[0])


# the picture

# 2 x 3 patches of 4 x 4 pixels: the corners are one token, two patches were pruned into another
HAND = torch.tensor([[0, 1, 0], [0, 2, 2]])
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 12), dtype=np.uint8))


def test_group_has_the_mean_colour_of_its_pixels() -> None:
    panel, side = paint(PIXELS, HAND, HAND == 2), 4 * PANEL // 8
    assert panel.shape == (512, 768, 3)
    inside = [PIXELS[:, 0:4, 0:4], PIXELS[:, 0:4, 8:12], PIXELS[:, 4:8, 0:4]]
    mean = [round(sum(int(v) for patch in inside for v in patch[c].flatten()) / 48) for c in range(3)]
    for row, column in ((0, 0), (0, 2), (1, 0)):
        patch = panel[row * side + 1 : (row + 1) * side - 1, column * side + 1 : (column + 1) * side - 1]
        assert patch.reshape(-1, 3).min(axis=0).tolist() == patch.reshape(-1, 3).max(axis=0).tolist() == mean
    # no line between two patches of one group
    assert panel[side - 1 : side + 1, side // 2].tolist() == [mean, mean]


def test_patch_by_itself_keeps_its_pixels_and_a_pruned_one_is_grey() -> None:
    panel, side = paint(PIXELS, HAND, HAND == 2), 4 * PANEL // 8
    whole = np.asarray(Image.fromarray(PIXELS.permute(1, 2, 0).numpy()).resize((768, 512), Image.Resampling.BICUBIC))
    alone = np.s_[1 : side - 1, side + 1 : 2 * side - 1]
    assert (panel[alone] == whole[alone]).all()
    pruned = panel[side + 1 : -1, side + 1 :]
    assert (pruned == pruned[..., :1]).all()
    assert 96 <= pruned.min() < pruned.max() <= 160


@pytest.mark.parametrize(("value", "line"), [(200, 0), (50, 255)])
def test_line_between_groups_shows_on_any_colour(value: int, line: int) -> None:
    panel = paint(torch.full((3, 8, 12), value, dtype=torch.uint8), HAND, torch.zeros(2, 3, dtype=torch.bool))
    expected = np.full((512, 768), value)
    expected[:256, [255, 256, 511, 512]] = line  # left and right of 1
    expected[255:257, 256:] = line  # below 1 and 0
    expected[256:, [255, 256]] = line  # left of 2
    assert (panel == expected[..., None]).all()


def test_sheet_has_a_panel_for_the_image_and_for_each_block() -> None:
    merges = MergeMap((7, 5, 4), torch.stack([torch.arange(6).reshape(2, 3), HAND, HAND]), torch.zeros(3, 2, 3) > 0)
    sheet = draw(PIXELS, merges)
    assert sheet.size == (3 * 768 + 4 * MARGIN, CAPTION + 512 + MARGIN)
    left = MARGIN + 768 + MARGIN
    shown = sheet.crop((left, CAPTION, left + 768, CAPTION + 512))
    assert (np.asarray(shown) == paint(PIXELS, HAND, merges.pruned[1])).all()
    assert draw(PIXELS, merges, [2]).width == 2 * 768 + 3 * MARGIN


def test_what_cannot_be_drawn_is_refused() -> None:
    merges = MergeMap((7, 5), torch.stack([HAND, HAND]), torch.zeros(2, 2, 3) > 0)
    with pytest.raises(pt.PluginError, match="there is no block 2: the backbone has 1, choose from 1 to 1"):
        draw(PIXELS, merges, [1, 2])
    with pytest.raises(pt.PluginError, match="2 x 3 patches do not tile an image of 8 x 13 pixels"):
        paint(torch.zeros(3, 8, 13, dtype=torch.uint8), HAND, HAND == 2)


# the command


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_command_writes_a_picture_and_says_how_the_tokens_fall(petiole: Command, photo: Path) -> None:
    answer = petiole("show-merge", photo, "--budget", 1)
    assert answer.code == 0
    rows = [line.split() for line in answer.out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:3] for row in rows] == [["1", "5", "4"], ["2", "4", "3"]]
    assert [path.name for path in Path.cwd().iterdir()] == ["cat-merged.png"]
    with Image.open("cat-merged.png") as picture:
        assert picture.size == (3 * 512 + 4 * MARGIN, 512 + CAPTION + MARGIN)
        assert "wrote cat-merged.png: Adapted(" in answer.err
        assert f"{picture.width} x {picture.height} pixels" in answer.err


def test_command_draws_the_blocks_asked_for(petiole: Command, photo: Path) -> None:
    answer = petiole("show-merge", photo, "-m", "evit", "--budget", "0.5", "--blocks", "2", "-o", "x.png", "--json")
    found = json.loads(answer.out)
    assert (found["file"], found["grid"], found["num_tokens"]) == ("x.png", [2, 2], [5, 3, 2])
    with Image.open("x.png") as picture:
        assert list(picture.size) == found["size"] == [2 * 512 + 3 * MARGIN, 512 + CAPTION + MARGIN]


def test_what_exists_is_replaced_only_by_force(petiole: Command, photo: Path) -> None:
    Path("cat-merged.png").write_text("mine")
    assert "cat-merged.png exists already" in petiole("show-merge", photo).error
    assert Path("cat-merged.png").read_text() == "mine"
    assert petiole("show-merge", photo, "--force").code == 0
    assert Path("cat-merged.png").read_bytes().startswith(b"\x89PNG")


def test_budget_is_that_of_the_plugin_file_unless_another_is_asked_for(
    petiole: Command, plugin: Path, photo: Path
) -> None:
    pt.save(make_model(pt.ToMe(budget=[0, 2], proportional=False)), "short.safetensors")

    def tokens(file: object, *options: object) -> list[int]:
        answer = petiole("show-merge", photo, "--plugin", file, *options, "--force", "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)["num_tokens"]

    assert tokens("short.safetensors") == [5, 5, 3]
    assert tokens("short.safetensors", "--method", "evit") == [5, 5, 3]
    assert tokens("short.safetensors", "--budget", "1") == [5, 4, 3]
    assert tokens(plugin) == [5, 3, 2]  # the default, at most half of the patches
    answer = petiole("show-merge", photo, "--plugin", "short.safetensors", "--budget", "1", "--force", "--json")
    assert json.loads(answer.out)["model"].startswith("Adapted(VisionTransformer, ToMe(budget=1, proportional=False)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.png",), "missing.png cannot be read as an image: there is no such file"),
        (("PLUGIN",), "cannot be read as an image: it is empty or no image of a known format"),
        (("PHOTO", "--budget", "many"), "--budget takes the tokens that each block removes (8), the share"),
        (("PHOTO", "--budget", "1,1,1"), "3 blocks are to remove tokens, but the backbone has 2"),
        (("PHOTO", "--blocks", "last"), "--blocks takes whole numbers with commas between, e.g. 3,6,12; got 'last'"),
        (("PHOTO", "--blocks", "3"), "there is no block 3: the backbone has 2, choose from 1 to 2"),
        (("PHOTO", "--method", "lora"), "'lora' removes no tokens: choose tome or evit"),
        (("PHOTO", "--method", "tom"), "(did you mean 'tome'?)"),
        (("PHOTO", "--backbone", "big"), "no backbone is called 'big'"),
        (("PHOTO", "--plugin", "PHOTO"), "is no plugin file"),
        (("PHOTO", "--out", "x.gif"), "let it end in .png"),
        (("PHOTO", "--out", "nowhere/x.png"), "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(
    petiole: Command, plugin: Path, photo: Path, arguments: tuple[str, ...], message: str
) -> None:
    files = {"PLUGIN": plugin, "PHOTO": photo}
    assert message in petiole("show-merge", *(files.get(word, word) for word in arguments)).error
    assert test_cli.is_empty()


def test_backbone_whose_tokens_cannot_go_is_one_line(
    petiole: Command, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("petiole.backbones.bundled.backbone", lambda name: MODELS["swin"]())
    assert "ToMe needs a place where tokens can go" in petiole("show-merge", photo).error
    assert test_cli.is_empty()


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("8", 8), ("0", 0), ("0.9", 0.9), ("1.0", 1.0), ("8:-1", (8, -1.0)), ("8:0", (8, 0.0)), ("0, 0.7", [0, 0.7]),
        ("8,8,0,4", [8, 8, 0, 4]),
    ],
)  # fmt: skip
def test_budget_is_read_as_it_is_written(text: str, budget: Any) -> None:
    found = read_budget("--budget", text)
    assert found == budget
    assert repr(found) == repr(budget)
    assert pt.ToMe(budget=found).budget == budget


@pytest.mark.parametrize("text", ["", "many", "8:", "8:-1:2", "8,,4", "[8]", "8.5:-1"])
def test_what_is_no_budget_is_refused_with_how_it_is_written(text: str) -> None:
    with pytest.raises(pt.PluginError, match=r"--budget takes .* \(8\), .* \(0.9\), .* \(8:-1\) .* \(8,8,0,4\), got "):
        read_budget("--budget", text)


@pytest.mark.parametrize("text", ["-1", "1.5", "nan", "8:-2", "8,-4.5", "inf"])
def test_budget_out_of_range_is_refused_before_a_backbone_is_built(text: str) -> None:
    with pytest.raises(pt.PluginError, match=r"a block removes a whole number|an inflection lies between"):
        read_budget("--budget", text)
