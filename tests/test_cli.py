"""The commands: what they print, where, with which exit code, and what they leave behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import petiole as pt
from fitting import CLASSES, make_model, make_split, make_task, vit
from petiole.cli import _options, main
from petiole.plugins import METHODS
from petiole.tasks import Task
from petiole.train.loop import fit


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an expected error; anything else fails the test."""
        lines = self.err.splitlines()
        assert self.code == 1, self
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        assert self.out == ""
        return lines[0].removeprefix("error: ")


Command = Callable[..., Answer]


@pytest.fixture
def petiole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs a command in an empty folder; every backbone is the tiny ViT, `squares` is a built-in task."""

    def build(name: str, *, pretrained: bool = True) -> nn.Module:
        if name not in ("tiny", "tiny.v0", "micro"):
            raise pt.BackboneError(f"no backbone is called {name!r}")
        return vit()

    def run(*args: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["petiole", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
        return Answer(code, *capsys.readouterr())

    monkeypatch.setattr("petiole.backbones.bundled.backbone", build)
    monkeypatch.setitem(pt.tasks.BUILT_IN, "squares", lambda seed: make_task())
    monkeypatch.setitem(pt.tasks.BUILT_IN, "swapped", lambda seed: make_task(classes=("red", "blue", "green")))
    monkeypatch.setitem(pt.tasks.BUILT_IN, "untested", lambda seed: make_task(num_test=0))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained plugin file."""
    folder = tmp_path_factory.mktemp("run")
    fit(make_model(), make_task(), pt.Recipe(epochs=2, batch_size=5, lr=1e-2), out=folder, progress=False)
    return folder / "plugin.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    split = make_split(5, 4)
    for i in range(5):
        split.images[i].save(folder / f"{i}.png")
    return folder


def is_empty() -> bool:
    return not any(Path.cwd().iterdir())


# help


def test_help_imports_no_torch() -> None:
    code = "import sys, petiole.cli.app; print(sorted({'torch', 'timm', 'numpy', 'PIL', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_module_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "petiole", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"petiole {pt.__version__}\n", "")


@pytest.mark.parametrize("command", ["fit", "eval", "predict", "inspect", "merge", "doctor", "demo"])
def test_every_command_has_help_with_examples(command: str, petiole: Command) -> None:
    answer = petiole(command, "--help")
    assert answer.code == 0
    examples = answer.out[answer.out.index("Example") :]
    assert f"  petiole {command} " in examples


def test_main_help_lists_the_commands_with_whole_sentences(petiole: Command) -> None:
    text = petiole("--help").out
    for command in ("fit", "eval", "predict", "inspect", "merge", "doctor", "demo"):
        assert f"\n  {command} " in text
    assert "..." not in text[text.index("Commands:") :]


def test_help_of_fit_lists_every_method(petiole: Command) -> None:
    assert _options.method_names() == sorted(METHODS)
    text = " ".join(petiole("fit", "--help").out.split())
    assert ", ".join(sorted(METHODS)) in text


def test_wrong_usage_keeps_exit_code_2(petiole: Command) -> None:
    answer = petiole("fit", "squares", "--epochs", "many")
    assert answer.code == 2
    assert "--epochs" in answer.err


# fit


def test_fit_fills_a_run_folder_and_prints_a_table(petiole: Command) -> None:
    answer = petiole("fit", "squares", "--set", "rank=2", "--epochs", "2", "--batch-size", "5", "-b", "tiny")
    assert answer.code == 0
    folder = Path("runs/squares-fact")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "plugin.safetensors", "report.html", "state.pt"}
    assert "FacT" in answer.out
    assert "trained parameters" in answer.out
    assert f"plugin: {folder}/plugin.safetensors\nreport: {folder}/report.html\n" in answer.err
    assert "13 images" in answer.err.splitlines()[0]


def test_fit_passes_every_option_on(petiole: Command) -> None:
    options = {
        "epochs": 2, "batch_size": 4, "lr": 0.02, "weight_decay": 0.3, "warmup_epochs": 1, "drop_path": 0.1,
        "label_smoothing": 0.2, "precision": "bf16", "select": "last", "eval_every": 2, "seed": 7,
        "normalize": "imagenet", "resize": "crop", "augment": "fgvc", "train_on": "train+val",
    }  # fmt: skip
    args = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    settings = ["-m", "lora", "-s", "rank=3", "-s", "roles=q,k", "-s", "scale=1e-1", "-s", "dropout=0"]
    assert petiole("fit", "squares", *args, "--checkpoint", *settings, "-o", "run").code == 0
    import yaml

    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["recipe"] == options | {"checkpoint": True}
    asked = {"method": "lora", "rank": 3, "roles": ["q", "k"], "scale": 0.1, "dropout": 0.0}
    assert config["plugins"][0].items() >= asked.items()


def test_fit_answers_machines_in_json(petiole: Command) -> None:
    answer = petiole("fit", "squares", "--epochs", "1", "--out", "run", "--json")
    told = json.loads(answer.out)
    assert told["file"] == "run/plugin.safetensors"
    assert told["num_bytes"] == Path("run/plugin.safetensors").stat().st_size
    assert told["test_accuracy"] == pt.inspect("run/plugin.safetensors").metrics["test_accuracy"]
    assert Path("run/report.html").exists()


def test_fit_again_returns_the_finished_run(petiole: Command) -> None:
    command = ("fit", "squares", "--epochs", "1", "--out", "run", "--json")
    first, second = petiole(*command), petiole(*command)
    assert first.out == second.out
    assert "this run is finished" in second.err


def test_fit_stopped_by_ctrl_c_says_how_to_go_on(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from petiole.train.steps import Steps

    take = Steps.take

    def interrupt(self: Steps, step: int) -> tuple[float, int]:
        if step == 1:
            raise KeyboardInterrupt
        return take(self, step)

    command = ("fit", "squares", "--epochs", "2", "--batch-size", "5", "--save-every", "0", "--out", "run")
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", interrupt)
        answer = petiole(*command)
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == "stopped: the same command goes on from the state in run"
    assert "goes on after step 1 of 6" in petiole(*command).err


def test_fit_without_the_plot_extra_says_so(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    answer = petiole("fit", "squares", "--epochs", "1", "--out", "run")
    assert answer.code == 0
    assert "no report: a report needs an extra (jinja2 is missing): pip install 'petiole[plot]'" in answer.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["squares", "-m", "lorra"], "no method is called 'lorra' (did you mean 'lora'?): choose "),
        (["squares", "-s", "rnk=4"], "fact has no setting 'rnk' (did you mean 'rank'?): it has "),
        (["squares", "-m", "full", "-s", "rank=4"], "full has no setting 'rank': it has none"),
        (["squares", "-s", "rank"], "--set takes key=value, e.g. --set rank=16; got 'rank'"),
        (["squares", "-s", "rank=abc"], "--set rank takes a whole number (default "),
        (["squares", "-s", "rank=1.5"], "--set rank takes a whole number (default "),
        (["squares", "-s", "scale=big"], "--set scale takes a number (default 1.0), got 'big'"),
        (["squares", "-s", "rank=[1"], "--set rank takes a whole number"),
        (["squares", "-s", "rank=0"], "rank "),
        (["squares", "-b", "vit_basis"], "no backbone is called 'vit_basis'"),
        (["sqares"], "no task is called 'sqares': did you mean 'squares'?"),
        (["squares", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["squares", "--lr", "-1"], "lr must be above 0, got -1.0"),
        (["squares", "--select", "test"], "select must be best or last, got 'test'"),
        (["squares", "--precision", "fp8"], "precision must be auto, fp32 or bf16, got 'fp8'"),
        (["squares", "--normalize", "zero"], "normalize must be backbone, imagenet, half or none, got 'zero'"),
        ([], "nothing to learn was given: pass DATA, e.g. `petiole fit photos/`, or --recipe and --task"),
        (["-r", "fact-tt-paper"], "nothing to learn was given: pass DATA"),
        (["--task", "cifar"], "--task cifar is the row of a recipe: add --recipe, or pass cifar as DATA"),
        (["squares", "-r", "convpass-papr"], "no recipe is called 'convpass-papr' (did you mean 'convpass-paper'?)"),
        (["-r", "fact-tt-paper", "--task", "cifr"], "fact-tt-paper has a row per VTAB-1k task; 'cifr' is none (did yo"),
        (["squares", "-r", "fact-tt-paper"], "fact-tt-paper has a row per VTAB-1k task; 'squares' is none: name one"),
        (["squares", "-r", "default", "-m", "lora"], "the recipe default is of the method convpass, not lora: leave"),
        (["squares", "-r", "default", "-s", "dmi=3"], "convpass has no setting 'dmi' (did you mean 'dim'?)"),
        (["-r", "fact-tt-paper", "--task", "cifar"], "no task is called 'cifar'"),
        (["/nowhere/photos"], "no task is called '/nowhere/photos'"),
    ],
)  # fmt: skip
def test_fit_refuses_bad_input_in_one_line_and_writes_nothing(args: list[str], message: str, petiole: Command) -> None:
    assert petiole("fit", *args).error.startswith(message)
    assert is_empty()


def test_fit_refuses_another_runs_folder(petiole: Command) -> None:
    petiole("fit", "squares", "--epochs", "1", "--out", "run")
    before = Path("run/plugin.safetensors").read_bytes()
    answer = petiole("fit", "squares", "--epochs", "1", "--out", "run", "--lr", "0.5")
    assert "(recipe.lr 0.001 -> 0.5): choose another folder" in answer.err.splitlines()[-1]
    assert answer.code == 1
    assert Path("run/plugin.safetensors").read_bytes() == before


# fit with a recipe


@pytest.fixture
def cifar() -> None:
    """A folder `cifar` with VTAB-1k's lists, of 6 + 3 + 3 images."""
    split = make_split(12, 0)
    Path("cifar").mkdir()
    for name, rows in (("train800", range(6)), ("val200", range(6, 9)), ("test", range(9, 12))):
        for i in rows:
            split.images[i].save(f"cifar/{i}.png")
        # every list has every class
        Path(f"cifar/{name}.txt").write_text("".join(f"{i}.png {i % 3}\n" for i in rows))


def config_of(folder: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(Path(folder, "config.yaml").read_text())


@pytest.mark.parametrize("args", [("--task", "cifar"), ("cifar",), ("cifar", "--task", "cifar", "-m", "fact")])
def test_fit_takes_method_settings_and_training_from_a_recipe(
    args: tuple[str, ...], petiole: Command, cifar: None
) -> None:
    answer = petiole("fit", "--recipe", "fact-tt-paper", *args, "--epochs", "1")
    plugin, recipe = pt.recipe("fact-tt-paper", "cifar")
    config = config_of("runs/cifar-fact-tt-paper")
    assert config["recipe"] == {**asdict(recipe), "epochs": 1}
    assert config["plugins"] == [{"method": "fact", **plugin.settings()}]
    assert (config["transform"]["mean"], config["transform"]["crop_mode"]) == ([0.485, 0.456, 0.406], "squash")
    assert "9 images" in answer.err
    assert "expected 71.3 % on cifar" in answer.err


def test_fit_puts_options_before_the_recipes_values(petiole: Command, cifar: None) -> None:
    given = ["--epochs", "1", "--lr", "0.5", "--normalize", "none", "--train-on", "train", "-s", "rank=2"]
    assert petiole("fit", "cifar", "-r", "fact-tk-paper", *given, "-o", "run").code == 0
    config = config_of("run")
    assert config["recipe"].items() >= {"lr": 0.5, "normalize": "none", "train_on": "train", "resize": "squash"}.items()
    assert config["plugins"][0].items() >= {"rank": 2, "scale": 0.1, "layout": "reference"}.items()
    assert config["transform"]["std"] == [1.0, 1.0, 1.0]


def test_fit_names_the_row_of_other_data(petiole: Command) -> None:
    petiole("fit", "squares", "-r", "convpass-attn-paper", "--task", "dsprites_loc", "--epochs", "1")
    plugin = config_of("runs/squares-convpass-attn-paper")["plugins"][0]
    assert plugin.items() >= {"method": "convpass", "roles": ["attn"], "scale": 10.0, "init": "xavier"}.items()


def test_fit_searches_what_a_recipes_row_would_say(petiole: Command) -> None:
    grid = ["--grid", "scale=0.1,10", "--grid", "rank=2"]
    answer = petiole("fit", "squares", "-r", "fact-tk-paper", *grid, "--epochs", "1", "-o", "run")
    assert answer.code == 0, answer.err
    config = config_of("run")
    assert config["plugins"][0].items() >= {"rank": 2, "form": "tk", "layout": "reference"}.items()
    assert config["recipe"].items() >= {"normalize": "imagenet", "train_on": "train+val"}.items()


def test_help_of_fit_shows_the_defaults_of_a_recipe(petiole: Command) -> None:
    text = " ".join(petiole("fit", "--help").out.split())
    for field in fields(pt.Recipe):
        option = text[text.index(f" --{field.name.replace('_', '-')} ") :]
        default = "the recipe's, else" if field.name == "drop_path" else f"{field.default}]"
        assert option[option.index("[default: ") :].startswith(f"[default: {default}")


def test_eval_prepares_images_as_training_did(petiole: Command) -> None:
    options = ["--normalize", "none", "--resize", "crop", "--epochs", "4", "--lr", "0.02"]
    told = json.loads(petiole("fit", "squares", *options, "-o", "run", "--json").out)
    scored = json.loads(petiole("eval", "run/plugin.safetensors", "squares", "--json").out)
    assert scored["accuracy"] == pytest.approx(told["test_accuracy"])
    assert "std (1.0, 1.0, 1.0)" in petiole("inspect", "run/plugin.safetensors").out


def test_error_of_several_lines_becomes_one(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petiole.backbones.bundled.backbone", lambda name, **settings: nn.Linear(2, 2))
    assert petiole("doctor", "tiny").error.startswith("no view walks torch.nn.modules.linear.Linear: looked for")


def test_operating_systems_error_is_one_line(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **settings: object) -> nn.Module:
        raise PermissionError(13, "Permission denied", "weights.bin")

    monkeypatch.setattr("petiole.backbones.bundled.backbone", refuse)
    assert petiole("doctor", "tiny").error == "weights.bin: Permission denied"


# eval


def test_eval_prints_the_runs_own_accuracy(petiole: Command, plugin: Path) -> None:
    told = json.loads(petiole("eval", plugin, "squares", "--json").out)
    assert told["accuracy"] == pytest.approx(pt.inspect(plugin).metrics["test_accuracy"])
    assert (told["task"], told["split"], told["num_images"]) == ("squares", "test", 7)
    table = petiole("eval", plugin, "squares", "--split", "val").out
    assert f"{pt.inspect(plugin).metrics['val_accuracy']:.2%}" in table


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["squares", "--split", "tset"], "no split is called 'tset' (did you mean 'test'?): choose train, val or test"),
        (["untested"], "squares has no test split: choose train or val"),
        (["swapped"], "class 1 is 'green' in the model and 'blue' in squares"),
        (["digits"], "the model has 3 classes, the task digits has 10"),
        (["nothing"], "no task is called 'nothing'"),
    ],
)
def test_eval_refuses_what_does_not_fit(args: list[str], message: str, petiole: Command, plugin: Path) -> None:
    assert petiole("eval", plugin, *args).error.startswith(message)


# predict


def test_predict_prints_class_and_probability(petiole: Command, plugin: Path, photos: Path) -> None:
    rows = json.loads(petiole("predict", plugin, photos, "--top", "2", "--json").out)
    from petiole.train.evaluate import predict

    model = pt.load(plugin, vit())
    paths = sorted(photos.iterdir())
    expected = predict(model, map(Image.open, paths))
    assert [row["image"] for row in rows] == list(map(str, paths))
    for row, probabilities in zip(rows, expected, strict=True):
        best = probabilities.topk(2)
        assert [c["class"] for c in row["classes"]] == [CLASSES[i] for i in best.indices]
        assert [c["probability"] for c in row["classes"]] == pytest.approx(best.values.tolist(), rel=1e-5)
    table = petiole("predict", plugin, photos).out
    assert f"{rows[0]['image']}" in table
    assert f"{rows[0]['classes'][0]['class']} {rows[0]['classes'][0]['probability']:.1%}" in table


def test_predict_shows_no_more_classes_than_there_are(petiole: Command, plugin: Path, photos: Path) -> None:
    rows = json.loads(petiole("predict", plugin, photos / "0.png", "--top", "99", "--json").out)
    assert {c["class"] for c in rows[0]["classes"]} == set(CLASSES)


def test_predict_names_the_image_that_is_none(petiole: Command, plugin: Path, photos: Path) -> None:
    (photos / "3.png").write_text("no image")
    expected = f"{photos}/3.png cannot be read as an image: it is empty or no image of a known format"
    assert petiole("predict", plugin, photos).error == expected


@pytest.mark.parametrize(
    "command", [["predict", "x.png"], ["eval", "squares"], ["inspect"], ["merge", "out.safetensors"]]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file"), (b"words of mine", "is no plugin file"), (b"", "is empty")],
    ids=["missing", "foreign", "empty"],
)
def test_file_that_is_no_plugin_is_refused(
    command: list[str], content: bytes | None, message: str, petiole: Command, tmp_path: Path
) -> None:
    file = tmp_path / "bad.safetensors"
    Image.new("RGB", (8, 8)).save("x.png")
    if content is not None:
        file.write_bytes(content)
    error = petiole(command[0], file, *command[1:]).error
    assert error.startswith(f"{file} {message}")
    assert not Path("out.safetensors").exists()


def test_damaged_plugin_is_refused(petiole: Command, plugin: Path, tmp_path: Path) -> None:
    content = bytearray(plugin.read_bytes())
    content[-5] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(content)
    assert "is damaged: the checksum" in petiole("inspect", tmp_path / "bad.safetensors").error


def test_other_backbone_is_refused(
    petiole: Command, plugin: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(name: str, **settings: object) -> nn.Module:
        return VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0)

    monkeypatch.setattr("petiole.backbones.bundled.backbone", other)
    assert "belongs to another backbone" in petiole("predict", plugin, photos, "--backbone", "tiny").error


# inspect


def test_inspect_prints_everything_with_sizes(petiole: Command, plugin: Path) -> None:
    info, text = pt.inspect(plugin), petiole("inspect", plugin).out
    for word in (
        str(plugin), "lora(", "rank=2", "roles=['q', 'v']", "dropout=0.2", "tiny.v0", info.backbone["class"],
        "width 32", info.backbone["fingerprint"], "bicubic", "3: red, green, blue", "32 x 3", "token budget",
        "synthetic image", f"petiole {pt.__version__}, schema version 1", "bytes",
        *(f"metric {key}" for key in info.metrics), *(tensor.name for tensor in info.tensors),
        f"{info.total_bytes - info.overhead_bytes:,}",
    ):  # fmt: skip
        assert word in text


def test_inspect_answers_machines_with_every_field(petiole: Command, plugin: Path) -> None:
    from dataclasses import fields

    told, info = json.loads(petiole("inspect", plugin, "--json").out), pt.inspect(plugin)
    assert set(told) == {field.name for field in fields(info)} | {"overhead_bytes", "ladder"}
    assert told["total_bytes"] == plugin.stat().st_size
    assert told["metrics"] == info.metrics


# merge


def test_merge_writes_an_ordinary_checkpoint(petiole: Command, plugin: Path) -> None:
    answer = petiole("merge", plugin, "plain.safetensors")
    assert answer.code == 0
    assert "3 classes" in answer.err
    with safe_open("plain.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
    plain = VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    plain.load_state_dict(tensors)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(images), pt.load(plugin, vit())(images), rtol=1e-4, atol=1e-5)


def test_merge_replaces_nothing_unless_forced(petiole: Command, plugin: Path) -> None:
    Path("plain.safetensors").write_text("mine")
    error = petiole("merge", plugin, "plain.safetensors").error
    assert error == "plain.safetensors exists already: choose another name, or pass --force to replace it"
    assert Path("plain.safetensors").read_text() == "mine"
    assert petiole("merge", plugin, "plain.safetensors", "--force").code == 0
    assert Path("plain.safetensors").stat().st_size > 1000


def test_merge_into_no_folder_is_refused(petiole: Command, plugin: Path) -> None:
    assert petiole("merge", plugin, "no/plain.safetensors").error.startswith("there is no folder no to write")


# doctor


def test_doctor_proves_every_method(petiole: Command) -> None:
    told = json.loads(petiole("doctor", "tiny", "--json").out)
    assert [proof["method"] for proof in told["methods"]] == list(METHODS)
    assert {proof["state"] for proof in told["methods"]} == {"alive"}
    assert {site["site"] for site in told["sites"]} >= {"blocks.0.attn.q", "blocks.1.mlp.fc2"}
    text = petiole("doctor", "tiny").out
    assert "walks it as its own forward does, bit for bit" in text
    assert "rank=" in text


def test_doctor_lists_a_method_that_refuses(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: pt.LoRA, sites: object) -> list[object]:
        raise pt.PluginError("no site\nfits")

    monkeypatch.setattr(pt.LoRA, "select", refuse)
    answer = petiole("doctor", "tiny", "--json")
    assert answer.code == 0
    states = {proof["method"]: proof["state"] for proof in json.loads(answer.out)["methods"]}
    assert states["lora"] == "refused: no site fits"
    assert states["fact"] == "alive"


def test_doctor_fails_where_the_walk_departs(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(VisionTransformer):
        def forward_features(self, x: torch.Tensor, **settings: object) -> torch.Tensor:
            return super().forward_features(x) + 1

    model = Strange(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2)
    monkeypatch.setattr("petiole.backbones.bundled.backbone", lambda name, **settings: model)
    assert "does not walk this Strange as its own forward does" in petiole("doctor", "tiny").error


# demo


def short_digits(seed: int) -> Task:
    """The digits with few images and the tiny model's three classes."""
    return make_task(num_train=9, num_val=3, num_test=6)


@pytest.fixture
def demo(petiole: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The demo on the tiny task; the new process is only recorded."""

    def record(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        record.calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    record.calls = []
    monkeypatch.setattr("subprocess.run", record)
    monkeypatch.setitem(pt.tasks.BUILT_IN, "digits", short_digits)
    petiole.calls = record.calls
    return petiole


def test_demo_trains_reports_and_predicts(demo: Command) -> None:
    answer = demo("demo", "--epochs", "1")
    assert answer.code == 0, answer.err
    assert sorted(path.name for path in Path("demo").iterdir()) == sorted(
        [".petiole-demo", "linear", "lora", "fact", "convpass", "scans", "report.html"]
    )
    for name in ("Linear", "LoRA", "FacT", "Convpass"):
        assert name in answer.out
        assert name in Path("demo/report.html").read_text()
    predict = ["-m", "petiole", "predict", "demo/convpass/plugin.safetensors", "demo/scans"]
    assert demo.calls == [[sys.executable, *predict]]
    assert len(list(Path("demo/scans").iterdir())) == 5


def test_demo_starts_afresh_and_removes_only_its_own(demo: Command) -> None:
    demo("demo", "--epochs", "1")
    Path("demo/notes.txt").write_text("mine")
    Path("demo/lora/state.pt").write_text("of another version")
    answer = demo("demo", "--epochs", "2")
    assert answer.code == 0, answer.err
    assert Path("demo/notes.txt").read_text() == "mine"
    assert len(Path("demo/lora/metrics.jsonl").read_text().splitlines()) == 2


def test_demo_leaves_a_foreign_folder_alone(demo: Command) -> None:
    Path("demo/lora").mkdir(parents=True)
    Path("demo/lora/precious").write_text("mine")
    assert demo("demo").error == "demo exists and was not made by a demo: choose another folder with --out"
    assert Path("demo/lora/precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["jinja2", "matplotlib.figure", "sklearn.datasets"])
def test_demo_names_a_missing_extra(name: str, petiole: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'petiole[" in petiole("demo").error
    assert is_empty()
