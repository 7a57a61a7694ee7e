"""The bytes of a plugin file: every damage is noticed, nothing is executed, no crash leaves half a file."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import petiole as pt
from petiole.files import container


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plugin.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "x"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}
    container.write(path, tensors, {"schema_version": 1, "name": "é\u0001", "list": [1.5, None]})
    return path.read_bytes()


class TestBytes:
    @pytest.mark.parametrize("mask", [*(1 << bit for bit in range(8)), 0xFF])
    def test_every_flip_at_every_byte_is_noticed(self, small: bytes, mask: int) -> None:
        for i in range(len(small)):
            with pytest.raises(pt.PluginFileError):
                container.parse(small[:i] + bytes([small[i] ^ mask]) + small[i + 1 :], "x")

    def test_every_truncation_is_noticed_and_named(self, small: bytes) -> None:
        for stop in range(8, len(small)):
            with pytest.raises(pt.PluginFileError, match="x is truncated"):
                container.parse(small[:stop], "x")

    def test_short_and_long_files_are_named(self, small: bytes) -> None:
        for stop in range(8):
            with pytest.raises(pt.PluginFileError, match=r"x is (empty|no plugin file)"):
                container.parse(small[:stop], "x")
        with pytest.raises(pt.PluginFileError, match="x is too long: its header announces"):
            container.parse(small + b"\0", "x")

    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"", "is empty: 0 bytes"),
            (b"PK\x03\x04" + b"x" * 90, "is no plugin file but a zip archive"),
            (pickle.dumps({"a": 1}), "is no plugin file but a pickle"),
            (pickle.dumps({"a": 1}, protocol=2), "is no plugin file but a pickle"),
            (b"\n <!DOCTYPE html><html>", "is no plugin file but an HTML"),
            (b"version https://git-lfs.github.com/spec/v1", "is no plugin file but a Git LFS pointer"),
            (b'{"weights": 1}', "is no plugin file but JSON text"),
            (b"hello world, hello", "is no plugin file: it starts with b'hello wo'"),
            (b"\xff" * 100, "is no plugin file: it starts with"),
            (safetensors.torch.save({"a": torch.zeros(2)}), "is a safetensors file, but no intact plugin file"),
        ],
    )
    def test_foreign_files_are_named(self, path: Path, data: bytes, expected: str) -> None:
        path.write_bytes(data)
        with pytest.raises(pt.PluginFileError, match=re.escape(f"{path} {expected}")):
            container.read(path)

    def test_an_endless_header_is_refused(self, small: bytes) -> None:
        with pytest.raises(pt.PluginFileError, match="is damaged: its header claims"):
            container.parse((2**60).to_bytes(8, "little") + small[8:], "x")

    @pytest.mark.parametrize("kind", ["pickle", "torch"])
    def test_no_pickle_is_executed(self, path: Path, kind: str) -> None:
        witness = path.with_name("witness")

        class Malicious:
            def __reduce__(self) -> tuple[Any, ...]:
                return open, (str(witness), "w")

        if kind == "pickle":
            path.write_bytes(pickle.dumps(Malicious()))
        else:
            torch.save(Malicious(), path)
        with pytest.raises(pt.PluginFileError, match="never opens because it can"):
            container.read(path)
        assert not witness.exists()

    @pytest.mark.parametrize("dtype", list(container._DTYPES))
    def test_every_dtype_and_layout_comes_back(self, path: Path, dtype: torch.dtype) -> None:
        tensors = {
            "scalar": torch.tensor(1).to(dtype),
            "empty": torch.zeros(0, 3).to(dtype),
            "transposed": torch.arange(6).reshape(2, 3).T.to(dtype),
            "odd": torch.ones(3, dtype=torch.uint8),
        }
        container.write(path, tensors, {})
        found, _ = container.read(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())

    def test_no_tensor_at_all_is_a_file(self, path: Path) -> None:
        container.write(path, {}, {"a": 1})
        assert container.read(path) == ({}, {"a": 1})

    def test_a_dtype_without_a_place_is_named(self, path: Path) -> None:
        with pytest.raises(pt.PluginFileError, match=r"the tensor a is torch.complex64"):
            container.write(path, {"a": torch.zeros(2, dtype=torch.complex64)}, {})


class TestAtomicWrite:
    @pytest.mark.parametrize("step", ["fsync", "replace"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_old_file_and_nothing_else(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
    ) -> None:
        path.write_bytes(b"old")

        def fail(*args: object) -> None:
            raise error

        monkeypatch.setattr(os, step, fail)
        with pytest.raises((pt.PluginFileError, KeyboardInterrupt)):
            container.atomic_write(path, b"new")
        assert path.read_bytes() == b"old"
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.slow
    def test_a_kill_in_the_middle_leaves_the_old_file(self, path: Path) -> None:
        path.write_bytes(b"old")
        code = (
            "import os, signal, sys; from petiole.files.container import atomic_write; "
            "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL); atomic_write(sys.argv[1], b'new' * 1000)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=120, check=False)
        assert done.returncode == -9
        assert path.read_bytes() == b"old"
        assert all(name == path.name or name.startswith(".petiole-") for name in os.listdir(path.parent))

    def test_file_and_folder_are_synced_around_the_rename(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        steps: list[str] = []
        sync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), sync(fd)))
        monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), replace(a, b)))
        container.atomic_write(path, b"new", memoryview(b"er"))
        assert steps == ["fsync", "replace", "fsync"]
        assert path.read_bytes() == b"newer"

    def test_the_reason_is_given(self, tmp_path: Path) -> None:
        with pytest.raises(pt.PluginFileError, match=r"nowhere/x cannot be written: No such file or directory"):
            container.atomic_write(tmp_path / "nowhere" / "x", b"")
        with pytest.raises(pt.PluginFileError, match="is no file but a folder or device"):
            container.atomic_write(tmp_path, b"")
        with pytest.raises(pt.PluginFileError, match="x cannot be read: No such file or directory"):
            container.read(tmp_path / "x")
        with pytest.raises(pt.PluginFileError, match="is no file but a folder or device"):
            container.read(tmp_path)

    def test_a_folder_without_permission_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object, **settings: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(pt.PluginFileError, match="x cannot be written: Permission denied"):
            container.atomic_write(tmp_path / "x", b"")

    def test_a_link_is_followed(self, path: Path) -> None:
        link = path.with_name("link")
        path.write_bytes(b"old")
        link.symlink_to(path)
        container.atomic_write(link, b"new")
        assert link.is_symlink()
        assert path.read_bytes() == b"new"
