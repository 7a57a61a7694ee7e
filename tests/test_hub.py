"""Sharing plugin files: what is pushed and pulled, and the commands."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars, logging

import fake_hub
import petiole as pt
import test_cli
from fake_hub import ANNA, NAME, PUBLIC, Answer, Hub, refusal
from petiole.files.hub import pull, push, upload
from test_cli import Command

run_command = test_cli.petiole
damaged, hub, other, plugin = fake_hub.damaged, fake_hub.hub, fake_hub.other, fake_hub.plugin

# what is pushed


# huggingface_hub 2.4 uploads large files through an argument that its own HTTP library is about to drop
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_what_was_pushed_comes_back_byte_for_byte(mode: str, hub: Hub, plugin: Path, tmp_path: Path) -> None:
    hub.upload_mode = mode
    assert push(plugin, "anna/pets") == f"{hub.url}/anna/pets"
    found = pull("anna/pets")
    assert found.read_bytes() == plugin.read_bytes()
    assert found.is_relative_to(tmp_path / "cache")
    assert pt.inspect(found).metrics["test_accuracy"] == 0.75


def test_push_is_one_commit_of_plugin_and_card(hub: Hub, plugin: Path) -> None:
    done = upload(plugin, "anna/pets")
    repo = hub.repos["anna/pets"]
    assert [message for _, _, message in repo.commits] == ["initial commit", "Add plugin.safetensors"]
    assert set(repo.files) == {".gitattributes", NAME, "README.md"}
    assert (done.is_new, done.is_changed, done.is_card_kept, done.commit) == (True, True, False, repo.head)


@pytest.mark.parametrize("is_private", [True, False])
def test_private_flag_is_the_repositorys(is_private: bool, hub: Hub, plugin: Path) -> None:
    push(plugin, "anna/pets", private=is_private)
    assert hub.repos["anna/pets"].is_private == is_private
    # where nothing is asked, an organisation's own rule decides
    assert ("visibility" in hub.bodies["create"]) == is_private


def test_private_push_into_a_public_repository_is_refused(hub: Hub, plugin: Path) -> None:
    hub.add()
    with pytest.raises(pt.PluginFileError, match=r"is public, so a private push would publish .*pets\.safetensors"):
        push(plugin, "anna/pets", private=True)
    assert hub.requests == [f"GET {PUBLIC}"]


def test_push_into_a_private_repository_leaves_it_private(hub: Hub, plugin: Path) -> None:
    repo = hub.add(is_private=True)
    push(plugin, "anna/pets")
    assert repo.is_private
    assert repo.files[NAME] == plugin.read_bytes()


def test_second_push_updates_plugin_and_card(hub: Hub, plugin: Path, other: Path) -> None:
    push(plugin, "anna/pets")
    pull("anna/pets")
    done = upload(other, "anna/pets", message="another method")
    repo = hub.repos["anna/pets"]
    assert [message for _, _, message in repo.commits][1:] == ["Add plugin.safetensors", "another method"]
    assert "fact" in repo.fields["tags"]
    assert (done.is_new, done.is_changed) == (False, True)
    assert pull("anna/pets").read_bytes() == other.read_bytes()
    assert pull("anna/pets", revision=repo.commits[1][0]).read_bytes() == plugin.read_bytes()


def test_equal_push_changes_nothing(hub: Hub, plugin: Path) -> None:
    first = upload(plugin, "anna/pets")
    again = upload(plugin, "anna/pets")
    assert (again.is_changed, again.commit) == (False, first.commit)
    assert len(hub.repos["anna/pets"].commits) == 2


def test_own_readme_survives(hub: Hub, plugin: Path) -> None:
    text = b"---\nlicense: mit\n---\n# My pets\n"
    repo = hub.add(README__md=text)
    with pytest.warns(UserWarning, match="anna/pets keeps its README.md.*replace_card=True"):
        push(plugin, "anna/pets")
    assert repo.files == {"README.md": text, NAME: plugin.read_bytes()}
    assert not upload(plugin, "anna/pets", replace_card=True).is_card_kept
    assert repo.fields["library_name"] == "petiole"
    assert repo.fields["license"] == "mit"


def test_edited_card_survives(hub: Hub, plugin: Path, other: Path) -> None:
    push(plugin, "anna/pets")
    repo = hub.repos["anna/pets"]
    edited = repo.files["README.md"].replace(b"## How to use it", b"Mind the dog.\n\n## How to use it")
    repo.commit({"README.md": edited}, "edit")
    assert upload(other, "anna/pets").is_card_kept
    assert repo.files == {".gitattributes": repo.files[".gitattributes"], "README.md": edited, NAME: other.read_bytes()}


@pytest.mark.parametrize("text", [b"---\nlicense: mit\n---\n", b"---\r\nlicense: mit\r\n---\r\n"])
def test_readme_that_says_only_a_licence_becomes_a_card_with_it(text: bytes, hub: Hub, plugin: Path) -> None:
    repo = hub.add(README__md=text)
    push(plugin, "anna/pets")
    assert repo.fields["license"] == "mit"
    assert repo.fields["base_model"] == "timm/tiny.v0"


def test_licence_of_an_earlier_push_is_kept_until_another_is_named(hub: Hub, plugin: Path, other: Path) -> None:
    push(plugin, "anna/pets", license_id="mit")
    push(other, "anna/pets")
    assert hub.repos["anna/pets"].fields["license"] == "mit"
    push(other, "anna/pets", license_id="apache-2.0")
    assert hub.repos["anna/pets"].fields["license"] == "apache-2.0"


def test_readme_written_meanwhile_is_not_replaced(hub: Hub, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.add()
    answer = hub.preupload

    def meanwhile(*args: Any) -> Answer:
        repo.commit({"README.md": b"mine"}, "mine")
        return answer(*args)

    monkeypatch.setattr(hub, "preupload", meanwhile)
    with pytest.raises(pt.PluginFileError, match="somebody changed the repository in this moment: push again"):
        push(plugin, "anna/pets")
    assert repo.files == {"README.md": b"mine"}


# what is pulled


def test_out_is_written(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    hub.add(plugin__safetensors=plugin.read_bytes())
    assert pull("anna/pets", out=tmp_path / "mine.safetensors") == tmp_path / "mine.safetensors"
    assert (tmp_path / "mine.safetensors").read_bytes() == plugin.read_bytes()
    assert not list(tmp_path.glob(".petiole*"))


def test_out_that_exists_is_replaced_by_force_only(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    hub.add(plugin__safetensors=plugin.read_bytes())
    out = tmp_path / "mine.safetensors"
    out.write_bytes(b"precious")
    with pytest.raises(pt.PluginFileError, match=r"mine\.safetensors exists already"):
        pull("anna/pets", out=out)
    assert (out.read_bytes(), hub.requests) == (b"precious", [])
    pull("anna/pets", out=out, force=True)
    assert out.read_bytes() == plugin.read_bytes()


@pytest.mark.parametrize(("out", "message"), [("", "is a folder"), ("none/a.safetensors", "there is no folder .*none")])
def test_out_that_cannot_be_written_costs_no_request(out: str, message: str, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(pt.PluginFileError, match=message):
        pull("anna/pets", out=tmp_path / out, force=True)
    assert hub.requests == []


def test_file_of_another_name_is_pulled(hub: Hub, plugin: Path) -> None:
    hub.add().commit({"v2/cats.safetensors": plugin.read_bytes()}, "more")
    assert pull("anna/pets", filename="v2/cats.safetensors").read_bytes() == plugin.read_bytes()


@pytest.mark.parametrize("filename", ["plugin.bin", "plugin.pt", "../plugin.safetensors", "/plugin.safetensors"])
def test_nothing_but_safetensors_is_asked_for(filename: str, hub: Hub) -> None:
    with pytest.raises(pt.PluginFileError, match=r"pull takes the path of a \.safetensors file in anna/pets"):
        pull("anna/pets", filename=filename)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(
            b"\x80\x04\x95" + 20 * b"junk", r"plugin\.safetensors is no plugin file but a pickle", id="pickle"
        ),
        pytest.param(b"PK\x03\x04" + 20 * b"junk", r"plugin\.safetensors is no plugin file but a zip", id="zip"),
    ],
)
def test_pulled_file_that_is_none_is_refused(data: bytes, message: str, hub: Hub, tmp_path: Path) -> None:
    hub.add(plugin__safetensors=data)
    with pytest.raises(pt.PluginFileError, match=message):
        pull("anna/pets", out=tmp_path / "mine.safetensors")
    assert not (tmp_path / "mine.safetensors").exists()


def test_damaged_file_in_a_repository_is_refused(hub: Hub, damaged: Path) -> None:
    hub.add(plugin__safetensors=damaged.read_bytes())
    for _ in range(2):
        with pytest.raises(pt.PluginFileError, match=r"^anna/pets/plugin\.safetensors is damaged: the checksum"):
            pull("anna/pets")


def test_damaged_copy_in_the_cache_is_fetched_again(hub: Hub, plugin: Path, damaged: Path) -> None:
    hub.add(plugin__safetensors=plugin.read_bytes())
    found = pull("anna/pets")
    found.resolve().write_bytes(damaged.read_bytes())
    assert pull("anna/pets").read_bytes() == plugin.read_bytes()


def test_copy_in_the_cache_serves_without_network(hub: Hub, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(plugin__safetensors=plugin.read_bytes())
    pull("anna/pets")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    num = len(hub.requests)
    assert pull("anna/pets").read_bytes() == plugin.read_bytes()
    assert len(hub.requests) == num


def test_token_and_endpoint_can_be_given(hub: Hub, plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(plugin, "anna/pets", private=True, token=ANNA, endpoint=hub.url) == f"{hub.url}/anna/pets"
    assert pull("anna/pets", token=ANNA, endpoint=hub.url).read_bytes() == plugin.read_bytes()


# the commands


@pytest.fixture
def petiole(hub: Hub, run_command: Command) -> Iterator[Command]:
    """Runs a command; what it silences in the Hub's library is as before afterwards."""
    verbosity = logging.get_verbosity()
    yield run_command
    logging.set_verbosity(verbosity)
    enable_progress_bars()


def test_commands_share_a_file(petiole: Any, hub: Hub, plugin: Path, tmp_path: Path) -> None:
    code, out, err = petiole("push", plugin, "anna/pets", "--private", "--license", "mit", "--message", "first")
    assert (code, out) == (0, f"{hub.url}/anna/pets\n")
    assert re.fullmatch(r"pushed \S+/pets\.safetensors \(\d\.\d KiB\) to anna/pets\n", err)
    repo = hub.repos["anna/pets"]
    assert (repo.is_private, repo.fields["license"], repo.commits[-1][2]) == (True, "mit", "first")
    code, out, err = petiole("pull", "anna/pets")
    assert Path(out.strip()).read_bytes() == plugin.read_bytes()
    assert re.fullmatch(r"pulled anna/pets: \d\.\d KiB, 3 classes\n", err)
    code, out, err = petiole("push", plugin, "anna/pets")
    assert (code, err) == (0, f"anna/pets has {plugin} already: nothing was pushed\n")


def test_commands_print_json(petiole: Any, hub: Hub, plugin: Path, tmp_path: Path) -> None:
    code, out, err = petiole("push", plugin, "anna/pets", "--dataset", "anna/photos", "--json")
    assert (code, err) == (0, "")
    repo = hub.repos["anna/pets"]
    assert json.loads(out) == {
        "repo": "anna/pets", "url": f"{hub.url}/anna/pets", "commit": repo.head, "is_new": True, "is_changed": True,
        "is_card_kept": False,
    }  # fmt: skip
    assert repo.fields["datasets"] == ["anna/photos"]
    code, out, err = petiole(
        "pull", "anna/pets", "--out", tmp_path / "a.safetensors", "--revision", repo.head, "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "repo": "anna/pets", "path": str(tmp_path / "a.safetensors"), "bytes": plugin.stat().st_size,
        "backbone": "tiny",
    }  # fmt: skip


def test_command_says_that_a_readme_was_kept(petiole: Any, hub: Hub, plugin: Path) -> None:
    hub.add(README__md=b"# Mine\n")
    code, _, err = petiole("push", plugin, "anna/pets")
    assert (code, err.splitlines()[0]) == (
        0, "kept its README.md, which petiole did not write or which was edited: --replace-card replaces it"
    )  # fmt: skip
    petiole("push", plugin, "anna/pets", "--replace-card")
    assert hub.repos["anna/pets"].fields["library_name"] == "petiole"


def test_errors_of_commands_are_one_line(petiole: Any, hub: Hub, plugin: Path, damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    cases = [
        (("push", damaged, "anna/pets"), "is damaged"),
        (("push", plugin, "pets"), "is called owner/name"),
        (("push", plugin, "bert/pets"), "you may not write to it"),
        (("pull", "anna/nothing"), "there is no such repository"),
        (("pull", "anna/pets", "--out", tmp_path / "there"), "exists already"),
    ]
    for arguments, message in cases:
        code, out, err = petiole(*arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("error: ")
        assert message in err
    hub.canned = {"HEAD .*": refusal(503)}
    code, out, err = petiole("pull", "anna/pets")
    assert (code, out, err.count("\n")) == (1, "", 1)


@pytest.mark.slow
def test_environment_names_the_hub_and_the_cache(hub: Hub, plugin: Path, tmp_path: Path) -> None:
    hub.add(is_private=True, plugin__safetensors=plugin.read_bytes())
    code = "from petiole.files.hub import pull; print(pull('anna/pets'))"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ANNA}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = Path(done.stdout.strip())
    assert found.is_relative_to(tmp_path / "home" / "hub")
    assert found.read_bytes() == plugin.read_bytes()
