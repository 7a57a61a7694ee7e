"""Times one training step of every method against the floor and against PEFT's LoRA.

    python benchmarks/train_step.py                                  # ViT-S/16 at 224, batch 8, one CPU thread
    python benchmarks/train_step.py --device cuda --model vit_base_patch16_224 --batch 64

The floor is what no plugin on all blocks can go below: the frozen backbone's forward, the backward pass through its
activations, and the head. All contestants take turns in one process, round by round, and each step is set against the
floor's step of the same round, so that a slow spell of the machine reaches all alike; the ratio printed is the median
of the rounds. On the CPU a step is timed in processor seconds of this process.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import petiole as pt
from petiole.core.adapted import Adapted

ALL = ("q", "k", "v", "proj", "fc1", "fc2")


def floor(backbone: nn.Module, head: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Returns the forward whose backward runs through every block and trains the head alone."""

    def forward(images: Tensor) -> Tensor:
        x = backbone._pos_embed(backbone.patch_embed(images)).detach().requires_grad_()
        x = backbone.norm(backbone.blocks(backbone.norm_pre(x)))
        return head(backbone.forward_head(x, pre_logits=True))

    return forward


def contestants(name: str, rank: int, device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    """Returns forward and trained tensors of each contestant by name, the floor first."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=0).to(device).requires_grad_(False)

    base = fresh()
    head = nn.Linear(base.num_features, 100).to(device)
    out: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "floor": (floor(base, head), list(head.parameters()))
    }

    def add(title: str, plugin: pt.Linear | pt.FacT | pt.LoRA | pt.Full) -> None:
        model: Adapted = pt.adapt(fresh(), plugin, classes=list(map(str, range(100)))).train()
        out[title] = (model, [p for _, p in model.trained()])

    add("Linear", pt.Linear())
    add(f"FacT-TT r={rank}", pt.FacT(rank=rank))
    add(f"FacT-TK r={rank}", pt.FacT(rank=rank, form="tk"))
    add(f"LoRA r={rank} q,v", pt.LoRA(rank=rank))
    add(f"LoRA r={rank} all", pt.LoRA(rank=rank, roles=ALL))
    for title, targets in (("qkv", r".*\.qkv"), ("all", r"blocks\..*\.(qkv|proj|fc1|fc2)")):
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            continue
        model = get_peft_model(fresh(), LoraConfig(r=rank, target_modules=targets, lora_dropout=0.1))
        top = nn.Linear(base.num_features, 100).to(device)
        trained = [p for p in model.parameters() if p.requires_grad] + list(top.parameters())
        out[f"PEFT LoRA r={rank} {title}"] = (nn.Sequential(model, top).train(), trained)
    add("Full", pt.Full())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--only", help="comma-separated parts of names; the floor always runs")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.randint(0, 100, (args.batch,), device=args.device)

    def step(forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> float:
        now = time.process_time if args.device == "cpu" else time.perf_counter
        begin = now()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return now() - begin

    runs = contestants(args.model, args.rank, args.device)
    if args.only:
        runs = {n: r for n, r in runs.items() if n == "floor" or any(part in n for part in args.only.split(","))}
    optimizers = {n: torch.optim.AdamW(trained) for n, (_, trained) in runs.items()}
    times: dict[str, list[float]] = {n: [] for n in runs}
    for i in range(args.rounds + 2):
        for name, (forward, _) in runs.items():
            seconds = step(forward, optimizers[name])
            if i >= 2:
                times[name].append(seconds)
    print(f"{args.model}, batch {args.batch}, {args.device}, {args.rounds} rounds, torch {torch.__version__}")
    print(f"{'':24}{'ms a step':>11}{'x floor':>9}   spread of the ratio")
    for name, seconds in times.items():
        ratios = sorted(s / f for s, f in zip(seconds, times["floor"], strict=True))
        spread = f"{ratios[0]:.3f} .. {ratios[-1]:.3f}"
        print(f"{name:24}{1000 * statistics.median(seconds):11.1f}{statistics.median(ratios):9.3f}   {spread}")


if __name__ == "__main__":
    main()
