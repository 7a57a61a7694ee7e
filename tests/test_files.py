"""The plugin file: one file that is a working classifier, or an error that says what is wrong."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import petiole as pt
from petiole.backbones import bundled
from petiole.core.adapted import Adapted
from petiole.core.plugin import Plugin
from petiole.files import container, inspect, load, save
from petiole.files.plugin_file import TOLERANCE

CLASSES = [f"class {i}" for i in range(10)]
METHODS: dict[str, Callable[[], list[Plugin]]] = {
    "lora": lambda: [pt.LoRA(rank=2, roles=("q", "fc2"), scale=0.5)],
    "fact": lambda: [pt.FacT(rank=4, form="tk")],
    "linear": lambda: [pt.Linear()],
    "full": lambda: [pt.Full()],
    "two": lambda: [pt.LoRA(rank=2), pt.FacT(rank=2)],
}


def vit(seed: int = 0, **settings: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{**sizes, **settings}).eval()


def trained(plugins: Sequence[Plugin], backbone: nn.Module | None = None, classes: Sequence[str] | None = CLASSES):
    """Returns an adapted model whose every trained tensor has moved."""
    model = pt.adapt(backbone or vit(), *plugins, classes=classes, prove=False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, p in model.trained():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    return model.eval()


def images(model: Adapted) -> torch.Tensor:
    p = next(model.backbone.parameters())
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(p)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plugin.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    save(trained(METHODS["lora"]()), path)
    return path


def edit(path: Path, tensors: dict[str, Any] | None = None, **info: Any) -> None:
    """Writes a file again with some tensors (None removes one) and metadata changed, checksum and all."""
    old_tensors, old_info = container.read(path)
    merged = {**old_tensors, **(tensors or {})}
    container.write(path, {name: t for name, t in merged.items() if t is not None}, {**old_info, **info})


def fault(path: Path, backbone: nn.Module | None = None) -> str:
    """Returns the message of a failing load, after checking that it is one line and names the file."""
    with pytest.raises(pt.PluginFileError) as caught:
        load(path, backbone or vit())
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")


class TestRoundTrip:
    @pytest.mark.parametrize("name", METHODS)
    def test_reload_onto_an_equal_backbone_answers_bit_for_bit(self, name: str, path: Path) -> None:
        model = trained(METHODS[name]())
        save(model, path)
        again = load(path, vit())
        assert not again.training
        assert again.classes == tuple(CLASSES)
        assert torch.equal(again(images(model)), model(images(model)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["fact", "full"])
    def test_every_dtype_survives(self, name: str, dtype: torch.dtype, path: Path) -> None:
        model = trained(METHODS[name](), vit().to(dtype))
        save(model, path)
        again = load(path, vit().to(dtype))
        assert {t.dtype for t in again.task_state().values()} == {dtype}
        assert torch.equal(again(images(model)), model(images(model)))

    @pytest.mark.parametrize("name", ["lora", "full"])
    def test_without_classes_the_backbones_own_classifier_answers(self, name: str, path: Path) -> None:
        model = trained(METHODS[name](), classes=None)
        save(model, path)
        again = load(path, vit())
        assert again.head is None
        assert torch.equal(again(images(model)), model(images(model)))

    def test_settings_survive(self, path: Path) -> None:
        model = trained(METHODS["two"]())
        save(model, path)
        again = load(path, vit())
        assert [p.settings() for p in again.taps.plugins] == [p.settings() for p in model.taps.plugins]

    def test_transform_survives(self, path: Path) -> None:
        model = trained(METHODS["lora"]())
        model.input_config["crop_pct"] = 0.5
        save(model, path)
        assert load(path, vit()).input_config == model.input_config

    def test_a_loaded_plugin_trains_on(self, saved: Path) -> None:
        model = load(saved, vit()).train()
        model(images(model)).sum().backward()
        assert {name for name, p in model.trained() if p.grad is not None} == set(model.task_state())

    def test_saving_again_after_load_gives_the_same_bytes(self, saved: Path) -> None:
        before = saved.read_bytes()
        save(load(saved, vit()), saved)
        assert saved.read_bytes() == before

    def test_load_leaves_the_backbone_as_it_is(self, saved: Path) -> None:
        backbone = vit().train()
        before = {name: t.clone() for name, t in backbone.state_dict().items()}
        load(saved, backbone)
        assert backbone.training
        assert all(p.requires_grad for p in backbone.parameters())
        assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())

    def test_save_leaves_the_mode_as_it_is(self, path: Path) -> None:
        model = trained(METHODS["lora"]()).train()
        save(model, path)
        assert all(m.training for m in model.modules())

    def test_running_statistics_that_moved_travel_with_the_file(self, path: Path) -> None:
        def with_norm() -> VisionTransformer:
            backbone = vit()
            backbone.norm_pre = _TokenBatchNorm()
            return backbone

        model = pt.adapt(with_norm(), pt.Linear(), classes=CLASSES, prove=False).train()
        model(images(model))
        save(model.eval(), path)
        again = load(path, with_norm())
        assert torch.equal(again(images(model)), model(images(model)))


class _TokenBatchNorm(nn.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mT).mT


class TestBackbone:
    def test_other_weights_are_named(self, saved: Path) -> None:
        message = fault(saved, vit(seed=1))
        assert message.startswith("FILE belongs to another backbone: the file's is VisionTransformer timm.models.")
        assert inspect(saved).backbone["fingerprint"][:12] in message
        assert message.endswith("the weights differ: load the same pretrained weights, not fine-tuned since")

    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_refuses_other_weights(self, name: str, path: Path) -> None:
        save(trained(METHODS[name]()), path)
        assert "the weights differ" in fault(path, vit(seed=1))

    def test_other_dtype_is_named(self, saved: Path) -> None:
        assert "the dtype differs, float32 in the file and float16 here: call .to(torch.float32)" in fault(
            saved, vit().half()
        )

    def test_other_width_is_named(self, saved: Path) -> None:
        assert "the width differs, 32 in the file and 64 here" in fault(saved, vit(embed_dim=64))

    def test_other_class_is_named(self, saved: Path) -> None:
        message = fault(saved, nn.Sequential(nn.Linear(2, 2)))
        assert "belongs to a timm.models.vision_transformer.VisionTransformer, got a torch.nn" in message

    def test_another_classifier_makes_no_difference_under_a_head(self, saved: Path) -> None:
        backbone = vit()
        backbone.reset_classifier(3)
        load(saved, backbone)

    def test_another_classifier_without_a_head_fails_the_check(self, path: Path) -> None:
        save(trained(METHODS["lora"](), classes=None), path)
        backbone = vit()
        nn.init.normal_(backbone.head.weight)
        assert "fails its check" in fault(path, backbone)

    def test_other_pooling_fails_the_check(self, saved: Path) -> None:
        backbone = vit()
        backbone.global_pool = "avg"
        message = fault(saved, backbone)
        assert "fails its check: the logits on synthetic images are off by" in message
        assert "compare library versions and settings (pooling, image size)" in message
        load(saved, backbone, check=False)

    def test_one_name_of_a_file_cannot_point_elsewhere(self, saved: Path) -> None:
        for name in ("hf-hub:someone/else", "local-dir:/tmp", "../x", "a/b"):
            edit(saved, backbone={**inspect(saved).backbone, "name": name})
            with pytest.raises(pt.PluginFileError, match="cannot be built by its name: give the backbone"):
                load(saved)

    def test_unknown_names_are_named(self, saved: Path) -> None:
        edit(saved, backbone={**inspect(saved).backbone, "name": "vit_nowhere"})
        with pytest.raises(pt.PluginFileError, match=r"vit_nowhere.*give the backbone"):
            load(saved)

    def test_no_backbone_builds_it_by_its_name(self, path: Path) -> None:
        if not (Path(pt.__file__).parent / "assets" / "micro.safetensors").is_file():
            pytest.skip("needs the bundled weights")
        model = pt.adapt(bundled.backbone("micro"), pt.LoRA(rank=2), classes=CLASSES)
        save(model, path)
        assert load(path).classes == tuple(CLASSES)


class TestContent:
    @pytest.mark.parametrize(
        ("tensors", "expected"),
        [
            ({"head.bias": None}, "FILE lacks the tensor head.bias: the file's plugins and head need 10 tensors"),
            ({"head.x": torch.zeros(2)}, "FILE holds the tensor head.x, which the file's plugins and head do not have"),
            (
                {"head.bias": torch.zeros(1, 10)},
                "FILE: head.bias should have the shape [10], found [1, 10]",
            ),
            ({"head.bias": torch.zeros(10).half()}, "FILE: head.bias should be float32, found float16"),
            ({"head.bias": torch.full((10,), torch.nan)}, "FILE: the tensor head.bias is not finite"),
            ({"backbone.norm.bias": torch.zeros(32)}, "FILE holds the tensor backbone.norm.bias, which"),
            ({"head.bias": torch.zeros(10)}, "FILE fails its check: the logits on synthetic images are off by"),
        ],
    )
    def test_wrong_tensors_are_named(self, saved: Path, tensors: dict[str, Any], expected: str) -> None:
        edit(saved, tensors)
        assert fault(saved).startswith(expected)

    @pytest.mark.parametrize(
        ("info", "expected"),
        [
            ({"schema_version": 2}, "has schema version 2, petiole 0.1.0 reads version 1: upgrade petiole"),
            ({"schema_version": None}, "has schema version None"),
            ({"plugins": [{"method": "magic", "settings": {}}]}, "needs the plugin {'method': 'magic'"),
            (
                {"plugins": [{"method": "lora", "settings": {"rnk": 1}}]},
                "describes plugins that do not fit: lora cannot",
            ),
            (
                {"plugins": [{"method": "lora", "settings": {"rank": 4}}]},
                "plugins.0.down.0 should have the shape [4, 32], found [2, 32]",
            ),
            ({"plugins": [{"method": "lora", "settings": {"roles": ["z"]}}]}, "LoRA was asked for z"),
            ({"plugins": []}, "holds the tensors plugins.0."),
            ({"classes": ["a", "b"]}, "does not fit 2 class names"),
            ({"classes": None}, "does not fit no class names"),
            ({"classes": [1] * 10}, "the class names should be strings"),
            ({"classes": ["a"] * 10}, "a head needs at least two different classes"),
            ({"backbone": []}, "the metadata `backbone` should be dict, found []"),
            ({"backbone": {}}, "the metadata `backbone.class` should be str, found nothing"),
            ({"notes": 1}, "the metadata `notes` should be str, found 1"),
            ({"check": {"num_images": 10**9, "seed": 0, "logits": [], "tolerance": 1e-3}}, "the check should hold"),
            ({"check": {"num_images": 1, "seed": 0, "logits": [[None]], "tolerance": 1e-3}}, "the check should hold"),
            ({"check": {"num_images": 1, "seed": 0, "logits": [[0.5]], "tolerance": 1e-3}}, "expects logits [1, 1]"),
        ],
    )
    def test_wrong_metadata_is_named(self, saved: Path, info: dict[str, Any], expected: str) -> None:
        edit(saved, **info)
        assert expected in fault(saved)


class TestSaveRefuses:
    def test_a_method_outside_the_table(self, path: Path) -> None:
        class Mine(pt.LoRA):
            method = "mine"

        with pytest.raises(
            pt.PluginFileError, match=r"'mine' is not in the table.*add a line to petiole.plugins.METHODS"
        ):
            save(trained([Mine()]), path)

    def test_a_subclass_that_borrows_a_name(self, path: Path) -> None:
        with pytest.raises(pt.PluginFileError, match="made again from its settings"):
            save(trained([type("LoRA", (pt.LoRA,), {})()]), path)

    def test_settings_that_are_no_json(self, path: Path) -> None:
        model = trained([pt.LoRA(scale=torch.tensor(2.0))])
        with pytest.raises(pt.PluginFileError, match="the settings of LoRA cannot be kept in a file"):
            save(model, path)

    def test_a_model_that_diverged(self, path: Path) -> None:
        model = trained([pt.LoRA()])
        with torch.no_grad():
            model.head.bias[0] = torch.inf
        with pytest.raises(pt.PluginFileError, match=r"the tensor head.bias is not finite"):
            save(model, path)
        assert not path.exists()

    def test_a_metric_that_is_no_number(self, path: Path) -> None:
        with pytest.raises(pt.PluginFileError, match="the metric accuracy is nan"):
            save(trained([pt.LoRA()]), path, metrics={"accuracy": float("nan")})

    def test_what_is_no_adapted_model(self, path: Path) -> None:
        with pytest.raises(pt.PluginFileError, match=r"takes what petiole.adapt returned, got VisionTransformer"):
            save(vit(), path)  # type: ignore[arg-type]

    def test_a_mixture_of_dtypes(self, path: Path) -> None:
        model = trained([pt.LoRA()])
        model.plugins.double()
        with pytest.raises(pt.PluginFileError, match=r"plugins.0.down.0 is float64 on a backbone of float32"):
            save(model, path)

    def test_a_tuned_model_that_was_converted(self, path: Path) -> None:
        with pytest.raises(pt.PluginFileError, match="is float64 on a backbone of float32"):
            save(trained([pt.Full()]).double(), path)


class TestFile:
    def test_damage_in_a_saved_plugin_is_noticed(self, saved: Path) -> None:
        data = bytearray(saved.read_bytes())
        for i in (0, 7, 60, 200, len(data) // 2, len(data) - 1):
            saved.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
            fault(saved)

    def test_any_safetensors_reader_opens_it(self, saved: Path) -> None:
        ours, info = container.read(saved)
        theirs = safetensors.torch.load_file(saved)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        with safetensors.safe_open(saved, framework="pt") as file:
            assert json.loads(file.metadata()["petiole"]) == info
            assert file.metadata()["format"] == "pt"

    @pytest.mark.slow
    def test_two_processes_write_the_same_bytes(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import test_files as t; from petiole.files import save; "
            "save(t.trained(t.METHODS['fact']()), sys.argv[2], metrics={'b': 1.0, 'a': 0.5}, notes='é')"
        )
        arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "theirs")]
        subprocess.run(arguments, check=True, timeout=120)
        save(trained(METHODS["fact"]()), tmp_path / "ours", metrics={"a": 0.5, "b": 1.0}, notes="é")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


class TestInspect:
    def test_says_everything(self, path: Path) -> None:
        model = trained(METHODS["lora"]())
        size = save(model, path, metrics={"val_accuracy": 0.875}, notes="cats")
        info = inspect(path)
        assert info.plugins == (
            {
                "method": "lora",
                "settings": {**model.taps.plugins[0].settings(), "roles": ["q", "fc2"]},
                "num_weights": 896,
                "num_matrices": 8,
            },
        )
        assert info.backbone["class"] == "timm.models.vision_transformer.VisionTransformer"
        assert (info.backbone["dtype"], info.backbone["width"]) == ("float32", 32)
        assert info.classes == tuple(CLASSES)
        assert info.head == {"in_features": 32, "out_features": 10, "bits": 32}
        assert (info.metrics, info.notes, info.token_budget) == ({"val_accuracy": 0.875}, "cats", None)
        assert info.check["tolerance"] == TOLERANCE[torch.float32]
        assert info.total_bytes == size == path.stat().st_size
        state = model.task_state()
        # the ups of q and fc2 in two blocks are all 32 wide and lie in one tensor; the downs differ in width
        ups = [name for name in state if ".up." in name]
        expected = {name: tuple(t.shape) for name, t in state.items() if name not in ups} | {
            "plugins.0.up.*": (4, 32, 2)
        }
        assert {t.name: (t.dtype, t.shape, t.num_bytes) for t in info.tensors} == {
            name: ("float32", shape, 4 * math.prod(shape)) for name, shape in expected.items()
        }
        assert info.overhead_bytes == size - sum(4 * t.numel() for t in state.values())

    @pytest.mark.parametrize("name", ["lora", "fact", "linear"])
    def test_overhead_is_at_most_2_kib(self, name: str, path: Path) -> None:
        save(trained(METHODS[name]()), path, metrics={"val_accuracy": 0.912345, "test_accuracy": 0.902345})
        assert inspect(path).overhead_bytes <= 2048

    def test_overhead_of_lora_on_twelve_blocks_is_at_most_2_kib(self, path: Path) -> None:
        torch.manual_seed(0)
        deep = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=12, num_heads=2)
        save(pt.adapt(deep, pt.LoRA(rank=2), classes=CLASSES), path, metrics={"val_accuracy": 0.912345})
        assert inspect(path).overhead_bytes <= 2048

    def test_many_classes_do_not_bloat_the_check(self, path: Path) -> None:
        save(trained(METHODS["linear"](), classes=[str(i) for i in range(1000)]), path)
        assert len(inspect(path).check["logits"][0]) <= 33
        load(path, vit())
