"""Visual prompts in the input, the usual way to give a language model eyes: the baseline of MemVP's measurements.

patches ── down ── SiLU ── up ──┐
                                ├── [patches, text] ── frozen decoder with LoRA ── logits of the text
tokens ── frozen embedding ─────┘

The projector has MemVP's bottleneck, so that what both train can be made equal by LoRA's rank alone. Answers to calls
as `petiole.Sighted` does: with logits of the text only, and with the prompt before what was generated. `vqa.py` trains
it with the steps of `fit_answers`; it has no file of its own.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

import petiole as pt
from petiole.core.twin import twin
from petiole.vision_language.eyes import Eyes
from petiole.vision_language.prefix import Prefix, forward_behind, generate_behind
from petiole.vision_language.texts import TEMPLATE

TARGETS = ("q_proj", "v_proj")


class Projector(nn.Module):
    """MemVP's bottleneck: features `[B, n, d_image]` to embeddings `[B, n, d]`, in float32.

    Args:
        d_image: Width of the features.
        hidden: Width of the bottleneck.
        d: Width of the embeddings.
        image_scale: Factor of the embeddings.
        settings: What else the baseline was made with, to be noted with the runs.
    """

    method = "input_space"

    def __init__(self, d_image: int, hidden: int, d: int, image_scale: float, **settings: Any) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d_image, hidden), nn.Linear(hidden, d)
        for layer in (self.down, self.up):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.image_scale, self.noted = image_scale, {"hidden": hidden, "image_scale": image_scale, **settings}

    def forward(self, features: Tensor) -> Tensor:
        return self.image_scale * self.up(F.silu(self.down(features.to(self.down.weight))))

    def settings(self) -> dict[str, Any]:
        """Returns what the baseline was made with."""
        return self.noted


class InputSpace(nn.Module):
    """A frozen decoder that reads projected patches in front of its text, with LoRA by PEFT.

    Source: Liu et al., 2023, "Visual Instruction Tuning", arXiv 2304.08485; with LoRA in place of full fine-tuning, the
    contestant "LLaVA-LoRA" of Jie et al., 2024, arXiv 2405.05615.
    Parameters: hidden * (d_image + d + 1) + d, and rank * (d_in + d_out) for each map with LoRA.

    Args:
        language_model: A decoder of transformers, never written to: a twin shares its weights.
        eyes: What turns images into features; None where features are given instead.
        d_image: Width of the features.
        hidden: Width of the projector's bottleneck.
        rank: Rank of LoRA, 0 for none, which costs what merged LoRA costs; `rank_for` finds the one of equal size.
        scale: Factor of what LoRA adds.
        image_scale: Factor of the projected features.
        dropout: Dropout rate of LoRA's input, in training.
        targets: Names of the maps with LoRA.
        seed: Seed of the initial values.
    """

    def __init__(
        self,
        language_model: nn.Module,
        eyes: Eyes | None,
        *,
        d_image: int,
        hidden: int = 128,
        rank: int = 8,
        scale: float = 2.0,
        image_scale: float = 1.0,
        dropout: float = 0.05,
        targets: Sequence[str] = TARGETS,
        seed: int = 0,
    ) -> None:
        super().__init__()
        d, device = language_model.get_input_embeddings().embedding_dim, next(language_model.parameters()).device
        self.language_model: Any = twin(language_model)
        # PEFT draws from the global generator
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if rank:
                lora = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=list(targets))
                inject_adapter_in_model(lora, self.language_model)
            noted = {"rank": rank, "scale": scale, "dropout": dropout, "targets": list(targets)}
            self.plugin = Projector(d_image, hidden, d, image_scale, **noted).to(device)
        for _, p in self.trained():
            p.data = p.data.float()
        self.eyes, self.d_image, self.template = eyes, d_image, TEMPLATE
        self.train(language_model.training)

    def forward(
        self,
        images: Tensor | None = None,
        indicator: Tensor | None = None,
        *,
        features: Tensor | None = None,
        **texts: Any,
    ) -> Any:
        """Returns what the language model returns, with logits of the text alone.

        Args:
            images: Images of each text `[B, 3, H, W]` or `[B, I, 3, H, W]`; None for texts without.
            indicator: 1 where a text has its image and 0 where it has not, `[B]` or `[B, I]`; None for all ones.
            features: Image features `[B, n, d_image]` in place of images.
            texts: `input_ids`, and other keyword arguments of the language model.
        """
        return forward_behind(self.language_model, self.prefix(images, indicator, features), texts)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | None = None,
        indicator: Tensor | None = None,
        *,
        features: Tensor | None = None,
        **texts: Any,
    ) -> Tensor:
        """Returns the prompt and what the language model's own `generate` puts behind it.

        Args:
            images: As in `forward`.
            indicator: As in `forward`.
            features: As in `forward`.
            texts: Keyword arguments of `generate`, e.g. `input_ids`, `max_new_tokens`, `num_beams`.
        """
        return generate_behind(self.language_model, self.prefix(images, indicator, features), texts)

    def prefix(self, images: Tensor | None, indicator: Tensor | None, features: Tensor | None) -> Prefix | None:
        """Returns the projected patches that stand in front of each text; None where there are none."""
        if images is not None:
            assert self.eyes is not None
            features = self.eyes(images.flatten(0, -4)).reshape(len(images), -1, self.d_image)
        if features is None:
            return None
        rows, n = features.shape[:2]
        is_there = features.new_ones(rows, 1) if indicator is None else indicator.reshape(rows, -1)
        return Prefix(self.plugin(features), is_there.repeat_interleave(n // is_there.shape[1], dim=1))

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields name and parameter of everything that is trained: projector, LoRA, and plugins of the eyes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def task_state(self) -> dict[str, Tensor]:
        """Returns what belongs to the task and not to the frozen models."""
        return {name: p.detach() for name, p in self.trained()}

    def movable(self) -> list[str]:
        """Returns the names of the frozen tensors that training may move."""
        return []

    def set_checkpointing(self, is_on: bool) -> None:
        """Refuses to compute layers again, which is not measured."""
        assert not is_on


def rank_for(
    budget: int, language_model: nn.Module, *, d_image: int, hidden: int = 128, targets: Sequence[str] = TARGETS
) -> int:
    """Returns the smallest rank with which `InputSpace` trains at least so many parameters."""
    maps = [module for name, module in language_model.named_modules() if name.rpartition(".")[2] in targets]
    d = language_model.get_input_embeddings().embedding_dim
    rest = budget - hidden * (d_image + d + 1) - d
    return max(1, math.ceil(rest / sum(module.in_features + module.out_features for module in maps)))


def num_trained(model: "pt.Sighted | InputSpace") -> int:
    """Returns how many parameters a model with eyes trains."""
    return sum(p.numel() for _, p in model.trained())
