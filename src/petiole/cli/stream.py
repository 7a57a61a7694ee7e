"""`petiole stream`: learners that keep learning: taught, scored, asked and compared."""

from collections.abc import Callable

import typer

from .stream_eval import evaluate
from .stream_fit import fit
from .stream_predict import predict
from .stream_report import report

_COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    (
        "fit",
        fit,
        """\b
Examples:
  petiole stream fit digits --experiences 5
  petiole stream fit digits --learner taer --exemplars 5 --set lr=0.1 --out runs/digits-taer
  petiole stream fit week2/ --continue runs/week1 --out runs/week2
  petiole stream fit photos/ --learner generative --backbone resnet18.a1_in1k --size 64 --augment shift --capacity 500
  petiole stream fit photos/ --learner confit --backbone resnet18.a1_in1k --experiences 10
  petiole stream fit photos/ --learner random-ridge --method fact --first 20""",
    ),
    (
        "eval",
        evaluate,
        """\b
Examples:
  petiole stream eval runs/digits-taer digits
  petiole stream eval runs/week2/learner.safetensors week1/ --split val --json""",
    ),
    (
        "predict",
        predict,
        """\b
Examples:
  petiole stream predict runs/digits-taer scan.png
  petiole stream predict runs/photos-confit new/ --among cat,dog --json""",
    ),
    (
        "report",
        report,
        """\b
Examples:
  petiole stream report runs/digits-taer
  petiole stream report runs/digits-taer runs/digits-ncm --out compared.html""",
    ),
]

stream = typer.Typer(help="Keep learning: classes as they come.", no_args_is_help=True, rich_markup_mode=None)
for _name, _command, _examples in _COMMANDS:
    stream.command(_name, epilog=_examples)(_command)
