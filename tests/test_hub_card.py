"""The card of a plugin on the Hub: what it says, and when it may be replaced."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import fake_hub
import petiole as pt
from fake_hub import Hub
from fitting import CLASSES, vit
from petiole.files.card import is_replaceable, license_of, write_card
from petiole.files.hub import pull, push

hub, plugin = fake_hub.hub, fake_hub.plugin


def test_metadata_of_the_card_is_what_the_hub_reads(hub: Hub, plugin: Path) -> None:
    push(plugin, "anna/pets", dataset="timm/oxford-iiit-pet", license_id="apache-2.0")
    fields = hub.repos["anna/pets"].fields
    results = fields.pop("model-index")
    assert fields == {
        "base_model": "timm/tiny.v0",
        "base_model_relation": "adapter",
        "library_name": "petiole",
        "pipeline_tag": "image-classification",
        "license": "apache-2.0",
        "datasets": ["timm/oxford-iiit-pet"],
        "metrics": ["accuracy"],
        "tags": ["petiole", "lora", "4-bit", "parameter-efficient-fine-tuning"],
    }
    assert [entry["name"] for entry in results] == ["pets"]
    rows = {
        row["dataset"]["split"]: (row["task"]["type"], row["dataset"]["type"], metric["type"], metric["value"])
        for row in results[0]["results"]
        for metric in row["metrics"]
    }
    assert rows == {
        "test": ("image-classification", "timm/oxford-iiit-pet", "accuracy", 0.75),
        "validation": ("image-classification", "timm/oxford-iiit-pet", "accuracy", 0.5),
    }


def test_page_of_the_card_says_what_the_file_says(hub: Hub, plugin: Path) -> None:
    push(plugin, "anna/pets")
    card, info = hub.repos["anna/pets"].card, pt.inspect(plugin)
    settings = info.plugins[0]["settings"]
    for text in (
        "LoRA(" + ", ".join(f"{key}={value!r}" for key, value in settings.items()) + ")",
        "| bits per weight | LoRA 4, head 32 |",
        f"{plugin.stat().st_size:,} bytes",
        info.backbone["fingerprint"],
        f"petiole {pt.__version__}",
        "3: red, green, blue",
        "| `input_size` | 3 x 32 x 32 |",
        "| `test_accuracy` | 0.75 |",
        "| `trained_parameters` | 1234567 |",
        "> on the \\*first\\* try",
        'pt.load(pt.pull("anna/pets"))',
    ):
        assert text in card, text


def card_of(path: Path, **changes: Any) -> dict[str, Any]:
    """The metadata of a changed file's card; its text under `text`."""
    text = write_card(replace(pt.inspect(path), **changes), "anna/pets", dataset="pets")
    return {**yaml.safe_load(text.split("---\n")[1]), "text": text}


@pytest.mark.parametrize(
    ("kind", "name", "tag", "base"),
    [
        (
            "timm.models.beit.Beit",
            "beit_base_patch16_224",
            "in22k_ft_in22k",
            "timm/beit_base_patch16_224.in22k_ft_in22k",
        ),
        ("timm.models.vision_transformer.VisionTransformer", "micro", "v1", None),
        ("timm.models.vision_transformer.VisionTransformer", "VisionTransformer", "", None),
        ("timm.models.vision_transformer.VisionTransformer", "../evil", "v1", None),
        ("transformers.models.vit.modeling_vit.ViTModel", "google/vit-base-patch16-224", "3f49326e", "same"),
        ("transformers.models.vit.modeling_vit.ViTModel", "runs/vit", "", None),
        ("torchvision.models.vision_transformer.VisionTransformer", "vit_b_16", "", None),
    ],
)
def test_base_model_is_named_where_the_hub_has_it(
    kind: str, name: str, tag: str, base: str | None, plugin: Path
) -> None:
    found = card_of(plugin, backbone={**pt.inspect(plugin).backbone, "class": kind, "name": name, "tag": tag})
    assert found.get("base_model") == (name if base == "same" else base)
    assert found.get("base_model_relation") == ("adapter" if base else None)


@pytest.mark.parametrize(
    ("kind", "is_built"), [("timm.models.vision_transformer.VisionTransformer", True), ("a.B", False)]
)
def test_card_asks_for_a_backbone_that_cannot_be_built_by_name(kind: str, is_built: bool, plugin: Path) -> None:
    text = card_of(plugin, backbone={**pt.inspect(plugin).backbone, "class": kind})["text"]
    assert ('pt.load(pt.pull("anna/pets"))' in text) == is_built
    assert ('pt.load(pt.pull("anna/pets"), backbone)' in text) != is_built
    assert ("petiole predict" in text) == is_built
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_dataset_that_is_not_on_the_hub_gives_results_but_no_link(plugin: Path) -> None:
    found = card_of(plugin)
    assert "datasets" not in found
    assert {row["dataset"]["name"] for row in found["model-index"][0]["results"]} == {"pets"}


def test_dataset_of_the_hub_may_have_a_configuration(plugin: Path) -> None:
    text = write_card(pt.inspect(plugin), "anna/pets", dataset="hf:anna/photos:small")
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["datasets"] == ["anna/photos"]
    assert {row["dataset"]["config"] for row in fields["model-index"][0]["results"]} == {"small"}


@pytest.mark.parametrize("changes", [{"metrics": {}}, {"metrics": {"val_loss": 1.0}}])
def test_card_has_no_results_without_an_accuracy(changes: dict[str, Any], plugin: Path) -> None:
    assert not {"model-index", "metrics", "model_name"} & set(card_of(plugin, **changes))


def test_very_many_classes_are_cut(plugin: Path) -> None:
    text = card_of(plugin, classes=tuple(f"class{i}" for i in range(1000)))["text"]
    assert "1,000: class0, class1, " in text
    assert "class199 and 800 more\n" in text
    assert "class200" not in text


def test_names_and_notes_cannot_break_out_of_the_card(plugin: Path) -> None:
    bad = "a|b\n---\n<script>alert(1)</script> `x` [y](z) -->"
    text = card_of(plugin, classes=(bad, "dog", "cat"), notes=bad, metrics={bad: 1.0})["text"]
    page = text.split("---\n", 2)[2]
    text = re.sub(r"`[^`\n]*`", "code", page)
    assert not re.search(r"(?<!\\)<(?!!-- card by petiole)", text)
    assert not [line for line in page.splitlines() if line == "---"]


def test_card_is_replaceable_until_it_is_edited(plugin: Path) -> None:
    text = write_card(pt.inspect(plugin), "anna/pets", license_id="mit")
    assert write_card(pt.inspect(plugin), "anna/pets", license_id="mit") == text
    assert is_replaceable(text)
    assert is_replaceable(text.replace("\n", "\r\n"))
    assert license_of(text) == "mit"
    assert not is_replaceable(text.replace("license: mit", "license: apache-2.0"))
    assert not is_replaceable(text + "\nMind the dog.\n")
    assert not is_replaceable("# Mine\n")
    assert not is_replaceable("---\nlicense: mit\ntags: [dog]\n---\n")
    assert is_replaceable("")


def test_code_of_the_card_runs(
    hub: Hub, plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    push(plugin, "anna/pets")
    code = hub.repos["anna/pets"].card.split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(pt, "pull", pull, raising=False)
    monkeypatch.setattr("petiole.backbones.bundled.backbone", lambda name: {"tiny.v0": vit}[name]())
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "tan").save("photo.jpg")
    exec(code, {})
    model = pt.load(plugin, vit())
    (row,) = pt.predict(model, [Image.open("photo.jpg")]).tolist()
    assert capsys.readouterr().out.strip() == CLASSES[row.index(max(row))]
