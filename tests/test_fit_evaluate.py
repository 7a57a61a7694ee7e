"""Scores and predictions against plain counting."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

import petiole as pt
from fitting import make_model, make_split, make_task, vit
from petiole.tasks import Pixels, Split, Transform
from petiole.train.evaluate import evaluate, features, predict
from petiole.train.world import World


def pixels(model: pt.Adapted, num_images: int = 11) -> Pixels:
    return Pixels(make_split(num_images, 3), Transform(model.input_config))


def test_accuracies_are_those_of_plain_counting() -> None:
    model = make_model()
    split = pixels(model, 30)
    images, labels = split.batch(range(30))
    with torch.no_grad():
        answers = model.eval()(split.transform.normalize(images)).argmax(1).numpy()
    truth = labels.numpy()
    per_class = [float(np.mean(answers[truth == c] == c)) for c in np.unique(truth)]
    scores = evaluate(model, split)
    assert scores.accuracy == pytest.approx(float(np.mean(answers == truth)))
    assert scores.mean_class_accuracy == pytest.approx(float(np.mean(per_class)))
    assert scores.num_images == 30


def test_classes_that_do_not_occur_do_not_count() -> None:
    model = make_model()
    split = Split(make_split(2, 3).images, [1, 1])
    scores = evaluate(model, Pixels(split, Transform(model.input_config)))
    assert scores.mean_class_accuracy == scores.accuracy


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_scores_do_not_depend_on_the_batches(batch_size: int) -> None:
    model = make_model()
    assert evaluate(model, pixels(model), batch_size=batch_size) == evaluate(model, pixels(model))


def test_progress_counts_the_images() -> None:
    model, seen = make_model(), []
    evaluate(model, pixels(model), batch_size=4, progress=seen.append)
    assert seen == [4, 8, 11]


def test_modes_stay_as_they_were() -> None:
    model = make_model().train()
    model.backbone.blocks[0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, pixels(model))
    features(model, pixels(model), World("fp32"))
    predict(model, [Image.new("RGB", (40, 30))])
    assert [module.training for module in model.modules()] == before


def test_model_without_a_head_cannot_be_scored() -> None:
    model = pt.adapt(vit(), pt.LoRA(rank=2))
    with pytest.raises(pt.FitError, match="the model has no head of its own"):
        evaluate(model, pixels(model))


def test_label_without_a_class_is_refused() -> None:
    model = make_model()
    split = Split(make_split(1, 3).images, [3])
    with pytest.raises(pt.FitError, match="label 3 has no class: the model knows 3"):
        evaluate(model, Pixels(split, Transform(model.input_config)))


def test_features_are_what_the_head_sees() -> None:
    model = make_model(pt.Linear()).eval()
    split = pixels(model)
    images, _ = split.batch(range(11))
    expected = model.forward_features(split.transform.normalize(images))
    torch.testing.assert_close(features(model, split, World("fp32"), batch_size=4), expected, rtol=1e-4, atol=1e-6)


def test_predictions_are_the_softmax_of_the_logits() -> None:
    model = make_model().train()
    pictures = [Image.fromarray(np.full((20 + i, 30, 3), 40 * i, np.uint8)) for i in range(5)]
    found = predict(model, pictures, batch_size=2)
    transform = Transform(model.input_config)
    with torch.no_grad():
        logits = model.eval()(transform.normalize(torch.stack([transform.pixels(p) for p in pictures])))
    torch.testing.assert_close(found, (logits.exp() / logits.exp().sum(1, keepdim=True)), rtol=1e-5, atol=1e-6)


def test_images_are_taken_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opened, seen = make_model(), [], []

    def pictures() -> Iterator[Image.Image]:
        for i in range(7):
            opened.append(i)
            yield Image.new("RGB", (8, 8))

    model.register_forward_hook(lambda *args: seen.append(len(opened)))
    assert predict(model, pictures(), batch_size=3).shape == (7, 3)
    assert seen == [3, 6, 7]


def test_no_image_gives_no_row() -> None:
    assert predict(make_model(), []).shape == (0, 3)


def test_scores_from_features_are_those_from_images() -> None:
    model = make_model(pt.Linear())
    pixels = Pixels(make_task().train, Transform(model.input_config))
    assert evaluate(model, pixels, seen=features(model, pixels, World("fp32"))) == evaluate(model, pixels)
