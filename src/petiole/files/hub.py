"""Plugin files on the Hugging Face Hub: one repository each, with a card that says what it is."""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import PluginFileError
from .card import is_replaceable, license_of, write_card
from .container import atomic_write, read_bytes
from .hub_errors import plain_errors, status_of
from .metadata import PluginInfo, inspect

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

FILENAME = "plugin.safetensors"
_CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        url: The repository's page.
        commit: The commit that holds the file.
        is_new: Whether the repository was made.
        is_changed: Whether there was anything to upload.
        is_card_kept: Whether a README.md that is not petiole's, or was edited since, was left as it is.
    """

    url: str
    commit: str
    is_new: bool
    is_changed: bool
    is_card_kept: bool


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    dataset: str | None = None,
    license_id: str | None = None,
    replace_card: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Shares a plugin file on the Hugging Face Hub and returns the URL of its repository.

    Uploads `plugin.safetensors` and a model card in one commit; the repository is made if there is none. The file is
    verified before the first request. A README.md that petiole did not write, or that was edited since, stays as it
    is, with a warning.

    Args:
        path: A file of `petiole.save`.
        repo: Where to, `owner/name`.
        private: Whether a new repository is private; one that exists and is public is then refused.
        message: The commit's message.
        dataset: What the plugin was trained on, for the card: a dataset of the Hub, `owner/name` or
            `owner/name:config`, or any other name. With it, accuracies in the file become results of the model.
        license_id: Licence for the card, as the Hub calls it, e.g. `apache-2.0`; None keeps that of an earlier push.
        replace_card: Whether to replace a README.md in any case.
        token: Access token; by default the one of `hf auth login` or HF_TOKEN.
        endpoint: Address of the Hub; by default HF_ENDPOINT or https://huggingface.co.

    Raises:
        PluginFileError: The file is damaged or foreign, `repo` is no name, the repository is public and should be
            private, or the Hub cannot be reached or refuses; says why.

    Example:
        url = pt.push("pets.safetensors", "owner/pets", dataset="timm/oxford-iiit-pet")
    """
    pushed = upload(
        path, repo, private=private, message=message, dataset=dataset, license_id=license_id,
        replace_card=replace_card, token=token, endpoint=endpoint,
    )  # fmt: skip
    if pushed.is_card_kept:
        warnings.warn(
            f"{repo} keeps its {_CARD}, which petiole did not write or which was edited since: "
            "pass replace_card=True to replace it",
            stacklevel=2,
        )
    return pushed.url


def upload(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    dataset: str | None = None,
    license_id: str | None = None,
    replace_card: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Pushed:
    """Does what `push` does, without a warning, and returns what it did."""
    _check_repo(repo)
    data, info = _verified(path)
    with plain_errors(f"{os.fspath(path)} cannot be pushed to {repo}", repo, endpoint, is_push=True):
        # here, so that what needs no network does without the library's import
        from huggingface_hub import CommitOperationAdd

        api = _api(token, endpoint)
        found = _find(api, repo)
        if found is not None and private and not found.private:
            raise PluginFileError(
                f"{repo} exists already and is public, so a private push would publish {os.fspath(path)}: make it "
                "private in its settings on the Hub, or choose another name"
            )
        card = None if found is None else _read_card(api, repo, found)
        is_card_kept = card is not None and not replace_card and not is_replaceable(card)
        operations = [CommitOperationAdd(FILENAME, data)]
        if not is_card_kept:
            text = write_card(info, repo, dataset=dataset, license_id=license_id or license_of(card or ""))
            operations.append(CommitOperationAdd(_CARD, text.encode()))
        if found is None:
            # None leaves it to the rules of an organisation, which may say private
            api.create_repo(repo, private=private or None)
        # the head that was looked at: a README.md that somebody writes meanwhile is not replaced unseen
        head = None if found is None else found.sha
        message = message or f"{'Add' if found is None else 'Update'} {FILENAME}"
        done = api.create_commit(repo, operations, commit_message=message, parent_commit=head)
        return Pushed(f"{api.endpoint}/{repo}", str(done.oid), found is None, done.oid != head, is_card_kept)


def pull(
    repo: str,
    *,
    filename: str = FILENAME,
    revision: str | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Fetches a plugin file from the Hugging Face Hub, verifies every byte, and returns where it is.

    Without network, the copy in the Hub's cache serves. A copy that is damaged there is fetched once more.

    Args:
        repo: Where from, `owner/name`.
        filename: The file's path in the repository; safetensors only.
        revision: Branch, tag or commit; by default the newest.
        out: File to write, atomically; None leaves it in the Hub's cache, where it must not be changed.
        force: Whether to replace `out` if it exists.
        token: Access token; by default the one of `hf auth login` or HF_TOKEN.
        endpoint: Address of the Hub; by default HF_ENDPOINT or https://huggingface.co.

    Raises:
        PluginFileError: There is no such repository, revision or file, it is no intact plugin file, `out` exists or
            cannot be written, or the Hub cannot be reached; says why.

    Example:
        model = pt.load(pt.pull("owner/pets"))
    """
    _check_repo(repo)
    if not filename.endswith(".safetensors") or ".." in filename.split("/") or filename.startswith("/"):
        raise PluginFileError(f"pull takes the path of a .safetensors file in {repo}, got {filename!r}")
    if out is not None:
        _check_out(Path(out), force)
    with plain_errors(f"{repo} cannot be pulled", repo, endpoint, filename=filename, revision=revision):
        from huggingface_hub import try_to_load_from_cache

        api, name = _api(token, endpoint), f"{repo}/{filename}"
        was_cached = isinstance(try_to_load_from_cache(repo, filename, revision=revision), str)
        found = Path(api.hf_hub_download(repo, filename, revision=revision))
        try:
            data, _ = _verified(found, name)
        except PluginFileError:
            if not was_cached:
                raise
            found = Path(api.hf_hub_download(repo, filename, revision=revision, force_download=True))
            data, _ = _verified(found, name)
    if out is None:
        return found
    atomic_write(out, data)
    return Path(out)


def _api(token: str | None, endpoint: str | None) -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(endpoint, token, library_name="petiole", library_version=__version__)


def _check_repo(repo: str) -> None:
    """Refuses what is no `owner/name`.

    Raises:
        PluginFileError: It is none.
    """
    part = r"[A-Za-z0-9]([\w.-]{0,94}\w)?"
    if not re.fullmatch(f"{part}/{part}", repo, re.ASCII) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise PluginFileError(f"a repository of the Hub is called owner/name, e.g. anna/pets-fact; got {repo!r}")


def _check_out(out: Path, force: bool) -> None:
    """Refuses, before anything is fetched, a file that cannot be written.

    Raises:
        PluginFileError: It exists, or has no folder to be in.
    """
    if out.is_dir():
        raise PluginFileError(f"{out} is a folder: give the path of the file to write, e.g. {out / FILENAME}")
    if out.exists() and not force:
        raise PluginFileError(f"{out} exists already: choose another name, or pass --force (force=True) to replace it")
    if not out.parent.is_dir():
        raise PluginFileError(f"there is no folder {out.parent} to write {out.name} into: make it first")


def _verified(path: str | os.PathLike[str], name: str | None = None) -> tuple[bytes, PluginInfo]:
    """Returns the bytes of an intact plugin file and what they say.

    Args:
        path: The file.
        name: What messages call it.

    Raises:
        PluginFileError: It is none, or was changed while it was read.
    """
    name = name or os.fspath(path)
    try:
        data, info = read_bytes(path), inspect(path)
    except PluginFileError as error:
        raise PluginFileError(str(error).replace(os.fspath(path), name)) from error
    # `inspect` has read the file for itself: what is passed on must be what it has verified
    if read_bytes(path) != data:
        raise PluginFileError(f"{name} was changed while it was read: try again")
    return data, info


def _find(api: "HfApi", repo: str) -> "ModelInfo | None":
    """Returns what the Hub says about a repository, None where there is none to be seen."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return api.model_info(repo)
    except HfHubHTTPError as error:
        # without a login, the Hub answers 401 for what does not exist
        if status_of(error) in (401, 404):
            return None
        raise


def _read_card(api: "HfApi", repo: str, found: "ModelInfo") -> str | None:
    """Returns the README.md at a repository's head, None where there is none."""
    import tempfile

    if _CARD not in [file.rfilename for file in found.siblings or ()]:
        return None
    with tempfile.TemporaryDirectory() as cache:
        return (
            Path(api.hf_hub_download(repo, _CARD, revision=found.sha, cache_dir=cache))
            .read_bytes()
            .decode(errors="replace")
        )
