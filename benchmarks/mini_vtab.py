"""Accuracy of methods on small tasks, by the VTAB protocol, three seeds.

    python benchmarks/mini_vtab.py --data ../shared/data/tasks                   # everything: minutes a task on a GPU
    python benchmarks/mini_vtab.py --data ../shared/data/tasks --tasks short --epochs 20 --choose-epochs 6 \
        --seeds 1 --precision bf16 --unfused                                     # what two CPU cores can do
    python benchmarks/mini_vtab.py --data digits --methods fact-tt8 --epochs 15
    python benchmarks/mini_vtab.py --known --out benchmarks/results/mini_vtab_short.jsonl

The table at the end is what the documentation quotes; `protocol.py` says how runs are made and kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from protocol import GROUPS, SCALES, Contestant, mean_and_spread, mean_of_groups, parser, run_all

CONTESTANTS = {
    "linear": Contestant("linear", rates=(1e-3, 1e-2)),
    "full": Contestant("full", rates=(3e-4, 1e-3)),
    "bitfit": Contestant("bitfit", rates=(3e-3, 1e-2)),
    "vpt-deep": Contestant("vpt", {"num_prompts": 10, "deep": True}, rates=(3e-3, 1e-2)),
    "adaptformer-8": Contestant("adaptformer", {"dim": 8}, SCALES),
    "lora-8": Contestant("lora", {"rank": 8}, SCALES),
    "ssf": Contestant("ssf", rates=(3e-3, 1e-2)),
    "fact-tt4": Contestant("fact", {"rank": 4}, SCALES),
    "fact-tt16": Contestant("fact", {"rank": 16}, SCALES),
    "fact-tk16": Contestant("fact", {"rank": 16, "form": "tk"}, SCALES),
    "convpass-attn": Contestant("convpass", {"roles": ("attn",)}, SCALES),
    "convpass": Contestant("convpass", {}, SCALES),
    "fact-tt8": Contestant("fact", {"rank": 8, "scale": 10.0}),
}
# the last one is for the handwritten digits
TABLE = tuple(CONTESTANTS)[:-1]


def table(tests: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Returns the test accuracies as Markdown: a row a method, a column a task, then the mean of the groups' means.

    Parameters are those beside the linear probe's, which are the head's; the mean is there where all tasks are.
    """
    known = {task for rows in tests.values() for task in rows}
    tasks = [task for group in GROUPS.values() for task in group if task in known]
    tasks += sorted(known - set(tasks))
    head = {task: runs[0]["trained_parameters"] for task, runs in tests.get("linear", {}).items()}
    lines = [f"| method | parameters | {' | '.join(tasks)} | mean |", "|---|---:|" + "---:|" * (len(tasks) + 1)]
    for name, rows in tests.items():
        accuracies = {task: [run["last_test_accuracy"] for run in runs] for task, runs in rows.items()}
        cells = [mean_and_spread(accuracies[task]) if task in rows else "" for task in tasks]
        mean = f"{100 * mean_of_groups(accuracies):.1f}" if len(rows) == len(tasks) else ""
        sizes = [f"{runs[0]['trained_parameters'] - head[task]:,.0f}" for task, runs in rows.items() if task in head]
        lines.append(f"| {name} | {sizes[0] if sizes else ''} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def main() -> None:
    args = parser(__doc__, TABLE, "runs/mini_vtab.jsonl").parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(table(run_all(CONTESTANTS, args).tests(list(CONTESTANTS))))


if __name__ == "__main__":
    main()
