"""Sharing plugin files: everything that goes wrong is one sentence."""

import re
from pathlib import Path

import pytest
from huggingface_hub import constants

import fake_hub
import petiole as pt
from fake_hub import NAME, PUBLIC, Answer, Hub, refusal
from petiole.files.hub import pull, push

damaged, hub, plugin = fake_hub.damaged, fake_hub.hub, fake_hub.plugin

NAMES = [
    "pets",
    "a/b/c",
    "https://huggingface.co/anna/pets",
    "anna/",
    "/pets",
    "anna/../x",
    "an na/pets",
    "",
    "a/b.git",
]


@pytest.mark.parametrize("name", NAMES)
def test_name_that_is_none_is_refused_without_a_request(name: str, hub: Hub, plugin: Path) -> None:
    for ask in (lambda: push(plugin, name), lambda: pull(name)):
        with pytest.raises(pt.PluginFileError, match=f"is called owner/name.*got {re.escape(repr(name))}"):
            ask()
    assert hub.requests == []


def test_damaged_file_is_never_uploaded(hub: Hub, damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04\x95junk")
    for path, message in ((damaged, "is damaged"), (tmp_path / "weights.bin", "but a pickle"), (tmp_path, "no file")):
        with pytest.raises(pt.PluginFileError, match=message):
            push(path, "anna/pets")
    assert hub.requests == []


def test_push_without_login_says_how_to_log_in(hub: Hub, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.add("anna/there")
    for name in ("anna/pets", "anna/there"):
        with pytest.raises(
            pt.PluginFileError, match=f"pets.safetensors cannot be pushed to {name}: you are not logged in"
        ):
            push(plugin, name)


ERRORS: dict[str, tuple[str, Answer, str]] = {
    "no such repository": ("push", refusal(404, "RepoNotFound"), "there is no such repository"),
    "not logged in": ("pull", refusal(401), "there is no such repository, or it is private .* `hf auth login`"),
    "gated": ("pull", refusal(403, "GatedRepo"), "ask for access at http.*/anna/pets"),
    "forbidden": ("push", refusal(403), "you may not write to it: use a token with the role write"),
    "no revision": (
        "pull",
        refusal(404, "RevisionNotFound"),
        "it has no revision 'v9': give a branch, a tag or a commit",
    ),
    "no file": ("pull", refusal(404, "EntryNotFound"), "it has no file plugin.safetensors"),
    "busy": ("push", refusal(429), "status 429, it is busy or out of order: try again later"),
    "broken": ("pull", refusal(500), "status 500, it is busy or out of order: try again later"),
    "refused": ("push", refusal(400, message="too much"), "too much"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusal_of_the_hub_is_one_sentence(name: str, hub: Hub, plugin: Path) -> None:
    kind, answer, message = ERRORS[name]
    hub.add()
    hub.canned = {"(HEAD|GET) .*/resolve/.*": answer, "POST .*/(preupload|commit)/main": answer}
    what = "pets.safetensors cannot be pushed to anna/pets" if kind == "push" else "^anna/pets cannot be pulled"
    with pytest.raises(pt.PluginFileError, match=f"{what}: .*{message}") as caught:
        push(plugin, "anna/pets") if kind == "push" else pull("anna/pets", revision="v9")
    assert caught.value.__cause__ is not None


def test_missing_things_are_told_apart(hub: Hub, plugin: Path) -> None:
    with pytest.raises(pt.PluginFileError, match="anna/pets cannot be pulled: there is no such repository"):
        pull("anna/pets")
    hub.add()
    with pytest.raises(pt.PluginFileError, match=r"anna/pets cannot be pulled: it has no file plugin\.safetensors"):
        pull("anna/pets")
    with pytest.raises(pt.PluginFileError, match="anna/pets cannot be pulled: it has no revision 'v9'"):
        pull("anna/pets", revision="v9")


def test_repository_of_somebody_else_is_refused(hub: Hub, plugin: Path) -> None:
    with pytest.raises(pt.PluginFileError, match=r"you may not write to it: .* an account that belongs to its owner"):
        push(plugin, "bert/pets")


def test_repository_that_a_token_does_not_see_is_not_overwritten(hub: Hub, plugin: Path) -> None:
    repo = hub.add()
    hub.canned = {f"GET {PUBLIC}": refusal(404, "RepoNotFound")}
    with pytest.raises(pt.PluginFileError, match="there is a repository of this name that your token does not see"):
        push(plugin, "anna/pets")
    assert repo.files == {}


def test_licence_that_the_hub_does_not_know_is_refused(hub: Hub, plugin: Path) -> None:
    with pytest.raises(pt.PluginFileError, match=r'Invalid metadata in README\.md\. - "license" must be one of'):
        push(plugin, "anna/pets", license_id="mine")
    assert NAME not in hub.repos["anna/pets"].files


def test_hub_that_is_not_there_is_one_sentence(hub: Hub, plugin: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(pt.PluginFileError, match=f"{nowhere} cannot be reached: check the network"):
        push(plugin, "anna/pets", endpoint=nowhere)
    with pytest.raises(pt.PluginFileError, match=f"{nowhere} cannot be reached: check the network"):
        pull("anna/pets", endpoint=nowhere)


def test_offline_mode_is_one_sentence(hub: Hub, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: push(plugin, "anna/pets"), lambda: pull("anna/pets")):
        with pytest.raises(pt.PluginFileError, match="HF_HUB_OFFLINE is set"):
            ask()
    assert hub.requests == []
