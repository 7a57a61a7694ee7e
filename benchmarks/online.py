"""Online class-incremental learning from nothing: one pass, few exemplars, with boundaries and without.

    python benchmarks/online.py --data ../shared/data                   # everything, on two CPU cores over night
    python benchmarks/online.py --data ../shared/data --sets fashion    # the small set alone
    python benchmarks/online.py --known --out benchmarks/results/online.jsonl

Sets, all at 32x32 pixels:

fashion   Fashion-MNIST as its pack has it: 100 training images of each of 10 classes (the data set itself has 6,000),
          200 test images of each; 5 experiences of 2 classes; 100 exemplars
tiny      20 classes of Tiny ImageNet, about 250 training images of each, 50 validation images of each as test;
          10 experiences of 2 classes; 400 exemplars

Each is met in two ways: class by class (`split`, 2 classes in an experience), and as classes come and go without
boundaries (`smooth`, whose forgetting is that of classes). The order of classes, of samples and the first weights
follow the seed. All learners have the same network, batches of 10 and 32 exemplars a step. A method's learning rate is
chosen once per set, by the final average of one `split` stream of other classes: 20 more of Tiny ImageNet, or 10 of
them in grey and 100 images each, with their own test images. Nothing is selected on the classes that are reported.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import petiole as pt
from petiole.continual.exemplars import ClassBalanced, Reservoir
from petiole.continual.learner import Learner, run
from petiole.continual.online import baselines
from petiole.continual.online.augment import CropColour, ShiftFlip
from petiole.continual.online.learner import OnlineLearner
from petiole.continual.online.networks import small_resnet
from petiole.continual.online.objectives import ProxyNCA
from petiole.continual.online.pairs import Hybrid, MultiSimilarity
from petiole.continual.streams import Stream, class_incremental, smooth
from petiole.tasks import Pixels, Split
from petiole.tasks.images import Packed
from protocol import Journal, mean_and_spread

Arrays = tuple[Tensor, Tensor]
TRANSFORM = pt.Transform({"input_size": (3, 32, 32), "crop_mode": "squash", "crop_pct": 1.0})
BATCH, REPLAY = 10, 32
# set -> classes, experiences, exemplars
SETS = {"fashion": (10, 5, 100), "tiny": (20, 10, 400)}
WAYS = ("split", "smooth")
RATES = (0.03, 0.1, 0.3)

Make = Callable[[nn.Module, int, dict[str, Any]], Learner]


def _two_views(settings: Mapping[str, Any], augment: Any) -> dict[str, Any]:
    return {**settings, "augment": augment, "views": 2}


# network, exemplars there is room for, settings -> learner
METHODS: dict[str, Make] = {
    "fine-tune": lambda net, size, s: baselines.fine_tune(net, **s),
    "A-GEM": lambda net, size, s: baselines.a_gem(net, Reservoir(size, seed=s["seed"]), **s),
    "ER": lambda net, size, s: baselines.er(net, Reservoir(size, seed=s["seed"]), **s),
    "ER, NCM": lambda net, size, s: baselines.er(net, Reservoir(size, seed=s["seed"]), classifier="ncm", **s),
    "MIR": lambda net, size, s: baselines.mir(net, Reservoir(size, seed=s["seed"]), **s),
    "DER++": lambda net, size, s: baselines.dark_experience(net, Reservoir(size, seed=s["seed"]), num_classes=20, **s),
    "ER-ACE": lambda net, size, s: baselines.er_ace(net, Reservoir(size, seed=s["seed"]), **s),
    "ER-ACE, NCM": lambda net, size, s: baselines.er_ace(net, Reservoir(size, seed=s["seed"]), classifier="ncm", **s),
    "SCR": lambda net, size, s: baselines.scr(net, Reservoir(size, seed=s["seed"]), **_two_views(s, CropColour())),
    "GDumb": lambda net, size, s: baselines.GDumb(
        net, ClassBalanced(size, seed=s["seed"]), epochs=15, **{k: s[k] for k in ("lr", "augment", "normalize", "seed")}
    ),
    "Multi-Similarity": lambda net, size, s: OnlineLearner(
        net, MultiSimilarity(), Reservoir(size, seed=s["seed"]), **s
    ),
    "Proxy-NCA": lambda net, size, s: OnlineLearner(net, ProxyNCA(), Reservoir(size, seed=s["seed"]), **s),
    "generative": lambda net, size, s: baselines.generative(net, Reservoir(size, seed=s["seed"]), **s),
    "generative, two views": lambda net, size, s: baselines.generative(
        net, Reservoir(size, seed=s["seed"]), **_two_views(s, s["augment"])
    ),
    "generative, incoming": lambda net, size, s: OnlineLearner(
        net,
        Hybrid(pairs=MultiSimilarity(negatives="incoming"), proxies=ProxyNCA(negatives="incoming")),
        Reservoir(size, seed=s["seed"]),
        **s,
    ),
}


def main() -> None:
    args = options().parse_args()
    journal = Journal(args.out)
    for name in [] if args.known else args.sets.split(","):
        parts = {phase: read(Path(args.data), name, phase, args.per_class) for phase in ("choose", "test")}
        for method in args.methods.split(";"):
            run_method(journal, name, method, parts, args)
    for name, way, replay in itertools.product(SETS, WAYS, sorted({replay_of(asked) for asked, _ in journal.runs()})):
        if rows := table(journal, name, way, replay):
            print(f"\n{name}, {way}, {replay} exemplars a step\n\n{rows}")


def run_method(
    journal: Journal, name: str, method: str, parts: Mapping[str, tuple[Arrays, Arrays]], args: argparse.Namespace
) -> None:
    """Runs what the journal does not have of a method on a set."""
    shared = {"set": name, "method": method, "width": args.width, "per_class": args.per_class}
    shared |= {"replay": args.replay} if args.replay != REPLAY else {}
    rates = [float(rate) for rate in args.rates.split(",")]
    finals = {}
    for lr in rates if len(rates) > 1 else ():
        asked = {**shared, "phase": "choose", "way": "split", "lr": lr, "seed": 0}
        finals[lr] = once(journal, asked, parts["choose"])["final_average"]
    lr = max(finals, key=lambda rate: finals[rate]) if finals else rates[0]
    for way in args.ways.split(","):
        for seed in range(args.seeds):
            asked = {**shared, "phase": "test", "way": way, "lr": lr, "seed": seed}
            found = once(journal, asked, parts["test"])
            words = f"{name:9}{method:23}{way:8}lr {lr:<6g}seed {seed}"
            print(f"{words}{100 * found['final_average']:7.1f}{found['seconds']:8.1f} s", flush=True)


def once(journal: Journal, asked: Mapping[str, Any], parts: tuple[Arrays, Arrays]) -> Mapping[str, float]:
    """Returns the metrics of one run, from the journal where it is there."""
    if asked not in journal:
        began = time.perf_counter()
        torch.manual_seed(asked["seed"])
        *_, last = run(stream(asked, parts), learner(asked), test_batch_size=250)
        assert last.matrix is not None
        found = last.matrix.metrics()
        kept = ("final_average", "average_incremental", "forgetting_since_best", "learning_accuracy")
        journal.add(asked, {key: found[key] for key in kept} | {"seconds": time.perf_counter() - began})
    return journal[asked]


def learner(asked: Mapping[str, Any]) -> Learner:
    """Returns a fresh learner."""
    seed = asked["seed"]
    settings = {"lr": asked["lr"], "augment": ShiftFlip(), "normalize": TRANSFORM.normalize, "seed": seed}
    if asked["method"] != "GDumb":
        settings["replay"] = replay_of(asked)
    network = small_resnet(asked["width"], stride=2, seed=seed)
    return METHODS[asked["method"]](network, SETS[asked["set"]][2], settings)


def replay_of(asked: Mapping[str, Any]) -> int:
    """Returns how many exemplars a step sees."""
    return asked.get("replay", REPLAY)


def stream(asked: Mapping[str, Any], parts: tuple[Arrays, Arrays]) -> Stream:
    """Returns the stream that a run asks for; its order follows the seed."""
    seed, (_, num_experiences, _) = asked["seed"], SETS[asked["set"]]
    if asked["way"] == "smooth":
        return smooth(*parts, num_checkpoints=num_experiences, order=seed, batch_size=BATCH, seed=seed)
    return class_incremental(*parts, num_experiences=num_experiences, order=seed, batch_size=BATCH, seed=seed)


def read(folder: Path, name: str, phase: str, per_class: int | None) -> tuple[Arrays, Arrays]:
    """Returns training and test samples of a set, or of the other classes its learning rates are chosen on."""
    num_classes = SETS[name][0]
    if name == "fashion" and phase == "test":
        task = pt.open_task(folder / "tasks" / "fashion_mnist.npz").joined()
        assert task.test is not None
        return arrays(task.train, range(num_classes), per_class), arrays(task.test, range(num_classes), None)
    order = np.random.default_rng(0).permutation(200)
    classes = order[20 : 20 + num_classes] if phase == "choose" else order[:num_classes]
    size = 100 if name == "fashion" and per_class is None else per_class
    train, test = (
        arrays(unpack(folder / "pretrain" / f"tiny_imagenet_64_{part}.npz"), classes.tolist(), limit)
        for part, limit in (("part1", size), ("val", None))
    )
    return (grey(train), grey(test)) if name == "fashion" else (train, test)


def unpack(path: Path) -> Split:
    """Returns all images of a pack, whatever part it says they are."""
    with np.load(path, allow_pickle=False) as pack:
        return Split(Packed(pack["data"], pack["offsets"], path.name), pack["labels"])


def arrays(images: Split, classes: Sequence[int], per_class: int | None) -> Arrays:
    """Returns pixels of some classes, uint8 `[n, 3, 32, 32]`, and labels from 0 in their order."""
    rows = [np.flatnonzero(images.labels == c)[:per_class] for c in classes]
    pixels = Pixels(images.part(np.concatenate(rows)), TRANSFORM)
    labels = torch.repeat_interleave(torch.tensor([len(found) for found in rows]))
    return pixels.batch(range(len(pixels)))[0], labels


def grey(part: Arrays) -> Arrays:
    """Returns the images without colours."""
    x, y = part
    return x.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), y


def table(journal: Journal, name: str, way: str, replay: int) -> str:
    """Returns the test runs of a set as Markdown: means and deviations over seeds in percent, and seconds a run."""
    found: dict[str, list[Mapping[str, float]]] = {}
    rates: dict[str, float] = {}
    for asked, metrics in journal.runs():
        if (asked["set"], asked["way"], asked["phase"], replay_of(asked)) == (name, way, "test", replay):
            found.setdefault(asked["method"], []).append(metrics)
            rates[asked["method"]] = asked["lr"]
    if not found:
        return ""
    lines = ["| method | lr | final average | average over time | forgetting | s |", "|---|---:|---:|---:|---:|---:|"]
    for method in (method for method in METHODS if method in found):
        rows = found[method]
        keys = ("final_average", "average_incremental", "forgetting_since_best")
        cells = [mean_and_spread([row[key] for row in rows]) for key in keys]
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        lines.append(f"| {method} | {rates[method]:g} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def options() -> argparse.ArgumentParser:
    """Returns what can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="folder with `tasks` and `pretrain`")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates to choose from")
    parser.add_argument("--replay", type=int, default=REPLAY, help="exemplars a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=20, help="channels of the network's first stage")
    parser.add_argument("--per-class", type=int, help="training images of each class at most; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/online.jsonl"))
    parser.add_argument("--known", action="store_true", help="run nothing: print what --out has")
    return parser


if __name__ == "__main__":
    main()
