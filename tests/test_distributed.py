"""Several processes on one machine: the same weights as one process, and only the first one writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import petiole as pt
from fitting import fit, make_model, make_split, make_task, vit
from petiole.tasks import Pixels, Transform
from petiole.train.distilling import Pair, PairSteps, distill, parted
from petiole.train.world import Processes, World, find_world

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
# name -> plugin and number of images: 13 in batches of 5, 5 and 3 are shares of 3 and 2, and of 2 and 1; of 11, the
# last batch has one image for two processes
CASES = {
    "lora": (lambda: pt.LoRA(rank=2, dropout=0.0), 13),
    "linear": (pt.Linear, 13),
    "one": (lambda: pt.LoRA(rank=2, dropout=0.0), 11),
}
PLUGINS = {"fact": lambda: pt.FacT(rank=2, dropout=0.0), "full": pt.Full, "linear": pt.Linear}
RECIPE = pt.Recipe(epochs=2, batch_size=5, lr=1e-3)
# of the two, one diverges
GRID = {"lr": [1e-2, 1e30], "rank": [1], "dropout": [0.0]}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def make_compensated() -> pt.Adapted:
    """Returns the tiny ViT with a compensator."""
    return pt.adapt(vit(), pt.ToCom(groups=2, target=2, dropout=0.0))


def both_processes(out: Path) -> None:
    """What each of two processes does; the tests look at what is left in the folder."""
    found: dict[str, Any] = {}
    for name in (*CASES, "lora"):
        make, num_train = CASES[name]
        model = make_model(make())
        result = fit(model, make_task(num_train=num_train), RECIPE, out=out / name, save_every=0)
        found[f"{name} again" if name in found else name] = (dict(model.task_state()), result.history, result.metrics)
    rank = dist.get_rank()
    try:
        fit(make_model(pt.Linear()), make_task(), RECIPE, out=out / "lora", progress=False)
    except pt.FitError as error:
        found["error"] = str(error)
    model = make_compensated()
    result = distill(model, make_split(24, 0), RECIPE, out=out / "tocom", progress=False)
    found["tocom"] = (dict(model.task_state()), result.metrics)
    result = pt.search(vit(), "fact", make_task(), GRID, RECIPE, out=out)
    found["search"] = [[c.settings, c.val_accuracy, c.failure] for c in (*result.candidates, result.chosen)]
    found["gradients"] = {}
    for name, make in PLUGINS.items():
        # DDP by hand, without Accelerate and without find_unused_parameters
        model = make_model(make())
        net = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            nn.functional.cross_entropy(net(IMAGES[rank::2]), LABELS[rank::2]).backward()
        found["gradients"][name] = {n: p.grad for n, p in model.trained()}
    torch.save(found, out / f"{rank}.pt")
    dist.destroy_process_group()


def launch(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command with the tests' modules in reach and one thread a process."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done


def torchrun(*args: str | Path) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nproc_per_node=2", f"--master_port={port}", "--master_addr=127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *where, *map(str, args)]


class Both(NamedTuple):
    """What two processes came to, what they printed, and where."""

    found: list[dict[str, Any]]
    printed: list[str]
    folder: Path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("both")
    done = launch(torchrun(__file__, folder), folder)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return Both(found, done.stderr.splitlines(), folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_weights_of_one(name: str, both: Both, tmp_path: Path) -> None:
    make, num_train = CASES[name]
    model = make_model(make())
    alone = fit(model, make_task(num_train=num_train), RECIPE, out=tmp_path, progress=False)
    for found in both.found:
        weights, history, metrics = found[name]
        # Adam turns a gradient's rounding into a step of up to lr where the gradient is nearly nothing
        torch.testing.assert_close(weights, dict(model.task_state()), rtol=1e-3, atol=2e-4)
        assert [row["lr"] for row in history] == [row["lr"] for row in alone.history]
        assert [row["loss"] for row in history] == pytest.approx([row["loss"] for row in alone.history], rel=1e-4)
        assert metrics.keys() == alone.metrics.keys()
    assert {path.name for path in (both.folder / name).iterdir()} == {path.name for path in tmp_path.iterdir()}


def test_only_the_first_process_writes_and_prints(both: Both) -> None:
    lines = (both.folder / "linear" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == both.found[0]["linear"][1]
    assert len([line for line in both.printed if line.startswith("Linear: 6/6 epoch 2")]) == 1


def test_two_processes_return_a_finished_run(both: Both) -> None:
    assert len([line for line in both.printed if "this run is finished" in line]) == 1
    for found in both.found:
        (weights, *rest), (again, *others) = found["lora"], found["lora again"]
        assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
        assert rest == others


def test_two_processes_distill_by_the_mean_of_their_losses(both: Both) -> None:
    # each process draws a pair of degrees of its own
    model, shares = make_compensated(), []
    pair, transform = Pair(model, None), Transform(model.input_config)
    for rank in range(2):
        share = World("fp32")
        share.rank, share.size = rank, 2
        shares.append(PairSteps(pair, Pixels(parted(make_split(24, 0), RECIPE.seed)[0], transform), RECIPE, share))
    lead = shares[0]
    for step in range(lead.total):
        lead.schedule.step_update(step)
        lead.raw.zero_grad()
        (sum(share.loss(lead.batch(step), step) for share in shares) / 2).backward()
        lead.raw.step()
    for weights, metrics in (found["tocom"] for found in both.found):
        torch.testing.assert_close(weights, dict(model.task_state()), rtol=1e-3, atol=2e-4)
        assert metrics == both.found[0]["tocom"][1] | {"seconds": metrics["seconds"]}


def test_error_of_the_first_process_is_everyones(both: Both) -> None:
    for found in both.found:
        assert "holds a run with other settings (plugins.0.method lora -> linear" in found["error"]


def test_two_processes_search_as_one(both: Both) -> None:
    alone = pt.search(vit(), "fact", make_task(), GRID, RECIPE, progress=False)
    expected = [[c.settings, c.val_accuracy] for c in (*alone.candidates, alone.chosen)]
    for found in both.found:
        assert [row[:2] for row in found["search"]] == expected
        assert found["search"][1][2].startswith("the loss became nan")
    lines = (both.folder / "search" / "search.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"] for line in lines] == [settings for settings, _ in expected[:2]]
    assert len([line for line in both.printed if line.startswith("search: candidate")]) == 2


@pytest.mark.parametrize("name", PLUGINS)
def test_plain_ddp_gives_the_whole_batchs_gradients(name: str, both: Both) -> None:
    model = make_model(PLUGINS[name]())
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    expected = {n: p.grad for n, p in model.trained()}
    for found in both.found:
        torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_fit_command_runs_in_two_processes(launcher: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    if not (Path(pt.__file__).parent / "assets" / "micro.safetensors").exists():
        pytest.skip("the bundled weights are absent")
    fit_it = ["-m", "petiole", "fit", "digits", "-m", "linear", "--epochs", "1", "--out", "run"]
    if launcher == "torchrun":
        command = torchrun(*fit_it)
    else:
        options = ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, *fit_it]
    done = launch(command, tmp_path)
    assert done.stdout.count("Linear") == 1
    metrics = pt.inspect(tmp_path / "run" / "plugin.safetensors").metrics
    assert metrics["trained_parameters"] == 192 * 10 + 10
    assert (tmp_path / "run" / "report.html").exists()


def test_one_process_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert type(find_world("fp32")) is World
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert type(find_world("fp32")) is World
    with pytest.raises(pt.FitError, match=r"several processes need Accelerate: pip install 'petiole\[dist\]'"):
        Processes("fp32")


if __name__ == "__main__":
    both_processes(Path(sys.argv[1]))
