"""What continual learning costs beside its arithmetic: against plain loops, against Avalanche, and without a cache.

    OMP_NUM_THREADS=1 python benchmarks/continual.py
    OMP_NUM_THREADS=1 python benchmarks/continual.py --parts overhead
    python benchmarks/continual.py --known --out benchmarks/results/continual.jsonl

overhead    `run(stream, learner)`, against a plain loop over the same batches, given as a list, that does the same
            arithmetic with the same reservoir; both end with the same weights, bit for bit
avalanche   ER with a reservoir of 500, against the `Replay` strategy with as many exemplars: the same network, data,
            batches and exemplars a step, without metrics or logging; the second of two experiences, as in the first
            one Avalanche does not replay. It needs Avalanche: pip install avalanche-lib
cache       TAER, 10 epochs over two experiences of scanned digits with 5 exemplars of each class: features computed
            once, against features computed again whenever a step needs an image, for the same head and steps

Data are noise: vectors, or images of one byte a value, which ours and the plain loop scale by the batch and Avalanche's
data set by the sample. Both sides take turns in one process, in an order drawn anew for each round; what counts are
medians over rounds, also of differences and ratios within a round. Time is processor time of one thread.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from petiole.continual.exemplars import ClassBalanced, Exemplars, Reservoir
from petiole.continual.features import Extractor, cache_features
from petiole.continual.heads import HeadLearner
from petiole.continual.learner import run
from petiole.continual.online.baselines import er, fine_tune
from petiole.continual.online.learner import OnlineLearner
from petiole.continual.online.networks import small_resnet
from petiole.continual.streams import Experience, Stream, class_incremental
from petiole.continual.taer import TAER
from protocol import Journal
from tokens import Clock, setting, table

Batches = Sequence[tuple[Tensor, Tensor]]
LR, ROOM, PER_CLASS, EPOCHS = 0.01, 500, 5, 10
# most time more than a plain loop [ms], and least times faster than the other side
MOST_MORE, LEAST_FASTER = 0.1, {"avalanche": 3.0, "cache": 10.0}
# network, shape of its inputs, batch and exemplars a step, steps of an experience
NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "MLP 64-64": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (64,), 10, 200),
    "MLP 784-512": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU()), (1, 28, 28), 32, 100),
    "ResNet-18, width 2, 8 pixels": (lambda: small_resnet(2, stride=2), (3, 8, 8), 10, 50),
    "ResNet-18, width 20, 32 pixels": (lambda: small_resnet(20, stride=2), (3, 32, 32), 10, 15),
}


def random_stream(shape: Sequence[int], num_steps: int, batch: int) -> Stream:
    """Returns two experiences of two classes with this many steps each, of noise."""
    generator, num = torch.Generator().manual_seed(0), 2 * num_steps * batch
    if len(shape) == 1:
        x = torch.randn(num, *shape, generator=generator)
    else:
        x = torch.randint(256, (num, *shape), generator=generator, dtype=torch.uint8)
    y = torch.arange(num) % 4
    return class_incremental((x, y), num_experiences=2, batch_size=batch)


def scaled(x: Tensor) -> Tensor:
    """Returns bytes as numbers from 0 to 1, and other numbers as they are."""
    return x if x.is_floating_point() else x.float() / 255


def learner_of(network: nn.Module, replay: int) -> OnlineLearner:
    """Returns a fresh online learner, which replays as many exemplars a step."""
    return er(network, Reservoir(ROOM), lr=LR, replay=replay) if replay else fine_tune(network, lr=LR)


def plain_loop(network: nn.Module, experiences: Sequence[tuple[Sequence[int], Batches]], replay: int) -> nn.ModuleList:
    """Trains a network and a linear layer for the classes of each experience, and returns these layers.

    Args:
        network: As of `learner_of`.
        experiences: Classes and batches of each; its first batch has all its classes, for the learner makes rows of
            those it sees.
        replay: As of `learner_of`.
    """
    network.train()
    optimizer, layers, exemplars = torch.optim.SGD(network.parameters(), lr=LR), nn.ModuleList(), Reservoir(ROOM)
    column = torch.empty(1 + max(c for classes, _ in experiences for c in classes), dtype=torch.int64)
    num_classes = 0
    for classes, batches in experiences:
        column[list(classes)] = torch.arange(num_classes, num_classes + len(classes))
        num_classes += len(classes)
        for i, (x, y) in enumerate(batches):
            inputs, labels = x, y
            if replay and len(exemplars):
                inputs, labels = (torch.cat(pair) for pair in zip((x, y), exemplars.sample(replay), strict=True))
            optimizer.zero_grad()
            features = network(scaled(inputs))
            if i == 0:
                layers.append(nn.Linear(features.shape[1], len(classes)))
                for p in layers[-1].parameters():
                    nn.init.zeros_(p)
                optimizer.add_param_group({"params": layers[-1].parameters()})
            logits = torch.cat([layer(features) for layer in layers], 1)
            F.cross_entropy(logits, column[labels]).backward()
            optimizer.step()
            if replay:
                exemplars.add(x, y)
    return layers


def overhead(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the time of a step of ours and of a plain loop, without exemplars and with as many as the batch."""
    make, shape, batch, steps = NETWORKS[name]
    stream, found = random_stream(shape, steps, batch), {}
    listed = [(experience.classes, list(experience.batches())) for experience in stream]

    def ours(replay: int) -> float:
        return args.clock.turn(lambda: [None for _ in run(stream, learner_of(make(), replay))], 1) / (2 * steps)

    def plain(replay: int) -> float:
        return args.clock.turn(lambda: plain_loop(make(), listed, replay), 1) / (2 * steps)

    for words, replay in (("fine-tuning", 0), ("ER", batch)):
        found[f"{words}, {name}"] = compared(partial(ours, replay), partial(plain, replay), args)
    return found


def avalanche(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the time of a step of ours and of Avalanche's, in the second of two experiences."""
    make, shape, batch, steps = NETWORKS[name]
    stream = random_stream(shape, steps, batch)

    def ours() -> float:
        events = run(stream, learner_of(make(), batch))
        next(event for event in events if event.matrix is not None)
        return args.clock.turn(lambda: [None for _ in events], 1) / steps

    return {f"ER, {name}": compared(ours, lambda: avalanche_step(make(), stream, batch, args.clock), args)}


def avalanche_step(network: nn.Module, stream: Stream, batch: int, clock: Clock) -> float:
    """Returns the time of a step of Avalanche's `Replay` in the second experience [s]."""
    try:
        from avalanche.benchmarks import benchmark_from_datasets
        from avalanche.benchmarks.utils import TransformGroups, as_classification_dataset
        from avalanche.training.plugins import EvaluationPlugin
        from avalanche.training.supervised import Replay
    except ImportError as error:
        raise SystemExit(f"error: this part needs Avalanche: pip install avalanche-lib ({error})") from error

    def dataset(experience: Experience) -> Any:
        arrays: Any = torch.utils.data.TensorDataset(*experience.train.batch(range(len(experience.train))))
        arrays.targets = arrays.tensors[1].tolist()
        return as_classification_dataset(arrays, TransformGroups({"train": (scaled, None), "eval": (scaled, None)}))

    model = nn.Sequential(network, nn.LazyLinear(len(stream.classes)))
    model(scaled(stream[0].train.batch(range(2))[0]))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=LR), nn.CrossEntropyLoss()
    sizes = {"mem_size": ROOM, "train_mb_size": batch, "evaluator": EvaluationPlugin()}
    strategy = Replay(model=model, optimizer=optimizer, criterion=loss, **sizes)
    first, second = benchmark_from_datasets(train=[dataset(experience) for experience in stream]).train_stream
    strategy.train(first)
    before = strategy.clock.train_iterations
    return clock.turn(lambda: strategy.train(second), 1) / (strategy.clock.train_iterations - before)


def cache(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the time of learning from images with a cache of their features and without one."""
    extract = Extractor(pt.adapt(pt.backbone("micro")))
    images = pt.open_task(name).train.part(range(args.images))
    features = cache_features(extract.model, images)

    def learn(samples: Any) -> None:
        head = TAER(ClassBalanced(per_class=PER_CLASS), epochs=EPOCHS, min_steps=0)
        for _ in run(class_incremental(samples, num_experiences=2), HeadLearner(head)):
            pass

    def uncached() -> None:
        exemplars: Exemplars = ClassBalanced(per_class=PER_CLASS)
        for experience in class_incremental(images, num_experiences=2, epochs=EPOCHS, transform=extract.transform):
            for x, _ in experience.batches():
                extract(torch.cat([x, exemplars.sample(len(x))[0]]) if len(exemplars) else x)
            exemplars.add(*experience.train.batch(range(len(experience.train))))
        learn(features)

    sides = (lambda: learn(cache_features(extract.model, images)), uncached)
    turns = (partial(args.clock.turn, side, 1) for side in sides)
    return {f"TAER, micro, {args.images} images of {name}": compared(*turns, args)}


def compared(ours: Callable[[], float], other: Callable[[], float], args: argparse.Namespace) -> dict[str, float]:
    """Returns medians of both times [ms], of the difference [ms] and of how many times faster ours is."""
    rounds, sides = [], [("ours", ours), ("other", other)]
    for i in range(1 + args.rounds):
        times = {side: 1e3 * call() for side, call in random.Random(i).sample(sides, 2)}
        rounds.append((times["ours"], times["other"], times["ours"] - times["other"], times["other"] / times["ours"]))
    # the first round fetches memory and chooses kernels
    columns = dict(zip(("ours", "other", "more", "faster"), zip(*rounds[1:], strict=True), strict=True))
    found = {key: statistics.median(values) for key, values in columns.items()}
    for key in ("more", "faster"):
        found |= {f"least_{key}": min(columns[key]), f"most_{key}": max(columns[key])}
    return found | {"rounds": args.rounds}


PARTS = {"overhead": overhead, "avalanche": avalanche, "cache": cache}


def tables(journal: Journal) -> str:
    """Returns what was measured as Markdown, a table a setting; bold is what misses an aim.

    `other` is the plain loop, Avalanche or what has no cache; `found` is what the aim is about, with the lowest and the
    highest round.
    """
    groups: dict[str, list[list[str]]] = {}
    for asked, found in journal.runs():
        about = ", ".join(f"{key} {asked[key]}" for key in ("machine", "torch", "threads"))
        groups.setdefault(about, []).append(_row(asked, found))
    head = ["", "other [ms]", "petiole [ms]", "found", "aim"]
    return "\n\n".join(f"{about}\n\n{table(head, rows)}" for about, rows in groups.items())


def _row(asked: Mapping[str, Any], found: Mapping[str, float]) -> list[str]:
    is_overhead = asked["part"] == "overhead"
    is_missed = found["more"] > MOST_MORE if is_overhead else found["faster"] < LEAST_FASTER[asked["part"]]
    aim = f"{MOST_MORE:g} ms more" if is_overhead else f"{LEAST_FASTER[asked['part']]:g} times faster"
    key = "more" if is_overhead else "faster"
    cell = f"{found[key]:.3f} ({found[f'least_{key}']:.3f} .. {found[f'most_{key}']:.3f})"
    times = [f"{found[side]:.3f}" for side in ("other", "ours")]
    return [f"{asked['part']}: {asked['what']}", *times, f"**{cell}**" if is_missed else cell, aim]


def main() -> None:
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    journal, args.clock = Journal(args.out), Clock(args.device, args.threads)
    shared = {**setting(args), "images": args.images}
    for part in [] if args.known else args.parts.split(","):
        for name in ("digits",) if part == "cache" else args.networks.split(";"):
            if not any((asked | shared | {"part": part, "name": name}) == asked for asked, _ in journal.runs()):
                for what, found in PARTS[part](name, args).items():
                    journal.add({**shared, "part": part, "name": name, "what": what}, found)
            print(f"{part}, {name}: done", flush=True)
    print(tables(journal))


def options() -> argparse.ArgumentParser:
    """Returns what can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--networks", default=";".join(NETWORKS), help="separated by semicolons")
    parser.add_argument("--images", type=int, default=160, help="digits that are learnt")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/continual.jsonl"))
    parser.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    parser.set_defaults(device="cpu", dtype="fp32", compile="off", threads=1)
    return parser


if __name__ == "__main__":
    main()
