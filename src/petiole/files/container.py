"""The plugin file as bytes: safetensors whose header also carries JSON and a checksum over every other byte.

    8 bytes     length of the header
    header      {"__metadata__":{"format":"pt","petiole.sha256":"<64 hex digits>","petiole":"<JSON>"},<tensors>}
    tensors     widest dtype first, then by name, without gaps

Any safetensors reader opens it. The bytes depend on the content alone: safetensors' own writer orders the metadata
differently in every process, so the header is written here; the tensors are read by safetensors.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from ..core.fingerprint import raw_bytes
from ..errors import PluginFileError

Bytes = bytes | memoryview

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# The first bytes of every header: the checksum lies at one fixed place, so it can be told apart without parsing.
_START = b'{"__metadata__":{"format":"pt","petiole.sha256":"'
_SUM = slice(8 + len(_START), 8 + len(_START) + 64)
_MAX_HEADER = 64 * 2**20
# How files that are something else begin.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, perhaps of torch.save, which petiole never opens because it can hold a pickle",
    **{bytes([0x80, n]): "a pickle, which petiole never opens because it can run code" for n in range(6)},
    b"\x1f\x8b": "a gzip archive",
    b"<": "an HTML or XML page, perhaps of a download that failed",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"{": "JSON text",
}


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> int:
    """Writes a plugin file atomically and returns its size [bytes].

    Equal content gives equal bytes, in every process.

    Args:
        path: Where to; an old file stays until the new one is whole.
        tensors: Any device and layout; empty is allowed.
        info: What JSON can say, without NaN.

    Raises:
        PluginFileError: `info` is no JSON, a dtype has no place in the file, or the file cannot be written.
    """
    chunks = _encode(tensors, info, os.fspath(path))
    atomic_write(path, *chunks)
    return sum(memoryview(chunk).nbytes for chunk in chunks)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and info of a plugin file, on the CPU; reads it once and executes nothing.

    Raises:
        PluginFileError: The file cannot be read, or is damaged or foreign in any byte; says which.
    """
    return parse(read_bytes(path), os.fspath(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the bytes of a regular file.

    Raises:
        PluginFileError: There is none, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PluginFileError(f"{os.fspath(path)} is no file but a folder or device: give the path of a file")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise PluginFileError(f"{os.fspath(path)} cannot be read: {one_line(error)}") from error


def parse(data: bytes, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and info from the bytes of a plugin file.

    Args:
        data: The whole file.
        where: What messages call it.

    Raises:
        PluginFileError: The bytes are not exactly those of a plugin file; says what they are, or what is damaged.
    """
    size = _header_size(data, where)
    try:
        header = _json(data[8 : 8 + size])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        total = 8 + size + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        text = header["__metadata__"]["petiole"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        _damaged(where, f"its header cannot be read ({type(error).__name__})", error)
    if len(data) < total:
        raise PluginFileError(f"{where} is truncated: its header announces {total} bytes, it has {len(data)}{_AGAIN}")
    if len(data) > total:
        raise PluginFileError(f"{where} is too long: its header announces {total} bytes, it has {len(data)}{_AGAIN}")
    if (found := _checksum([data])) != (wanted := data[_SUM]):
        _damaged(where, f"the checksum of its bytes is {found[:12]!r}, its header says {wanted[:12]!r}")
    try:
        # safetensors returns them in another order in every process
        return dict(sorted(load_tensors(data).items())), _json(text)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError, OverflowError) as error:
        _damaged(where, f"its content is malformed ({one_line(error)})", error)


def atomic_write(path: str | os.PathLike[str], *chunks: Bytes) -> None:
    """Writes a file so that, whenever the process or machine dies, either the old or the whole new content is there.

    Writes beside the target, syncs, and renames; a link is followed to the file it names.

    Args:
        path: Where to; its folder must exist.
        chunks: The content, in order.

    Raises:
        PluginFileError: It cannot be written; says why. The old file is then intact and nothing is left beside it.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise PluginFileError(f"{os.fspath(path)} is no file but a folder or device: give the path of a file")
        temporary = target.with_name(f".petiole-{secrets.token_hex(6)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:
        raise PluginFileError(f"{os.fspath(path)} cannot be written: {one_line(error)}") from error


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder, and say so
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _encode(tensors: Mapping[str, Tensor], info: Mapping[str, Any], where: str) -> list[Bytes]:
    """Returns the file in pieces: length and header, then the tensors."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries, offset = {}, 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise PluginFileError(f"{where}: the tensor {name} is {tensor.dtype}; a plugin file holds {known}")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = _dump(_dump(dict(info), sort_keys=True))
        rest = _dump(entries)[1:] if entries else "}"
        tail = f'","petiole":{text}}}{"," if entries else ""}{rest}'.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PluginFileError(f"{where}: the metadata cannot be written as JSON: {one_line(error)}") from error
    # the tensors start at a multiple of 8, so that readers can map them
    header = (_START + b"0" * 64 + tail).ljust((len(_START) + 64 + len(tail) + 7) // 8 * 8)
    head = len(header).to_bytes(8, "little") + header
    chunks: list[Bytes] = [head, *(raw_bytes(tensors[name]) for name in names)]
    chunks[0] = head[: _SUM.start] + _checksum(chunks) + head[_SUM.stop :]
    return chunks


def _checksum(chunks: list[Bytes]) -> bytes:
    """Returns the hash of a file given in pieces, of which the first holds the checksum, as 64 hex digits."""
    first, *others = (memoryview(chunk) for chunk in chunks)
    state = hashlib.sha256(first[: _SUM.start])
    for piece in (first[_SUM.stop :], *others):
        state.update(piece)
    return state.hexdigest().encode()


def _header_size(data: bytes, where: str) -> int:
    """Returns the length of the header of something that begins as a plugin file does.

    Raises:
        PluginFileError: It does not; says what it looks like.
    """
    if not data:
        raise PluginFileError(f"{where} is empty: 0 bytes{_AGAIN}")
    size, start = int.from_bytes(data[:8], "little"), data[8 : 8 + len(_START)]
    if start == _START:
        if size > _MAX_HEADER:
            _damaged(where, f"its header claims {size} bytes")
        if 8 + size > len(data):
            raise PluginFileError(f"{where} is truncated: the header alone needs {8 + size} bytes, it has {len(data)}")
        if 8 + size < _SUM.stop:
            _damaged(where, f"its header claims {size} bytes")
        return size
    if len(data) >= 8 and _START.startswith(start):
        raise PluginFileError(f"{where} is truncated: it ends after {len(data)} bytes, in its header{_AGAIN}")
    if start[:1] == b"{" and 8 + size <= len(data):
        raise PluginFileError(
            f"{where} is a safetensors file, but no intact plugin file: looked for the metadata `petiole.sha256`. "
            "Give a file written by petiole.save"
        )
    text = data[:256].lstrip()
    for magic, kind in _FOREIGN.items():
        if text.startswith(magic):
            raise PluginFileError(f"{where} is no plugin file but {kind}")
    raise PluginFileError(
        f"{where} is no plugin file: it starts with {data[:8]!r}. Give a file written by petiole.save"
    )


_AGAIN = ". Copy or download it again"


def _damaged(where: str, what: str, error: Exception | None = None) -> NoReturn:
    raise PluginFileError(f"{where} is damaged: {what}{_AGAIN}") from error


def _dump(value: object, sort_keys: bool = False) -> str:
    return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _json(text: str | bytes) -> dict[str, Any]:
    """Returns a JSON object in which no key comes twice and every number is finite."""
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no finite number")
    return number


def one_line(error: BaseException) -> str:
    """Returns an error's text in one line, for another error's message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
