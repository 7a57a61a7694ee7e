"""A frozen language model with eyes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.language import language_view_of
from ..core.adapted import Adapted
from ..core.language import LanguageView, Recaller, join
from ..core.twin import twin
from ..errors import PluginError
from ..joining import adapt
from ..nn.memory import Memory
from .class_token import ClassToken, split_features
from .eyes import Eyes
from .prefix import Prefix, forward_behind, generate_behind
from .prove import prove_language_view
from .texts import TEMPLATE

# where the eyes' adapted model is in a model's state dict
EYES = "eyes.model"
# keyword arguments of transformers that have one row a text, in the order in which they are looked for
_TEXTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids")


class Sighted(nn.Module):
    """A frozen language model that reads images from a memory beside its feed-forward layers.

    With a class token, it also reads one token of each image in front of its text; logits, loss and what is generated
    are those of the text all the same.

    The model runs a twin of the language model that shares its weights: the language model itself is never written to.
    Its own loop runs, with its cache and its `generate`. Starts in the language model's mode, train or eval.

    Args:
        language_model: The user's pretrained model.
        view: Where its feed-forward layers are.
        eyes: What turns images into features; None where features are given instead.
        plugin: What makes a memory of features; attached here, kept in float32.
        d_image: Width of the features.
        seed: Seed of every random initial value.
        class_token: Whether the first feature of each image is its class token; with eyes, they decide.

    Raises:
        BackboneError: The view does not find a part of the language model.
        PluginError: The plugin belongs to another model, the eyes have more features than it takes, or a model with an
            encoder is to read a class token.
    """

    def __init__(
        self,
        language_model: nn.Module,
        view: LanguageView,
        eyes: Eyes | None,
        plugin: Recaller,
        d_image: int,
        seed: int = 0,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        generator, device = torch.Generator().manual_seed(seed), next(language_model.parameters()).device
        plugin.attach(view.sites(language_model, d_image), generator)
        self.class_token: ClassToken | None = None
        if class_token if eyes is None else eyes.class_token:
            self.class_token = ClassToken(language_model, d_image, generator).to(device)
        self.language_model: Any = twin(language_model)
        self.eyes, self.d_image = eyes, d_image
        self.plugin = plugin.to(device)
        self.view, self.template = view, TEMPLATE
        self.binding = join(view.feed_forwards(self.language_model), plugin)
        self.train(language_model.training)
        if eyes is not None:
            with torch.no_grad():
                self.memory(features=torch.zeros(1, eyes.num_features, d_image))

    def forward(
        self,
        images: Tensor | None = None,
        indicator: Tensor | None = None,
        *,
        features: Tensor | None = None,
        **texts: Any,
    ) -> Any:
        """Returns what the language model itself returns for texts, with a loss where they hold `labels`.

        Args:
            images: Images of each text `[B, 3, H, W]` or `[B, I, 3, H, W]`; one row is shared by all texts; None for
                texts without.
            indicator: 1 where a text has its image and 0 where it has not, `[B]` or `[B, I]`; None for all ones.
            features: Image features `[B, n, d_image]` in place of images, with the class token of each image first
                where there is one.
            texts: Keyword arguments of the language model, e.g. `input_ids`, `attention_mask`, `labels`.

        Raises:
            PluginError: Images do not fit the texts, the indicator or the slots, or a class token the texts.
        """
        memory, prefix = self._read(images, indicator, features, _num_texts(texts))
        with self.binding.bind(memory):
            return forward_behind(self.language_model, prefix, texts)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | None = None,
        indicator: Tensor | None = None,
        *,
        features: Tensor | None = None,
        **texts: Any,
    ) -> Any:
        """Returns what the language model's own `generate` returns; images are encoded once.

        Args:
            images: As in `forward`.
            indicator: As in `forward`.
            features: As in `forward`.
            texts: Keyword arguments of `generate`, e.g. `input_ids`, `max_new_tokens`, `num_beams`.

        Raises:
            PluginError: Images do not fit the texts, the indicator or the slots, or a class token the texts.
        """
        memory, prefix = self._read(images, indicator, features, _num_texts(texts))
        with self.binding.bind(memory):
            return generate_behind(self.language_model, prefix, texts)

    def memory(
        self,
        images: Tensor | None = None,
        indicator: Tensor | None = None,
        *,
        features: Tensor | None = None,
        num_texts: int | None = None,
    ) -> Memory:
        """Returns the memory of a pass, in the language model's dtype; of one row where there is no image at all.

        Args:
            images: As in `forward`.
            indicator: As in `forward`.
            features: As in `forward`.
            num_texts: How many texts the pass has, None where that is not known.
        """
        return self._read(images, indicator, features, num_texts)[0]

    def _read(
        self, images: Tensor | None, indicator: Tensor | None, features: Tensor | None, num_texts: int | None
    ) -> tuple[Memory, Prefix | None]:
        """Returns the memory of a pass, and what stands in front of its texts where there are images."""
        seen = self._features(images, features)
        if seen is None:
            given, indicator = self._nothing(indicator)
        else:
            given, indicator = seen, seen.new_ones(len(seen)) if indicator is None else indicator
        if num_texts is not None and len(given) not in (1, num_texts):
            raise PluginError(f"{num_texts} texts and images of {len(given)}: give each text its own, or one to all")
        if self.class_token is None:
            return self.plugin.memory(given, indicator).to(self.language_model.dtype), None
        num_images = 1 if seen is None else self._num_images(given, indicator)
        first, patches = split_features(given, num_images)
        memory, embeddings = self.plugin.memory(patches, indicator), self.class_token(first)
        if seen is None:
            # a zero, so that text without images leaves no tensor without a gradient
            memory = memory._replace(keys=memory.keys + 0 * embeddings.sum())
        is_there = indicator.reshape(len(given), -1)
        if is_there.shape[1] not in (1, num_images):
            raise PluginError(f"the indicator is of {is_there.shape[1]} images a text, the features of {num_images}")
        prefix = None if seen is None else Prefix(embeddings, is_there.expand(-1, num_images))
        return memory.to(self.language_model.dtype), prefix

    def _num_images(self, features: Tensor, indicator: Tensor) -> int:
        """Returns how many images a text has."""
        if self.eyes is None:
            return indicator[0].numel()
        num, rest = divmod(features.shape[1], self.eyes.num_features)
        if rest:
            raise PluginError(f"{features.shape[1]} features are not those of images of {self.eyes.num_features} each")
        return num

    def _features(self, images: Tensor | None, features: Tensor | None) -> Tensor | None:
        if images is None:
            return features
        if features is not None or self.eyes is None:
            found = "features too" if features is not None else "the model has no eyes for them: give features"
            raise PluginError(f"images were given, and {found}")
        if images.ndim == 4:
            return self.eyes(images)
        return self.eyes(images.flatten(0, 1)).unflatten(0, images.shape[:2]).flatten(1, 2)

    def _nothing(self, indicator: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns features that are there for the gradient's sake only, and an indicator that says so."""
        if indicator is not None and indicator.any():
            raise PluginError("the indicator says that there are images, and none were given")
        if self.eyes is not None and torch.is_grad_enabled() and any(p.requires_grad for p in self.eyes.parameters()):
            features = self.eyes(self.eyes.blank())
        else:
            num = 1 if self.class_token is None else 2
            features = torch.zeros(1, num, self.d_image, device=self.language_model.device)
        return features, features.new_zeros(1)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields name and parameter of what is trained: plugin, map of the class token, and plugins of the eyes."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def task_state(self) -> dict[str, Tensor]:
        """Returns what belongs to the task and not to the frozen models."""
        own = {} if self.eyes is None else self.eyes.model.task_state()
        return self.reader_state() | {f"{EYES}.{name}": tensor for name, tensor in own.items()}

    def reader_state(self) -> dict[str, Tensor]:
        """Returns what makes of features what the language model reads: the plugin, and the class token's map."""
        readers = {"plugin": self.plugin, "class_token": self.class_token}
        return {
            f"{part}.{name}": tensor
            for part, module in readers.items()
            if module is not None
            for name, tensor in module.state_dict().items()
        }

    def movable(self) -> list[str]:
        """Returns the names of the frozen tensors that training may move: running statistics of the eyes."""
        return [] if self.eyes is None else [f"{EYES}.backbone.{name}" for name in self.eyes.model.origin]

    def set_checkpointing(self, is_on: bool) -> None:
        """Sets whether each layer is computed again in the backward pass, which keeps only its input in memory."""
        verb, settings = ("enable", [{"use_reentrant": False}]) if is_on else ("disable", [])
        # transformers renamed it: older versions lack the first name, newer ones warn of the second
        names = [f"{kind}_checkpointing_{verb}" for kind in ("activation", "gradient")]
        known = [name for name in names if hasattr(self.language_model, name)]
        getattr(self.language_model, known[0])(*settings)
        if self.eyes is not None:
            self.eyes.model.set_checkpointing(is_on)

    def __repr__(self) -> str:
        eyes = "no eyes" if self.eyes is None else repr(self.eyes.model)
        settings = ", ".join(f"{key}={value!r}" for key, value in self.plugin.settings().items())
        parts = [type(self.language_model).__name__, eyes, f"{type(self.plugin).__name__}({settings})"]
        if self.eyes is not None and self.eyes.scales != (1,):
            parts.append(f"scales={self.eyes.scales}")
        return f"Sighted({', '.join(parts)}{', class_token=True' if self.class_token is not None else ''})"


def give_eyes(
    language_model: nn.Module,
    eyes: nn.Module | None,
    plugin: Recaller,
    *,
    block: int = -1,
    scales: Sequence[int] = (1,),
    class_token: bool = False,
    d_image: int | None = None,
    seed: int = 0,
    prove: bool = True,
) -> Sighted:
    """Returns a frozen language model that sees images.

    Args:
        language_model: A pretrained Llama, Qwen2, Mistral, BART or T5 of transformers; never written to.
        eyes: An image encoder that `adapt` takes, or an adapted model without a head, whose plugins are then trained
            together with the memory; None where features are given instead.
        plugin: `MemVP()`.
        block: Block of the encoder whose patch features are taken; -1 for the last, -2 as in the paper.
        scales: Sides of the squares of patches that are averaged; `(1, 2)` adds means of 2 x 2 to the patches.
        class_token: Whether a decoder also reads the image's class token, as one token in front of its text.
        d_image: Width of the features where there are no eyes.
        seed: Seed of the initial values.
        prove: Whether to check that every feed-forward layer is reached, and that nothing else is changed.

    Raises:
        BackboneError: No view knows the language model or the image encoder, or it has no class token.
        PluginError: The plugin belongs to another model, there are more features than slots, the patches form no grid
            to average, or a model with an encoder is to read a class token.
        ProofError: A feed-forward layer is not reached.

    Example:
        >>> import petiole as pt
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
        >>> model = pt.give_eyes(llama, pt.backbone("micro"), pt.MemVP(slots=80))
    """
    view = language_view_of(language_model)
    if prove:
        prove_language_view(view, language_model)
    if (eyes is None) == (d_image is None):
        raise PluginError("the width of image features comes from the eyes; without eyes it is d_image")
    if eyes is None and tuple(scales) != (1,):
        raise PluginError("scales are of the eyes, and there are none: average the features that are given")
    seeing = None
    if eyes is not None:
        host = eyes if isinstance(eyes, Adapted) else adapt(eyes, prove=prove)
        seeing = Eyes(host, block, scales=scales, class_token=class_token)
        d_image = seeing.width
    assert d_image is not None
    return Sighted(language_model, view, seeing, plugin, d_image, seed, class_token)


def _num_texts(texts: dict[str, Any]) -> int | None:
    """Returns how many texts keyword arguments of the language model hold, None where they do not say."""
    return next((len(texts[name]) for name in _TEXTS if texts.get(name) is not None), None)
