"""`petiole convert`, and bits on the command line: what is written, and what is refused."""

import json
from pathlib import Path

import pytest

import petiole as pt
import test_cli
from petiole.files.official import save_official
from petiole.train.published import NUM_CLASSES, PUBLISHED
from test_cli import Command

petiole, plugin = test_cli.petiole, test_cli.plugin


def settings(path: str) -> dict[str, object]:
    return pt.inspect(path).plugins[0]["settings"]


def official(dim: int, num_classes: int) -> None:
    """Writes a file as the authors name it, for KITTI's four classes, in a folder of the method's name."""
    from petiole.backbones import bundled

    plugin, classes = pt.AdaptFormer(dim=dim, bias=False, bits=1), [str(i) for i in range(num_classes)]
    model = pt.adapt(bundled.backbone("tiny"), plugin, classes=classes, head_bits=1)
    Path("adaptformer-bihead").mkdir()
    save_official(model, f"adaptformer-bihead/kitti-bit1-dim{dim}.bin")


def test_bits_are_those_asked_for(petiole: Command, plugin: Path) -> None:
    answer = petiole("convert", plugin, "small.safetensors", "--bits", 1, "--head-bits", 2, "--json")
    assert json.loads(answer.out) == {
        "file": "small.safetensors",
        "num_bytes": Path("small.safetensors").stat().st_size,
    }
    assert settings("small.safetensors")["bits"] == 1
    assert pt.inspect("small.safetensors").head["bits"] == 2
    petiole("convert", "small.safetensors", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("small.safetensors").read_bytes()


def test_fit_trains_a_head_of_few_bits(petiole: Command) -> None:
    run = ("fit", "squares", "-m", "lora", "--set", "bits=1", "--head-bits", "1", "--epochs", "1", "--batch-size", "5")
    assert petiole(*run, "--out", "run").code == 0
    assert pt.inspect("run/plugin.safetensors").head["bits"] == 1
    assert "1 bit a weight" in petiole("inspect", "run/plugin.safetensors").out
    ladder = json.loads(petiole("inspect", "run/plugin.safetensors", "--json").out)["ladder"]
    assert [step["bits"] for step in ladder] == [32, 8, 4, 2, 1]


def test_official_file_goes_both_ways_byte_for_byte(petiole: Command) -> None:
    official(dim=32, num_classes=NUM_CLASSES["kitti"])
    source = "adaptformer-bihead/kitti-bit1-dim32.bin"
    assert petiole("convert", source, "kitti.safetensors", "--backbone", "tiny").code == 0
    rows = PUBLISHED["bi-adaptformer-bihead-paper"].rows
    assert settings("kitti.safetensors")["scale"] == rows["kitti"]["scale"]
    assert petiole("convert", "kitti.safetensors", "kitti.bin").code == 0
    assert Path("kitti.bin").read_bytes() == Path(source).read_bytes()


def test_options_go_before_what_the_name_of_an_official_file_says(petiole: Command) -> None:
    official(dim=8, num_classes=6)
    source = "adaptformer-bihead/kitti-bit1-dim8.bin"
    options = ("--backbone", "tiny", "--scale", "0.5", "--classes", "a,b,c,d,e,f", "--method", "adaptformer-bihead")
    assert petiole("convert", source, "six.safetensors", *options).code == 0
    assert settings("six.safetensors")["scale"] == 0.5
    assert pt.inspect("six.safetensors").classes == tuple("abcdef")


def test_official_file_that_does_not_say_enough_is_refused(petiole: Command) -> None:
    official(dim=8, num_classes=4)
    source = "adaptformer-bihead/kitti-bit1-dim8.bin"
    assert "name it with --backbone" in petiole("convert", source, "out.safetensors").error
    convert = ("convert", source, "out.safetensors", "--backbone", "tiny")
    assert "pass --scale" in petiole(*convert).error
    assert "'kiti' is no VTAB-1k task (did you mean 'kitti'?)" in petiole(*convert, "--task", "kiti").error
    Path("x.bin").write_bytes(Path(source).read_bytes())
    assert "name it with --method" in petiole("convert", "x.bin", "out.safetensors", "--backbone", "tiny").error
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.safetensors", "out.safetensors"), "missing.safetensors cannot be read"),
        (("missing.bin", "out.safetensors", "--backbone", "tiny"), "missing.bin does not exist"),
        (("PLUGIN", "out.onnx"), "out.onnx ends in .onnx: name a .safetensors or .bin file, or a folder for PEFT"),
        (("PLUGIN", "out.bin"), "1, 2 or 4 bits per weight"),
        (("PLUGIN", "out.safetensors", "--bits", "9"), "bits are 1 to 8, or 32"),
        (("PLUGIN", "nowhere/out.safetensors"), "there is no folder nowhere"),
        (("PLUGIN", "PLUGIN"), "exists already"),
    ],
)
def test_bad_input_is_one_line(petiole: Command, plugin: Path, arguments: tuple[str, ...], message: str) -> None:
    before = plugin.read_bytes()
    answer = petiole("convert", *(plugin if word == "PLUGIN" else word for word in arguments))
    assert message in answer.error
    assert plugin.read_bytes() == before
    assert list(Path().iterdir()) == []
