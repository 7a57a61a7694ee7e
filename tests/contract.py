"""The contract table: every method with settings, and the parameter count its docstring promises.

A new method is one row; `test_contract.py` asks a dozen properties of each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import petiole as pt
from petiole.core.plugin import Plugin

# the tiny ViT of the tests
WIDTH, DEPTH = 32, 2


@dataclass(frozen=True)
class Row:
    """One method with settings.

    Args:
        make: Makes a fresh plugin.
        num_parameters: By the docstring's formula, on the tiny ViT.
        is_identity: Whether a fresh plugin changes nothing, bit for bit.
    """

    make: Callable[[], Plugin]
    num_parameters: int
    is_identity: bool = True


def bottleneck(dim: int) -> int:
    """Numbers in down and up and their biases."""
    return 2 * WIDTH * dim + dim + WIDTH


BACKBONE = 3 * 64 * WIDTH + WIDTH + WIDTH + 17 * WIDTH + DEPTH * (12 * WIDTH**2 + 13 * WIDTH) + 2 * WIDTH

PLUGINS = {
    "adapter": Row(lambda: pt.Adapter(dim=3), DEPTH * bottleneck(3)),
    "adapter-houlsby": Row(lambda: pt.Adapter(dim=3, placement="houlsby", scale=0.1), 2 * DEPTH * bottleneck(3)),
    "adaptformer": Row(lambda: pt.AdaptFormer(dim=5, scale=0.1), DEPTH * bottleneck(5)),
    "adaptformer-unbiased": Row(lambda: pt.AdaptFormer(dim=5, scale=0.5, bias=False), DEPTH * 2 * WIDTH * 5),
    "adaptformer-1-bit": Row(lambda: pt.AdaptFormer(dim=5, bias=False, bits=1), DEPTH * 2 * WIDTH * 5, False),
    "adapter-4-bit": Row(lambda: pt.Adapter(dim=3, scale=0.1, bits=4), DEPTH * bottleneck(3), False),
    "bitfit": Row(pt.BitFit, (11 * DEPTH + 2) * WIDTH),
    "convpass": Row(lambda: pt.Convpass(dim=3, scale=0.1), 2 * DEPTH * (bottleneck(3) + 9 * 9 + 3)),
    "convpass-attn": Row(lambda: pt.Convpass(dim=3, roles=("attn",), scale=0.1), DEPTH * (bottleneck(3) + 9 * 9 + 3)),
    "convpass-dirac": Row(lambda: pt.Convpass(dim=3, scale=0.1, init="dirac"), 2 * DEPTH * (bottleneck(3) + 9 * 9 + 3)),
    "convpass-1-bit": Row(lambda: pt.Convpass(dim=3, bias=False, bits=1), 2 * DEPTH * (2 * WIDTH * 3 + 9 * 9), False),
    "evit": Row(lambda: pt.EViT(budget=3), 0, is_identity=False),
    "evit-share": Row(lambda: pt.EViT(budget=0.7), 0, is_identity=False),
    "fact-tt": Row(lambda: pt.FacT(rank=3), 2 * WIDTH * 3 + 12 * DEPTH * 9),
    "fact-tk": Row(lambda: pt.FacT(rank=3, form="tk", scale=10.0), 2 * WIDTH * 3 + 12 * DEPTH * 3 + 27),
    "fact-tk-reference": Row(
        lambda: pt.FacT(rank=3, form="tk", layout="reference"), 2 * WIDTH * 3 + 12 * DEPTH * 3 + 27
    ),
    "fact-qv": Row(lambda: pt.FacT(rank=3, roles=("q", "v")), 2 * WIDTH * 3 + 2 * DEPTH * 9),
    "fact-tt-1-bit": Row(lambda: pt.FacT(rank=3, bits=1), 2 * WIDTH * 3 + 12 * DEPTH * 9, False),
    "fact-tk-2-bit": Row(lambda: pt.FacT(rank=3, form="tk", bits=2), 2 * WIDTH * 3 + 12 * DEPTH * 3 + 27, False),
    "full": Row(pt.Full, BACKBONE),
    "layernorm": Row(pt.LayerNorm, (4 * DEPTH + 2) * WIDTH),
    "linear": Row(pt.Linear, 0),
    "lora": Row(lambda: pt.LoRA(rank=4), 4 * DEPTH * WIDTH * 4),
    "lora-1-bit": Row(lambda: pt.LoRA(rank=4, bits=1), 4 * DEPTH * WIDTH * 4, False),
    "lora-all": Row(
        lambda: pt.LoRA(rank=2, roles=("q", "k", "v", "proj", "fc1", "fc2"), scale=0.5),
        DEPTH * 2 * (3 * 2 * WIDTH + 2 * WIDTH + 5 * WIDTH + 5 * WIDTH),
    ),
    "repadapter": Row(pt.RepAdapter, DEPTH * 2 * (8 * WIDTH * 3 // 2 + 8 + WIDTH)),
    "repadapter-attn": Row(
        lambda: pt.RepAdapter(groups=4, roles=("attn",), scale=0.5, bias=False), DEPTH * 8 * WIDTH * 5 // 4
    ),
    "repadapter-1-bit": Row(lambda: pt.RepAdapter(bias=False, bits=1), DEPTH * 2 * 8 * WIDTH * 3 // 2, False),
    "ssf": Row(pt.SSF, (22 * DEPTH + 4) * WIDTH),
    "tocom": Row(lambda: pt.ToCom(groups=5, source=1, target=4), DEPTH * 2 * 5 * 2 * 2 * WIDTH),
    "tocom-back": Row(lambda: pt.ToCom(groups=3, dim=1, source=3, target=0), DEPTH * 2 * 3 * 2 * WIDTH),
    "tome": Row(lambda: pt.ToMe(budget=2), 0, is_identity=False),
    "tome-share": Row(lambda: pt.ToMe(budget=0.7, proportional=False), 0, is_identity=False),
    "vpt-deep": Row(lambda: pt.VPT(num_prompts=3), DEPTH * 3 * WIDTH, is_identity=False),
    "vpt-shallow": Row(lambda: pt.VPT(num_prompts=3, deep=False), 3 * WIDTH, is_identity=False),
}
