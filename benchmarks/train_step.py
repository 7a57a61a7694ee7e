"""Time and memory of one training step of every method, against the floor and against PEFT's LoRA.

    python benchmarks/train_step.py                                  # ViT-S/16 at 224, batch 8, one CPU thread
    python benchmarks/train_step.py --device cuda --model vit_base_patch16_224 --batch 64

The floor is what no plugin on all blocks can go below: the frozen backbone's forward, the backward pass through its
activations, and the head. All contestants take turns in one process, round by round, in an order drawn anew for each
round. A step is set against the floor's step of the same round, so that a slow spell of the machine reaches all alike,
and an untimed step before it clears away what others have left in caches and memory; the ratio printed is the median
of the rounds. On the CPU a step is timed in processor seconds of this process. `kept` is what the forward pass keeps
for the backward pass beside the model's own tensors, each storage once; a GPU's peak is printed beside it.
"""

import argparse
import random
import statistics
import time

import timm
import torch
from torch import Tensor, nn

import petiole as pt
from petiole.core.adapted import Adapted
from petiole.core.plugin import Plugin

ALL = ("q", "k", "v", "proj", "fc1", "fc2")


class Floor(nn.Module):
    """A frozen backbone and a head, whose backward pass runs through every block and trains the head alone."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        body = self.backbone
        x = body._pos_embed(body.patch_embed(images)).detach().requires_grad_()
        x = body.norm(body.blocks(body.norm_pre(x)))
        return self.head(body.forward_head(x, pre_logits=True))


def contestants(name: str, rank: int, device: str) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Returns forward and trained tensors of each contestant by name, the floor first."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=0).to(device).requires_grad_(False)

    base = fresh()
    head = nn.Linear(base.num_features, 100).to(device)
    out: dict[str, tuple[nn.Module, list[Tensor]]] = {"floor": (Floor(base, head), list(head.parameters()))}

    def add(title: str, plugin: Plugin, is_checkpointed: bool = False) -> None:
        model: Adapted = pt.adapt(fresh(), plugin, classes=list(map(str, range(100)))).train()
        model.set_checkpointing(is_checkpointed)
        out[title] = (model, [p for _, p in model.trained()])

    add("Linear", pt.Linear())
    add("BitFit", pt.BitFit())
    add("LayerNorm", pt.LayerNorm())
    add("VPT-deep 10", pt.VPT(num_prompts=10))
    add("AdaptFormer 8", pt.AdaptFormer(dim=8))
    add("Adapter 8, Pfeiffer", pt.Adapter(dim=8))
    add("Adapter 8, Houlsby", pt.Adapter(dim=8, placement="houlsby"))
    add("SSF", pt.SSF())
    add("RepAdapter 8", pt.RepAdapter(dim=8))
    add("Convpass-attn 8", pt.Convpass(dim=8, roles=("attn",)))
    add("Convpass 8", pt.Convpass(dim=8))
    add("Convpass 8, checkpointed", pt.Convpass(dim=8), is_checkpointed=True)
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
    add("AdaptFormer 8, 1 bit", pt.AdaptFormer(dim=8, bias=False, bits=1))
    add(f"LoRA r={rank} q,v, 1 bit", pt.LoRA(rank=rank, bits=1))
    add(f"FacT-TT r={rank}, 1 bit", pt.FacT(rank=rank, bits=1))
    add("Full", pt.Full())
    return out


def kept(model: nn.Module, images: Tensor) -> int:
    """Returns what a forward pass keeps for its backward pass [bytes], beside the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = model(images)
    del answer
    return sum(size for place, size in storages.items() if place not in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--only", help="comma-separated parts of names; the floor always runs")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    labels = torch.randint(0, 100, (args.batch,), device=args.device)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        now = time.process_time if args.device == "cpu" else time.perf_counter
        begin = now()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = nn.functional.cross_entropy(model(images), labels)
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
    memory: dict[str, str] = {}
    for name, (model, _) in runs.items():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            memory[name] = f"{kept(model, images) / 2**20:9.0f}"
        if args.device == "cuda":
            step(model, optimizers[name])
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
            step(model, optimizers[name])
            memory[name] += f"{(torch.cuda.max_memory_allocated() - resident) / 2**20:9.0f}"
    for i in range(args.rounds):
        for name in random.Random(i).sample(list(runs), len(runs)):
            for _ in range(2):
                seconds = step(runs[name][0], optimizers[name])
            times[name].append(seconds)
    print(f"{args.model}, batch {args.batch}, {args.device}, {args.rounds} rounds, torch {torch.__version__}")
    peak = f"{'peak MiB':>9}" if args.device == "cuda" else ""
    print(f"{'':26}{'ms a step':>11}{'x floor':>9}{'kept MiB':>9}{peak}   spread of the ratio")
    for name, seconds in times.items():
        ratios = sorted(s / f for s, f in zip(seconds, times["floor"], strict=True))
        spread = f"{ratios[0]:.3f} .. {ratios[-1]:.3f}"
        ratio = statistics.median(ratios)
        print(f"{name:26}{1000 * statistics.median(seconds):11.1f}{ratio:9.3f}{memory[name]}   {spread}")


if __name__ == "__main__":
    main()
