"""A run's history as TensorBoard events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FitError


@contextmanager
def events(folder: Path | None, num_known: int = 0) -> Iterator[Callable[[dict[str, float]], None]]:
    """Gives a function that writes a row of the history as events, or does nothing.

    Args:
        folder: Where to; None writes nothing.
        num_known: Epochs the run has behind it: events of later ones, of a run that was killed, are taken back.

    Raises:
        FitError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda row: None
        return
    require()
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=num_known + 1) as writer:

        def write(row: dict[str, float]) -> None:
            for key, value in row.items():
                if key != "epoch":
                    writer.add_scalar(key, value, int(row["epoch"]))
            writer.flush()

        yield write


def require() -> None:
    """Checks that TensorBoard is installed.

    Raises:
        FitError: It is not.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise FitError("TensorBoard events need an extra: pip install 'petiole[track]'") from error
