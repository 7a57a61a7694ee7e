"""`petiole vqa`: a frozen language model is given eyes, trained, asked and scored."""

from collections.abc import Callable

import typer

from .vqa_answer import answer
from .vqa_eval import evaluate
from .vqa_fit import fit

_COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    (
        "fit",
        fit,
        """\b
Examples:
  petiole vqa fit shapes/rows.jsonl --language-model models/story --out runs/shapes
  petiole vqa fit scienceqa/ --language-model models/llama-7b --dtype bfloat16 --eyes vit_large_patch14_clip_224.openai
  petiole vqa fit coco/ --language-model google/flan-t5-base --eyes-method adaptformer --eyes-set dim=12
  petiole vqa fit shapes/rows.jsonl --language-model models/story --set slots=81 --scales 1,2 --class-token
  accelerate launch -m petiole vqa fit shapes/rows.jsonl --language-model models/story""",
    ),
    (
        "answer",
        answer,
        """\b
Examples:
  petiole vqa answer runs/shapes/plugin.safetensors -l models/story --image a.jpg --question "what colour is it?"
  petiole vqa answer shapes.safetensors new.jsonl -l models/story --json""",
    ),
    (
        "eval",
        evaluate,
        """\b
Examples:
  petiole vqa eval runs/shapes/plugin.safetensors shapes/rows.jsonl -l models/story --split val
  petiole vqa eval runs/scienceqa-memvp/plugin.safetensors scienceqa/ -l models/llama-7b --both-captions --json""",
    ),
]

vqa = typer.Typer(help="Train and ask a language model with eyes.", no_args_is_help=True, rich_markup_mode=None)
for _name, _command, _examples in _COMMANDS:
    vqa.command(_name, epilog=_examples)(_command)
