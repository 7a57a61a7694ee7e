"""One family of language models, one view. The table below is the list of families."""

import importlib

from torch import nn

from ..core.language import LanguageView
from ..errors import BackboneError

# class of the model -> module of its view, class of the view
LANGUAGE_VIEWS = {
    "transformers.models.bart.modeling_bart.BartForConditionalGeneration": ("seq2seq", "Bart"),
    "transformers.models.llama.modeling_llama.LlamaForCausalLM": ("decoder", "Decoder"),
    "transformers.models.mistral.modeling_mistral.MistralForCausalLM": ("decoder", "Decoder"),
    "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM": ("decoder", "Decoder"),
    "transformers.models.t5.modeling_t5.T5ForConditionalGeneration": ("seq2seq", "T5"),
}


def language_view_of(model: nn.Module) -> LanguageView:
    """Returns the view of a language model, found by its class or a base class.

    Raises:
        BackboneError: No view knows the model's class, or a part is missing; says what was looked for.
    """
    for cls in type(model).__mro__:
        entry = LANGUAGE_VIEWS.get(f"{cls.__module__}.{cls.__qualname__}")
        if entry is not None:
            module, name = entry
            view = getattr(importlib.import_module(f"{__package__}.{module}"), name)()
            view.feed_forwards(model)
            return view
    known = "\n  ".join(sorted(LANGUAGE_VIEWS))
    raise BackboneError(
        f"no view knows the feed-forward layers of {type(model).__module__}.{type(model).__qualname__}: looked for one "
        f"of these classes or a subclass\n  {known}"
    )
