"""What few bits cost a plugin that was trained at 32, without any training: every matrix is rounded to its levels.

    python benchmarks/rounding.py --data ../shared/data/tasks --tasks short --seeds 1 --precision bf16 --unfused \
        --out benchmarks/results/pareto_short.jsonl
    python benchmarks/rounding.py --known --out benchmarks/results/pareto_short.jsonl

Goes on from the journal of `pareto.py`, behind `--out`: it trains the 32-bit runs of that again, with the settings
chosen there, rounds and tests; runs at few bits from the start are what these stand beside. Its own journal is
`rounding.jsonl` in the same folder.
"""

import argparse
from typing import Any

import petiole as pt
from pareto import CONTESTANTS
from petiole.tasks import Pixels
from petiole.train.evaluate import evaluate
from petiole.train.world import World
from protocol import Journal, mean_and_spread, mean_of_groups, parser, sources, train

BITS = (32, 8, 4, 2, 1)
METHODS = ("adaptformer-32-32bit", "lora-32-32bit", "fact-tt16-32bit", "convpass-8-32bit")


def main() -> None:
    args = parser(__doc__, METHODS, "runs/pareto.jsonl").parse_args()
    trained, rounded = Journal(args.out), Journal(args.out.with_name("rounding.jsonl"))
    for name in [] if args.known else args.methods.split(","):
        for source in sources(args):
            run_task(trained, rounded, name, source, args)
    table(trained, rounded)


def run_task(trained: Journal, rounded: Journal, name: str, source: Any, args: argparse.Namespace) -> None:
    """Trains on one task as `pareto.py` did, rounds and tests, where that is not there yet."""
    task, runs = pt.open_task(source), trained.tests([name]).get(name, {})
    for run in runs.get(task.name, [])[: args.seeds]:
        row = {key: run[key] for key in ("task", "method", "settings", "lr", "seed", "epochs")} | {"phase": "test"}
        if row not in rounded:
            (model, _), world = train(CONTESTANTS[name], task.joined(), run, args), World(args.precision)
            pixels = Pixels(task.test, pt.Transform(model.input_config))
            models = {bits: model if bits == 32 else pt.quantise(model, bits=bits) for bits in BITS}
            rounded.add(row, {f"{bits} bit": evaluate(m.eval(), pixels, world).accuracy for bits, m in models.items()})
            print(name, task.name, rounded[row], flush=True)


def table(trained: Journal, rounded: Journal) -> None:
    """Prints what is known: a row a plugin and number of bits, a column a task, `rounded / trained at these bits`."""
    after, tasks = rounded.tests(list(METHODS)), list[str]()
    for rows in after.values():
        tasks += [task for task in rows if task not in tasks]
    print(f"| plugin | bits | {' | '.join(tasks)} | mean |\n|---|---:|" + "---:|" * (len(tasks) + 1))
    for name, rows in after.items():
        for bits in BITS:
            straight = trained.tests([twin := name.replace("32bit", f"{bits}bit")]).get(twin, {})
            pair = [
                {task: [run[f"{bits} bit"] for run in runs] for task, runs in rows.items()},
                {task: [run["last_test_accuracy"] for run in straight[task]] for task in rows if task in straight},
            ]
            words = [[mean_and_spread(side[task]) for side in pair if task in side] for task in tasks]
            means = [f"{100 * mean_of_groups(side):.1f}" for side in pair if len(side) == len(tasks)]
            cells = " | ".join(" / ".join(both) for both in (*words, means))
            print(f"| {name.removesuffix('-32bit')} | {bits} | {cells} |")


if __name__ == "__main__":
    main()
