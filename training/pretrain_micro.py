"""Trains the bundled backbone `micro` from scratch: a supervised ViT for 64x64 images.

    python training/pretrain_micro.py --data ../shared/data/pretrain --out build/micro

Data: the 50,000 training images of the Tiny ImageNet part (200 classes) mixed with the training part of the open pool
(180 classes of fruit, Caltech-101 and Fashion-MNIST) under one softmax over all 380 classes.

Recipe: AdamW, constant learning rate after a warm-up and a linear decay to zero at the end (so that a run can be made
longer by a larger `--steps`, or be brought home early by a smaller one). Half of the patches are dropped, which doubles
the images per second; the last `--finish` steps see every patch. The exported weights are the exponential moving
average, as fp16.

Every random number of step `t` comes from a generator seeded with `t`, and the state is written every
`--save-every` steps, so a run that is stopped goes on where it was. `--init` starts from exported weights instead.
"""

import argparse
import io
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3

SIZE = 64
# share of each batch by source: Tiny ImageNet, fruits, Caltech-101, Fashion-MNIST
MIX = (0.70, 0.08, 0.10, 0.12)
PATCH_DROP = 0.5


def build(num_classes: int, patch_drop: float = 0.0) -> VisionTransformer:
    """The architecture of `micro`; dropping paths and patches only act in training."""
    return VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        embed_dim=192,
        depth=6,
        num_heads=3,
        num_classes=num_classes,
        drop_path_rate=0.05,
        patch_drop_rate=patch_drop,
    )


def decode(pack: Path, cache: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns every image of a pack as uint8 [n, 64, 64, 3] (memory-mapped) and the pack's other arrays."""
    z = np.load(pack, allow_pickle=False)
    if not cache.exists():
        data, offsets = z["data"], z["offsets"]
        images = np.empty((len(offsets) - 1, SIZE, SIZE, 3), np.uint8)
        for i in range(len(images)):
            image = Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB")
            images[i] = np.asarray(image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.BICUBIC))
        partial = cache.with_suffix(".partial.npy")
        np.save(partial, images)
        os.replace(partial, cache)
    return np.load(cache, mmap_mode="r"), {k: z[k] for k in z.files if k not in ("data", "offsets")}


class Mixture:
    """Draws augmented batches from the four sources, with the labels of one shared softmax."""

    def __init__(self, root: Path, cache: Path) -> None:
        tiny, tiny_meta = decode(root / "tiny_imagenet_64_part1.npz", cache / "tiny.npy")
        pool, pool_meta = decode(root / "open_pool.npz", cache / "pool.npy")
        num_tiny = len(tiny_meta["class_names"])
        self.class_names = [*tiny_meta["class_names"].tolist(), *pool_meta["class_names"].tolist()]
        train = pool_meta["split"] == 0
        self.sources = [(tiny, np.arange(len(tiny)), tiny_meta["labels"])]
        for k in range(3):
            rows = np.flatnonzero(train & (pool_meta["source"] == k))
            self.sources.append((pool, rows, pool_meta["labels"] + num_tiny))

    def batch(self, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images [size, 3, 64, 64] in [-1, 1] and labels [size] of one step."""
        rng = np.random.default_rng(step)
        counts = rng.multinomial(size, MIX)
        images, labels = [], []
        for (array, rows, targets), count in zip(self.sources, counts, strict=True):
            picked = np.sort(rng.choice(rows, count))
            images.append(array[picked])
            labels.append(targets[picked])
        x = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = torch.from_numpy(np.concatenate(labels).astype(np.int64))
        return augment(x, torch.Generator().manual_seed(step)), y


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random resized crop (area 0.3 to 1, aspect 3/4 to 4/3), flip, brightness, contrast and colour, per image."""
    n = len(x)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    area, log_aspect = uniform(0.3, 1.0), uniform(math.log(3 / 4), math.log(4 / 3))
    width = (area * log_aspect.exp()).sqrt().clamp(max=1)
    height = (area / log_aspect.exp()).sqrt().clamp(max=1)
    flip = (uniform(0, 1) < 0.5).float() * 2 - 1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * flip, uniform(-1, 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    x = F.grid_sample(
        x, F.affine_grid(theta, [n, 3, SIZE, SIZE], align_corners=False), align_corners=False, padding_mode="reflection"
    )
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0.5, 1.3)[:, None, None, None]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(0.7, 1.3)[:, None, None, None] + uniform(-0.2, 0.2)[:, None, None, None]
    return x.clamp(-1, 1)


def rate(step: int, steps: int, decay: int, warmup: int = 500) -> float:
    """Learning rate at a step, as a share of the peak."""
    return min((step + 1) / warmup, (steps - step) / decay, 1.0)


@torch.inference_mode()
def evaluate(model: VisionTransformer, root: Path, cache: Path, limit: int | None = None) -> float:
    """Top-1 accuracy on the 10,000 Tiny ImageNet validation images, answers among its 200 classes."""
    images, meta = decode(root / "tiny_imagenet_64_val.npz", cache / "val.npy")
    order = np.random.default_rng(0).permutation(len(images))[:limit]
    hits = 0
    for rows in np.array_split(np.sort(order), max(1, len(order) // 250)):
        x = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        hits += int((model(x)[:, : len(meta["class_names"])].argmax(1).numpy() == meta["labels"][rows]).sum())
    return hits / len(order)


def export(model: VisionTransformer, path: Path) -> None:
    """Writes the weights without the classifier as fp16 safetensors."""
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(weights, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the three packs")
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and weights")
    parser.add_argument("--init", type=Path, help="exported weights to start from")
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--decay", type=int, default=1500, help="steps of the final decay of the learning rate")
    parser.add_argument("--finish", type=int, default=500, help="last steps, which see every patch")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    data = Mixture(args.data, args.out)
    model = build(len(data.class_names), PATCH_DROP).train()
    torch.manual_seed(0)
    model.init_weights("")
    if args.init:
        missing = model.load_state_dict({k: v.float() for k, v in load_file(args.init).items()}, strict=False)
        assert all(k.startswith("head.") for k in missing.missing_keys)
        assert not missing.unexpected_keys
    ema = ModelEmaV3(model, decay=0.998, use_warmup=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    state_file, step = args.out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"resumed at step {step}", flush=True)

    patch_drop, began, losses = model.patch_drop, time.time(), []
    while step < args.steps:
        model.patch_drop = patch_drop if step < args.steps - args.finish else torch.nn.Identity()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step, args.steps, args.decay)
        x, y = data.batch(step, args.batch)
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model, step)
        losses.append(loss.item())
        step += 1
        if step % args.save_every == 0 or step == args.steps:
            partial = state_file.with_suffix(".partial")
            state = {"model": model.state_dict(), "ema": ema.module.state_dict(), "step": step}
            torch.save({**state, "optimizer": optimizer.state_dict()}, partial)
            os.replace(partial, state_file)
            final = step == args.steps
            row = {"step": step, "loss": round(float(np.mean(losses)), 4), "lr": optimizer.param_groups[0]["lr"]}
            if final or step % (4 * args.save_every) == 0:
                ema.module.eval()
                row["val_accuracy"] = evaluate(ema.module, args.data, args.out, None if final else 2000)
                export(ema.module, args.out / "micro.safetensors")
            row["images_per_s"] = round(len(losses) * args.batch / (time.time() - began), 1)
            with (args.out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
            losses, began = [], time.time()


if __name__ == "__main__":
    main()
