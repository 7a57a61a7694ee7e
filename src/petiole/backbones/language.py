"""One family of language models, one view. The table below is the list of families."""

from torch import nn

from ..core.language import LanguageView
from . import made

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
    view: LanguageView = made(model, LANGUAGE_VIEWS, "no view knows the feed-forward layers of")
    view.feed_forwards(model)
    return view
