"""Language models on the command line: their options, and how one is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..vision_language.sighted import Sighted

Questions = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Rows of questions (.jsonl, .jsonl.gz), or a folder of ScienceQA, VQAv2 or COCO captions",
    ),
]
ImagesOfQuestions = Annotated[
    Path | None, typer.Option("--images", "-i", help="Pack (.npz) or folder of images [default: beside the questions]")
]
LanguageModel = Annotated[
    str, typer.Option("--language-model", "-l", help="Folder, or name on the Hugging Face Hub, of a language model")
]
EyesFile = Annotated[Path, typer.Argument(help="Plugin file of `petiole vqa fit`", metavar="FILE")]
OtherEyes = Annotated[
    str | None, typer.Option("--eyes", "-e", help="Image encoder to use instead of building the one the file names")
]
Split = Annotated[str, typer.Option(help="train, val or test")]
NumBeams = Annotated[int, typer.Option(help="Beginnings of an answer that are followed at a time", min=1)]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer [tokens]", min=1)]
BatchSize = Annotated[int, typer.Option(help="Questions per batch", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of the questions' splits, as it was for fit")]
Captions = Annotated[
    bool, typer.Option("--captions/--no-captions", help="Whether ScienceQA's captions join the context")
]


def template_of(source: str) -> str:
    """Returns the template of questions: ScienceQA's are prompts already."""
    from ..vision_language.texts import TEMPLATE

    return "{question}" if (Path(source) / "problems.json").is_file() else TEMPLATE


def read_scales(text: str) -> tuple[int, ...]:
    """Returns scales that are written `1,2`.

    Raises:
        PluginError: They are no whole numbers.
    """
    from ..errors import PluginError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise PluginError(f"--scales takes whole numbers, e.g. 1,2, got {text!r}") from error


def load_language_model(place: str, dtype: str) -> tuple[Any, Any]:
    """Returns a pretrained language model and its tokenizer; no code from the place is run.

    Args:
        place: A folder, or a name on the Hugging Face Hub.
        dtype: `auto` for that of its weights, or another one's name.

    Raises:
        BackboneError: transformers is not installed, or there is no such model.
    """
    from ..errors import BackboneError
    from ..files.container import one_line

    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise BackboneError("language models need an extra: pip install 'petiole[vl]'") from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        return cls.from_pretrained(place, dtype=dtype, trust_remote_code=False).eval(), tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BackboneError(
            f"{place} cannot be loaded as a language model: {one_line(error)[:300]}. Give a folder of "
            "`save_pretrained`, or a name on the Hub"
        ) from error


def load_sighted(file: Path, place: str, eyes: str | None) -> tuple["Sighted", Any]:
    """Returns the language model that a file belongs to with the file's eyes, and its tokenizer."""
    import torch

    from ..backbones.bundled import backbone as build
    from ..vision_language.eyes_file import load_eyes
    from ..vision_language.eyes_info import inspect_eyes

    info = inspect_eyes(file)  # a file that is none should not cost a download
    language_model, tokenizer = load_language_model(place, info.language_model["dtype"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = None if eyes is None else build(eyes).to(device)
    return load_eyes(file, language_model.to(device), encoder), tokenizer
