"""A tiny model and a tiny task that the training tests share; also run by the processes they start."""

from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import petiole as pt
from petiole.core.plugin import Plugin
from petiole.tasks.images import Arrays

# here and first: a module of the same name that is imported before would stand in the function's place
adapt, fit = pt.adapt, pt.fit

CLASSES = ("red", "green", "blue")


def vit() -> VisionTransformer:
    """Returns the same tiny ViT for 32x32 images each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "tiny", "tag": "v0", "input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0,
        "crop_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "num_classes": 0, "classifier": "head",
        "first_conv": "patch_embed.proj",
    }  # fmt: skip
    return model.eval()


def make_split(num_images: int, seed: int) -> pt.tasks.Split:
    """Returns noisy squares whose brightest channel is their class; every class comes first once."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(3), rng.integers(0, 3, max(0, num_images - 3))])[:num_images]
    pixels = rng.integers(0, 120, (num_images, 32, 32, 3))
    pixels[np.arange(num_images), :, :, labels] += 60
    return pt.tasks.Split(Arrays(pixels.astype(np.uint8), "squares"), labels)


def make_task(num_train: int = 13, num_val: int = 6, num_test: int = 7, classes: tuple[str, ...] = CLASSES) -> pt.Task:
    """Returns the task of naming the brightest channel; 0 images leave a split out."""
    val, test = (make_split(n, seed) if n else None for n, seed in ((num_val, 1), (num_test, 2)))
    return pt.Task("squares", classes, make_split(num_train, 0), val, test)


def make_model(plugin: Plugin | None = None, backbone: nn.Module | None = None, **settings: Any) -> pt.Adapted:
    """Returns the tiny ViT with a plugin (LoRA with dropout by default) and a head."""
    return adapt(backbone or vit(), plugin or pt.LoRA(rank=2, dropout=0.2), classes=CLASSES, **settings)
