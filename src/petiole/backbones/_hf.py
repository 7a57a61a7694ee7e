"""What the transformers families share: attention interface, patch grid, classifier, transform."""

import sys
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..core.attended import Attended
from ..core.flow import Flow
from ..core.site import Site
from ..core.taps import Taps
from ..errors import BackboneError, MergeError
from ..nn.attention import with_bias_channel
from ._parts import at, linear_site, need, plain_linear, run_linear, run_linears
from ._plain import PlainView

# kernels of this name take no mask that is added to the scores
MASKLESS = "flash_attention"


class HFView(PlainView):
    """What the vision transformers of the transformers library answer in the same way."""

    patches: ClassVar[str]
    """The patch convolution, seen from the body."""
    dropout: ClassVar[str] = "attention_dropout"
    """What the attention calls its dropout rate."""
    scale: ClassVar[str] = "scaling"
    """What the attention calls the factor of its scores."""
    transform: ClassVar[dict[str, Any]]
    """How the library's processor prepares images for the family; the model does not know."""

    def prefix(self, model: Any) -> str:
        return next((f"{name}." for name in (model.base_model_prefix, "vision_model") if hasattr(model, name)), "")

    def check(self, model: Any) -> None:
        need(model, self.prefix(model) + self.patches, nn.Conv2d)
        super().check(model)

    def check_attention(self, model: Any, part: str) -> None:
        for role in "qkv":
            need(model, f"{part}.{role}_proj", nn.Linear)
        kernel = at(model, part).config._attn_implementation
        if kernel not in ("sdpa", "eager") and not kernel.startswith(MASKLESS):
            raise BackboneError(
                f"{type(model).__name__} attends by {kernel!r}: looked for 'sdpa', 'eager' or '{MASKLESS}...'; "
                "load it with attn_implementation='sdpa'"
            )

    def qkv_sites(self, attn: Any, name: str, part: str, block: int, width: int, drop_path: float) -> list[Site]:
        return [
            linear_site(f"{name}.{r}", f"{part}.{r}_proj", getattr(attn, f"{r}_proj"), block, width, drop_path)
            for r in "qkv"
        ]

    def run_attention(self, attn: Any, name: str, x: Tensor, taps: Taps, flow: Flow) -> tuple[Tensor, Attended]:
        names = (f"{name}.q", f"{name}.k", f"{name}.v")
        parts = run_linears((attn.q_proj, attn.k_proj, attn.v_proj), names, x, taps, flow)
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for t in parts)
        # each modelling file keeps its eager kernel beside its attention class
        eager = sys.modules[type(attn).__module__].eager_attention_forward
        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager)
        dropout = getattr(attn, self.dropout) if attn.training else 0.0
        bias, scale = None if flow.bias is None else flow.bias.to(q.dtype), getattr(attn, self.scale)
        if bias is not None and attn.config._attn_implementation.startswith(MASKLESS):
            y, _ = kernel(attn, *with_bias_channel(q, k, v, bias, scale), None, dropout=dropout, scaling=scale)
            y = y[..., : attn.head_dim]
        else:
            y, _ = kernel(attn, q, k, v, bias, dropout=dropout, scaling=scale)
        proj = at(attn, self.wiring.proj)
        return run_linear(proj, f"{name}.proj", y.flatten(2).contiguous(), taps, flow), Attended(q, k, scale)

    def start(self, model: Any, images: Tensor) -> tuple[Tensor, Flow]:
        """Returns the embedded tokens `[B, N, d]` and the facts about them."""
        body = self.body(model)
        conv = at(body, self.patches)
        height, width = (size // kernel for size, kernel in zip(images.shape[-2:], conv.kernel_size, strict=True))
        prefix = 1 + getattr(body.config, "num_register_tokens", 0)
        return body.embeddings(images.to(conv.weight.dtype)), Flow(prefix, (height, width), has_class=True)

    def classify(self, model: Any, tokens: Tensor, flow: Flow) -> Tensor:
        pooled = self.pool(model, tokens, flow)
        return model.classifier(pooled) if self.classifiers(model) else pooled

    def answer(self, model: Any, images: Tensor) -> Tensor:
        found = model(images, return_dict=True)
        for name in ("logits", "image_embeds", "pooler_output"):
            if found.get(name) is not None:
                return found[name]
        return found.last_hidden_state[:, 0]

    def num_features(self, model: Any) -> int:
        return self.body(model).config.hidden_size

    def classifiers(self, model: Any) -> Sequence[str]:
        return [name for name, _ in model.named_children() if name == "classifier"]

    def unused(self, model: Any) -> Sequence[str]:
        return [name for name, _ in model.named_parameters() if name.endswith("mask_token")]

    def set_head(self, model: Any, head: nn.Linear) -> None:
        if not self.classifiers(model):
            kind = model.config.model_type.removesuffix("_vision_model")
            other = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(kind, "the ForImageClassification class")
            raise MergeError(
                f"{type(model).__name__} has no classifier to carry the head: load the backbone as {other}, "
                "or merge without a head"
            )
        model.classifier = plain_linear(head)
        model.num_labels = model.config.num_labels = head.out_features

    def input_config(self, model: Any) -> dict[str, Any]:
        config = self.body(model).config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"input_size": (config.num_channels, height, width), **self.transform}

    def identify(self, model: Any) -> dict[str, str]:
        name = getattr(model.config, "_name_or_path", "")
        return {"name": name or type(model).__name__, "tag": getattr(model.config, "_commit_hash", None) or ""}
