"""The list of commands."""

from collections.abc import Callable
from typing import Annotated

import typer

from .. import __version__
from .compress import compress
from .convert import convert
from .demo import demo
from .distill import distill
from .doctor import doctor
from .eval import evaluate
from .fit import fit
from .inspect import inspect
from .merge import merge
from .predict import predict
from .pull import pull
from .push import push
from .show_merge import show_merge
from .stream import stream
from .vqa import vqa

# name, command, examples; a paragraph that begins with \b keeps its lines
_COMMANDS: list[tuple[str, Callable[..., None], str]] = [
    (
        "fit",
        fit,
        """\b
Examples:
  petiole fit digits --method fact --set rank=8 --epochs 20
  petiole fit digits --method fact --set rank=8 --grid scale=0.1,1,10 --search-epochs 20
  petiole fit photos/ --backbone vit_base_patch16_224.augreg_in21k --out runs/photos
  petiole fit --recipe fact-tt-paper --task cifar --backbone vit_base_patch16_224.orig_in21k
  accelerate launch -m petiole fit photos/ --backbone vit_base_patch16_224.augreg_in21k""",
    ),
    (
        "eval",
        evaluate,
        """\b
Examples:
  petiole eval runs/digits-fact/plugin.safetensors digits
  petiole eval pets.safetensors pets.npz --split val --json""",
    ),
    (
        "predict",
        predict,
        """\b
Examples:
  petiole predict runs/digits-fact/plugin.safetensors scan.png
  petiole predict pets.safetensors photos/ --top 3 --json""",
    ),
    (
        "inspect",
        inspect,
        """\b
Examples:
  petiole inspect runs/digits-fact/plugin.safetensors
  petiole inspect pets.safetensors --json""",
    ),
    (
        "merge",
        merge,
        """\b
Example:
  petiole merge runs/digits-fact/plugin.safetensors digits.safetensors""",
    ),
    (
        "compress",
        compress,
        """\b
Examples:
  petiole compress runs/digits-fact/plugin.safetensors digits --budget 6
  petiole compress pets.safetensors pets/ --speed-up 1.5 --tocom tocom.safetensors --out fast.safetensors
  petiole compress pets.safetensors pets/ --budget 8 --budgets 0,4,8,12,16 --plot pets.svg
  petiole compress vit_base_patch16_224.augreg_in21k --budget 13""",
    ),
    (
        "convert",
        convert,
        """\b
Examples:
  petiole convert pets.safetensors small.safetensors --bits 1 --head-bits 1
  petiole convert pets.safetensors pets-peft
  petiole convert lora/kitti-bit1-dim32.bin kitti.safetensors --backbone vit_base_patch16_224.orig_in21k""",
    ),
    (
        "distill",
        distill,
        """\b
Examples:
  petiole distill photos/ --backbone deit_base_patch16_224.fb_in1k
  petiole distill photos/ more.npz --backbone micro --groups 12 --head probe/plugin.safetensors --epochs 5""",
    ),
    (
        "push",
        push,
        """\b
Examples:
  petiole push runs/pets/plugin.safetensors anna/pets
  petiole push pets.safetensors anna/pets --private --dataset timm/oxford-iiit-pet --license apache-2.0""",
    ),
    (
        "pull",
        pull,
        """\b
Examples:
  petiole pull anna/pets --out pets.safetensors
  petiole predict "$(petiole pull anna/pets)" photo.jpg""",
    ),
    (
        "show-merge",
        show_merge,
        """\b
Examples:
  petiole show-merge cat.jpg
  petiole show-merge cat.jpg --backbone vit_base_patch16_224.augreg_in21k --budget 16 --blocks 3,6,12
  petiole show-merge cat.jpg --backbone deit_small_patch16_224 --method evit --budget 0,0,0,0.7,0,0,0.7,0,0,0.7""",
    ),
    (
        "doctor",
        doctor,
        """\b
Examples:
  petiole doctor micro
  petiole doctor vit_small_patch16_224 --json""",
    ),
    (
        "demo",
        demo,
        """\b
Example:
  petiole demo --out demo""",
    ),
]

app = typer.Typer(
    name="petiole",
    help="Joins small plugins to one large pretrained model: kilobytes per task, one file each.",
    epilog="""\b
Examples:
  petiole demo                             the main job from end to end
  petiole fit photos/ --out runs/photos    one folder per class
  petiole predict runs/photos/plugin.safetensors new/""",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _command, _examples in _COMMANDS:
    app.command(_name, epilog=_examples)(_command)
app.add_typer(stream, name="stream")
app.add_typer(vqa, name="vqa")


def _version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"petiole {__version__}")
        raise typer.Exit


@app.callback()
def petiole(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Joins small plugins to one large pretrained model: kilobytes per task, one file each."""
