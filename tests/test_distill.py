"""Distilling a compensator: what a step compares, what is trained, and that a run goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import petiole as pt
import test_cli
from fitting import make_model as make_fitted
from petiole.core.adapted import Adapted
from petiole.tasks import Split
from petiole.tasks.images import Arrays
from petiole.train import distilling
from petiole.train.distilling import Pair
from test_cli import Command

petiole = test_cli.petiole

RECIPE = pt.Recipe(epochs=2, batch_size=8, lr=1e-2, weight_decay=0.05, warmup_epochs=0)


def make_backbone(num_classes: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=num_classes
        )
    with torch.no_grad():
        # merging must matter: as they start, such weights hardly look at the images
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def make_images(num: int = 40) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8)
    return Split(Arrays(pixels, "noise"), np.zeros(num, np.int64))


def make_model(num_classes: int = 5) -> Adapted:
    return pt.adapt(make_backbone(num_classes), pt.ToCom(groups=4, target=4, dropout=0.0))


def distill(model: Adapted, recipe: pt.Recipe = RECIPE, **settings: Any) -> pt.FitResult:
    return pt.distill(model, make_images(), recipe, progress=False, **settings)


def randomise(model: Adapted) -> None:
    with torch.no_grad():
        for parameter in model.plugins.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))


def test_student_at_the_target_imitates_the_plain_model_at_the_source() -> None:
    model = make_model()
    randomise(model)
    images = model.view.probe(model.backbone, 3)
    plugin = model.taps.plugins[0].taken()
    for source, target in ((0, 3), (4, 1)):
        plugin.set_degrees(source, target)
        student = pt.adapt(make_backbone(), plugin.taken(), pt.ToMe(budget=target), prove=False).eval()(images)
        teacher = pt.adapt(make_backbone(), pt.ToMe(budget=source))(images)
        p, q = teacher.softmax(-1), student.softmax(-1)
        # KL(teacher, student), the mean over images and classes
        expected = (p * (p.log() - q.log())).sum() / (3 * 5)
        torch.testing.assert_close(Pair(model, None).eval()(images, source, target), expected)
    # its own degrees stay
    assert (model.plugins[0].source, model.plugins[0].target) == (0, 4)


def test_backbone_without_a_classifier_compares_features_or_a_heads_answers() -> None:
    model = make_model(num_classes=0)
    randomise(model)
    images = model.view.probe(model.backbone, 3)
    source, target, head = 0, 4, nn.Linear(32, 7)
    plugin = model.taps.plugins[0].taken()
    plugin.set_degrees(source, target)
    student = pt.adapt(make_backbone(0), plugin, pt.ToMe(budget=target), prove=False).eval()(images)
    teacher = pt.adapt(make_backbone(0), pt.ToMe(budget=source))(images)
    torch.testing.assert_close(Pair(model, None).eval()(images, source, target), F.mse_loss(student, teacher))
    p, q = head(teacher).softmax(-1), head(student).softmax(-1)
    torch.testing.assert_close(Pair(model, head).eval()(images, source, target), (p * (p / q).log()).sum() / (3 * 7))


def test_only_the_compensator_learns_and_the_pairs_get_closer() -> None:
    backbone = make_backbone()
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    model = pt.adapt(backbone, pt.ToCom(groups=4, target=4, scale=0.3, dropout=0.0))
    fresh = {name: t.clone() for name, t in model.plugins.state_dict().items()}
    # real images: what holds for noise holds for no other noise
    images = pt.open_images("digits").part(range(160))
    result = pt.distill(model, images, pt.Recipe(epochs=8, batch_size=16, lr=3e-3, warmup_epochs=0), progress=False)
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert all(not torch.equal(t, fresh[name]) for name, t in model.plugins.state_dict().items())
    assert result.metrics["loss_with"] < 0.9 * result.metrics["loss_without"]
    assert result.metrics["pairs_improved"] > 0.5
    assert result.metrics["trained_parameters"] == 2 * 2 * 4 * 2 * (32 + 32)
    assert (model.plugins[0].source, model.plugins[0].target) == (0, 4)
    assert not model.training


def test_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_model()
    distill(whole, out=tmp_path / "whole")
    steps, stopped = [], make_model()
    take = distilling.PairSteps.take

    def until(self: Any, step: int) -> Any:
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return take(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(distilling.PairSteps, "take", until)
        with pytest.raises(KeyboardInterrupt):
            distill(stopped, out=tmp_path / "parts", save_every=0)
    again = make_model()
    distill(again, out=tmp_path / "parts")
    files = [(tmp_path / name / "plugin.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    assert all(torch.equal(a, b) for a, b in zip(again.plugins.parameters(), whole.plugins.parameters(), strict=True))


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pt.FitError, match="trains a ToCom alone on a backbone, got Adapted"):
        distill(pt.adapt(make_backbone(), pt.ToCom(groups=4, target=4), classes=["a", "b"]))
    with pytest.raises(pt.FitError, match="trains a ToCom alone"):
        distill(pt.adapt(make_backbone(), pt.LoRA(rank=2)))
    with pytest.raises(pt.FitError, match="5 images are too few to distill from: at least 20"):
        pt.distill(make_model(), make_images(5), progress=False)
    distill(make_model(), out=tmp_path)
    with pytest.raises(pt.FitError, match=r"holds a run with other settings \(plugins\.0\.groups 4 -> 3"):
        distill(pt.adapt(make_backbone(), pt.ToCom(groups=3, target=2)), out=tmp_path)


def test_images_without_labels_come_from_folders_packs_and_tasks(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / "any" / str(i)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "any" / str(i) / "x.png")
    (tmp_path / "none").mkdir()
    images = pt.open_images([tmp_path / "any", "digits"])
    assert len(images) == 3 + len(pt.open_task("digits").train)
    assert images.images[2].getpixel((0, 0)) == (2, 0, 0)
    assert not images.labels.any()
    with pytest.raises(pt.TaskError, match="none holds no image"):
        pt.open_images(tmp_path / "none")
    with pytest.raises(pt.TaskError, match="no images were given"):
        pt.open_images([])
    with pytest.raises(pt.TaskError, match="no task is called"):
        pt.open_images("nothing-here")


def test_command_writes_a_compensator_that_compress_takes(petiole: Command, tmp_path: Path) -> None:
    for i in range(24):
        Image.effect_noise((32, 32), 10 + 4 * i).save(tmp_path / f"{i}.png")
    words = ["distill", tmp_path, "--backbone", "tiny", "--groups", 2, "--epochs", 1, "--batch-size", 12, "--json"]
    answer = petiole(*words)
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["trained_parameters"] == 2 * 2 * 2 * 2 * (32 + 32)
    fast = pt.compress(make_fitted(), r=1, compensator="runs/tiny-tocom/plugin.safetensors")
    assert fast.taps.plugins[1].settings() == pt.ToCom(groups=2, target=1).settings()
    assert "this run is finished" in petiole(*words).err
    assert "nothing.safetensors" in petiole(*words, "--head", "nothing.safetensors").error
    assert "has no head" in petiole(*words, "--head", "runs/tiny-tocom/plugin.safetensors").error


def test_blocks_computed_again_see_the_degrees_of_their_step() -> None:
    plain, again = make_model(), make_model()
    for model, checkpoint in ((plain, False), (again, True)):
        distill(model, replace(RECIPE, checkpoint=checkpoint))
    torch.testing.assert_close(again.plugins.state_dict(), plain.plugins.state_dict())
