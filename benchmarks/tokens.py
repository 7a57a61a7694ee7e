"""Speed of models on fewer tokens, against what the count of their operations promises.

    python benchmarks/tokens.py                                             # ViT-S, ViT-B and micro, one CPU thread
    python benchmarks/tokens.py --device cuda [--compile [reduce-overhead]] # in fp16
    python benchmarks/tokens.py --models vit_small_patch16_224 --batches 1,32 --profile 13
    python benchmarks/tokens.py --models micro,vit_base_patch16_224 --batches 1 --switch 8
    python benchmarks/tokens.py --known --out benchmarks/results/tokens.jsonl

Random weights: they cost what trained ones cost. The contestants of a model and batch take turns in one process, in an
order drawn anew for each round; a turn is set against the one at r = 0 in the same round, and the median of the rounds
counts. Time is processor time of this process on one CPU thread, wall-clock time otherwise. `plain` is the model's own
forward pass, `unbiased` is ToMe whose attention does not count sizes. The promise is the ratio of multiply-accumulate
operations, of which matching and merging are none.

`--profile R` says where the time of a pass goes; on a GPU each section is waited for, which a pass otherwise is not.
`--switch R` times `Elastic.set_budget`, and a pass with the compensator folded and unfolded over one without. Every row
is a line of a journal: a stopped run goes on where it was, and `--known` prints what there is.
"""

import argparse
import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn

import petiole as pt
from petiole.backbones import _timm, vit
from petiole.core.attended import Attended
from petiole.plugins import evit, method, tome
from petiole.train.tradeoffs import TokenCounts
from protocol import Journal

METHODS = {"tome": ("tome", {}), "unbiased": ("tome", {"proportional": False}), "evit": ("evit", {})}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what is timed apart: where the name is looked up, and the name
SECTIONS: dict[str, tuple[tuple[Any, str], ...]] = {
    "attention: q, k, v, proj": ((vit, "run_attention"),),
    "attention: products": ((_timm, "attend"),),
    "MLP": ((_timm, "run_mlp"),),
    "matching": ((tome, "match"), (evit, "prune")),
    "merging": ((tome, "merge"), (evit, "merge")),
    "class attention": ((Attended, "class_attention"),),
    "mean of keys, log of sizes": ((tome.ToMe, "reduce"), (evit.EViT, "reduce")),
    "size bias": ((_timm, "biases"),),
}
REST = "rest: norms, sums, ends"
# share of the promised speed-up that is asked for on a CPU, and the speed-ups asked for on a GPU, ViT-B/16
BAR, GPU_BARS = 0.9, {8: 1.25, 13: 1.5}
Row = Mapping[str, Any]


class Clock:
    """Times parts of a process: in processor time on one CPU thread, otherwise in wall-clock time [s]."""

    def __init__(self, device: str, threads: int) -> None:
        self.is_gpu = device == "cuda"
        self.now = time.process_time if device == "cpu" and threads == 1 else time.perf_counter

    def read(self) -> float:
        """Returns the time once the GPU has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()
        return self.now()

    def turn(self, run: Callable[[], object], count: int) -> float:
        """Returns the time of one of several calls in a row."""
        if count > 1:
            run()  # untimed: clears away what others have left in caches
        start = self.read()
        for _ in range(count):
            run()
        return (self.read() - start) / count


@torch.inference_mode()
def rounds(runs: Sequence[Callable[[], object]], clock: Clock, args: argparse.Namespace) -> list[list[float]]:
    """Returns the time of each contestant in each round [s]."""
    counts = []
    for run in runs:
        clock.turn(run, 2)  # the first calls fetch memory, choose kernels and compile
        counts.append(max(1, round(args.seconds / max(clock.turn(run, 1), 1e-6))))
    times: list[list[float]] = [[] for _ in runs]
    for i in range(args.rounds):
        for j in random.Random(i).sample(range(len(runs)), len(runs)):
            times[j].append(clock.turn(runs[j], counts[j]))
    return times


def backbone(name: str, args: argparse.Namespace) -> nn.Module:
    """Returns a frozen backbone in eval mode; of the timm models with random weights."""
    torch.manual_seed(0)
    model = pt.backbone(name) if name == "micro" else timm.create_model(name)
    return model.to(args.device, DTYPES[args.dtype]).eval().requires_grad_(False)


def compressed(model: nn.Module, kind: str, r: int) -> pt.Adapted:
    """Returns a backbone on a token budget, as `petiole.compress` does, without its proofs."""
    name, settings = METHODS[kind]
    return pt.adapt(model, method(name, budget=r, **settings), prove=False)


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what everything is measured with."""
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    if args.device == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        machine = next((x for x in info.read_text().splitlines() if x.startswith("model name")), machine)
    here = {"machine": machine.split(": ")[-1], "torch": torch.__version__, "device": args.device, "dtype": args.dtype}
    return {**here, "threads": args.threads, "compile": args.compile}


def speed(plain: nn.Module, batch: int, wanted: Sequence[tuple[str, int]], args: argparse.Namespace) -> list[Row]:
    """Returns throughput, operations and tokens of each contestant; speed-ups are over the second, r = 0."""
    adapted = [compressed(plain, "tome" if kind == "plain" else kind, r) for kind, r in wanted]
    models = [plain, *adapted[1:]]
    models = [torch.compile(m, mode=args.compile, dynamic=False) if args.compile != "off" else m for m in models]
    images = adapted[0].view.probe(plain, batch)
    times = rounds([partial(model, images) for model in models], Clock(args.device, args.threads), args)
    rows = []
    for model, own in zip(adapted, times, strict=True):
        ratios, counts = sorted(base / other for base, other in zip(times[1], own, strict=True)), TokenCounts.of(model)
        row = {"tokens": counts.left[-1], "macs": counts.macs(model), "rounds": args.rounds}
        row |= {"images_per_second": batch / statistics.median(own), "speed_up": statistics.median(ratios)}
        rows.append(row | {"lowest": ratios[0], "highest": ratios[-1]})
    return rows


@contextmanager
def sections(clock: Clock) -> Iterator[dict[str, float]]:
    """Yields a table that gathers the time inside each section but outside those it calls [s]."""
    spent, inside, last = dict.fromkeys((*SECTIONS, REST), 0.0), [REST], 0.0

    def cut() -> None:
        nonlocal last
        now = clock.read()
        spent[inside[-1]] += now - last
        last = now

    def wrapped(title: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            cut()
            inside.append(title)
            try:
                return call(*args, **kwargs)
            finally:
                cut()
                inside.pop()

        return run

    with ExitStack() as stack:
        for title, places in SECTIONS.items():
            for owner, attribute in places:
                stack.enter_context(mock.patch.object(owner, attribute, wrapped(title, getattr(owner, attribute))))
        last = clock.read()
        yield spent
        cut()


def profile(plain: nn.Module, batch: int, wanted: Sequence[tuple[str, int]], args: argparse.Namespace) -> list[Row]:
    """Returns where the time of a pass of each contestant goes [ms], the median of all passes."""
    models, clock = [compressed(plain, kind, r) for kind, r in wanted], Clock(args.device, args.threads)
    images = models[0].view.probe(plain, batch)
    found: list[list[dict[str, float]]] = [[] for _ in models]

    def run(i: int) -> None:
        with sections(clock) as spent:
            models[i](images)
        found[i].append(spent)

    rounds([partial(run, i) for i in range(len(models))], clock, args)
    return [{key: 1e3 * statistics.median(row[key] for row in passes) for key in passes[0]} for passes in found]


def switch(plain: nn.Module, batch: int, wanted: Sequence[tuple[str, int]], args: argparse.Namespace) -> list[Row]:
    """Returns how long a change of the budget takes [ms], and what the compensator costs in a pass."""
    model, clock, r, times = pt.adapt(plain, prove=False), Clock(args.device, args.threads), wanted[0][1], []
    live = pt.Elastic(pt.compress(model, r, compensator=pt.ToCom()))
    for i in range(52):
        start = clock.read()
        live.set_budget(r if i % 2 else r // 2)
        times.append(clock.read() - start)
    runs = [partial(m, model.view.probe(plain, batch)) for m in (pt.compress(model, r), live.folded, live.base)]
    bare, *others = rounds(runs, clock, args)
    ratios = [statistics.median(a / b for a, b in zip(other, bare, strict=True)) for other in others]
    values = (1e3 * statistics.median(times[2:]), 1e3 * statistics.median(bare), *ratios)
    return [dict(zip(("set_budget", "pass", "folded", "unfolded"), values, strict=True))]


def tables(rows: Iterable[tuple[Row, Row]]) -> Iterator[str]:
    """Yields a table in Markdown of each setting, model and batch, from what was measured with and what was found."""
    groups: dict[tuple[tuple[str, Any], ...], list[Row]] = {}
    for run, found in rows:
        shared = () if run["phase"] == "switch" else ("model", "batch")
        keys = ("phase", *shared, "machine", "device", "dtype", "threads", "compile", "torch")
        groups.setdefault(tuple((key, run[key]) for key in keys), []).append({**run, **found})
    for shared, group in groups.items():
        of_phase = {"speed": speed_table, "profile": profile_table, "switch": switch_table}[str(shared[0][1])]
        yield ", ".join(f"{key} {value}" for key, value in shared[1:]) + f"\n\n{of_phase(group)}"


def speed_table(rows: Sequence[Row]) -> str:
    """Returns the rows of one model and batch; bold is what falls short of a bar."""
    whole, found = next(row["macs"] for row in rows if (row["method"], row["r"]) == ("tome", 0)), []
    for row in rows:
        promised, speed_up = whole / row["macs"], row["speed_up"]
        is_asked = (row["device"], row["model"], row["method"]) == ("cuda", "vit_base_patch16_224", "tome")
        words = [f"{row['macs'] / 1e9:.2f}", f"{row['images_per_second']:.1f}", f"{promised:.2f}"]
        mark = "**" * (is_asked and speed_up < GPU_BARS.get(row["r"], 0))
        words += [f"{mark}{speed_up:.2f}{mark}", f"{row['lowest']:.2f} .. {row['highest']:.2f}"]
        mark = "**" * (speed_up < BAR * promised)
        words.append(f"{mark}{speed_up / promised:.2f}{mark}")
        words.append(f"{(speed_up - 1) / (promised - 1):.2f}" if promised > 1 else "")  # else it is noise
        found.append([row["method"], row["r"], row["tokens"], *words])
    head = "method|r|tokens|GMACs|images/s|promised|speed-up|lowest .. highest|of promised|of gain"
    return table(head.split("|"), found)


def profile_table(rows: Sequence[Row]) -> str:
    """Returns the time in each section of a pass [ms] and its share of that pass, a column a contestant."""
    totals = [sum(row[title] for title in (*SECTIONS, REST)) for row in rows]
    found = [
        [title, *(f"{row[title]:.2f} ({row[title] / total:.1%})" for row, total in zip(rows, totals, strict=True))]
        for title in (*SECTIONS, REST)
        if any(row[title] for row in rows)
    ]
    whole = ["whole", *(f"{total:.2f}" for total in totals)]
    return table(["ms a pass", *(f"{row['method']} {row['r']}" for row in rows)], [*found, whole])


def switch_table(rows: Sequence[Row]) -> str:
    """Returns how long a change of the budget takes, and a pass with the compensator over one without."""
    head = ["model", "batch", "r", "set_budget [ms]", "pass without [ms]", "x folded", "x unfolded"]
    digits = {"set_budget": 2, "pass": 1, "folded": 3, "unfolded": 3}
    cells = [[f"{row[key]:.{n}f}" for key, n in digits.items()] for row in rows]
    return table(head, [[row["model"], row["batch"], row["r"], *c] for row, c in zip(rows, cells, strict=True)])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def options() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words, numbers = (lambda text: text.split(",")), (lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--models", type=words, default="vit_small_patch16_224,vit_base_patch16_224,micro")
    parser.add_argument("--batches", type=numbers, default="1,8,32")
    parser.add_argument("--budgets", type=numbers, default="0,4,8,13,16")
    parser.add_argument("--methods", type=words, default=",".join(METHODS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 on a CPU, fp16 on a GPU by default")
    parser.add_argument("--compile", nargs="?", const="default", default="off", help="mode, e.g. reduce-overhead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="least time of a turn [s]")
    parser.add_argument("--profile", type=int, metavar="R", help="instead: where the time goes at this budget")
    parser.add_argument("--switch", type=int, metavar="R", help="instead: changes to this budget, and the compensator")
    parser.add_argument("--out", type=Path, default=Path("runs/tokens.jsonl"))
    parser.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    args = parser.parse_args()
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "fp16")
    return args


def main() -> None:
    args = options()
    torch.set_num_threads(args.threads)
    # every budget of every model is a graph of its own, behind one and the same code
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    journal, measure = Journal(args.out), speed
    wanted = [("plain", 0), ("tome", 0), *itertools.product(args.methods, [r for r in args.budgets if r])]
    if args.profile is not None:
        measure, wanted = profile, [("tome", 0), *((kind, args.profile) for kind in args.methods)]
    elif args.switch is not None:
        measure, wanted = switch, [("tocom", args.switch)]
    for name, batch in () if args.known else itertools.product(args.models, args.batches):
        shared = {"phase": measure.__name__, **setting(args), "model": name, "batch": batch}
        keys = [{**shared, "method": kind, "r": r} for kind, r in wanted]
        if not all(key in journal for key in keys):
            for key, row in zip(keys, measure(backbone(name, args), batch, wanted, args), strict=True):
                journal.add(key, row)
        print(f"{name}, batch {batch}: done", flush=True)
    print("\n\n".join(tables(journal.runs())))


if __name__ == "__main__":
    main()
