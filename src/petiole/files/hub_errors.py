"""What the Hugging Face Hub, its library and the network have to say, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import PetioleError, PluginFileError
from .container import one_line

_LOGIN = "run `hf auth login`, or set HF_TOKEN"


def quieten() -> None:
    """Keeps huggingface_hub, in this process, from printing progress bars and log lines of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.set_verbosity_error()
    # False: the environment asks for them
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not False:
        disable_progress_bars()


def status_of(error: BaseException) -> int:
    """Returns the HTTP status behind an error, 0 where there is none."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


@contextmanager
def plain_errors(what: str, repo: str, endpoint: str | None, is_push: bool = False, **asked: Any) -> Iterator[None]:
    """Turns whatever the network and the Hub have to say into one sentence.

    Raises:
        PluginFileError: Something did.
    """
    try:
        yield
    except PetioleError:
        raise
    except Exception as error:  # huggingface_hub's own, those of its HTTP library, and those of the system
        from huggingface_hub import constants

        url = endpoint or constants.ENDPOINT
        raise PluginFileError(f"{what}: {_reason(error, repo, url, is_push, **asked)}") from error


def _reason(error: BaseException, repo: str, url: str, is_push: bool, filename: str = "", revision: str = "") -> str:
    """Returns what went wrong and what to do about it."""
    from huggingface_hub import errors

    hides = isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) or type(error) is ValueError
    if hides and error.__cause__ is not None and not isinstance(error.__cause__, errors.BadRequestError):
        error = error.__cause__
    status, is_answer = status_of(error), isinstance(error, errors.HfHubHTTPError)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing may be asked of the Hub: unset it"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner decides who may read it: ask for access at {url}/{repo}, then {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}: give a branch, a tag or a commit"
    if is_answer and isinstance(error, errors.EntryNotFoundError):
        return f"it has no file {filename}: it holds no plugin of petiole, or its file has another name"
    if status == 401 and is_push:
        return f"you are not logged in, or your token is not valid: {_LOGIN}"
    if status in (401, 404):
        return f"there is no such repository, or it is private and not yours to see: check the name, or {_LOGIN}"
    if status == 403:
        verb, role = ("write to", "write") if is_push else ("read", "read")
        return f"you may not {verb} it: use a token with the role {role}, of an account that belongs to its owner"
    if status == 409:
        return "there is a repository of this name that your token does not see: use another name or token"
    if status == 412:
        return "somebody changed the repository in this moment: push again"
    if status == 429 or status >= 500:
        return f"the Hub answers with status {status}, it is busy or out of order: try again later"
    # httpx2, httpx or requests, by the library's version; an error of the disk has a number
    network = (OSError, *errors.HfHubHTTPError.__bases__)
    if isinstance(error, network) and not is_answer and not getattr(error, "errno", None):
        return f"{url} cannot be reached: check the network, and HF_ENDPOINT if it is set"
    return one_line(error)[:300]
