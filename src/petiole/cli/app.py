"""The list of commands."""

import typer

from .demo import demo
from .doctor import doctor
from .eval import evaluate
from .fit import fit
from .inspect import inspect
from .merge import merge
from .predict import predict

app = typer.Typer(
    name="petiole",
    help="Joins small plugins to one large pretrained model: kilobytes per task, one file each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(fit)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(inspect)
app.command()(merge)
app.command()(doctor)
app.command()(demo)
