"""The small real language model of the benchmarks, against the arithmetic it was trained with."""

import importlib.util
import itertools
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

# what its author's own program is documented to write
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily's mom said, \"Lily, let's go to the park.\""
)
TEXTS = (
    "what is the blue shape?",
    "how many yellow objects are in the left box?",
    'Lily said, "Timmy, they all want!"',
)


@pytest.fixture(scope="module")
def stories() -> types.ModuleType:
    """The benchmark's file as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / "stories.py"
    spec = importlib.util.spec_from_file_location("stories_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(stories: types.ModuleType, data: Path) -> Any:
    return stories.language_model(data)


@pytest.fixture(scope="module")
def tokenizer(stories: types.ModuleType, data: Path) -> Any:
    return stories.tokenizer(data)


def plain_logits(data: Path, ids: list[int]) -> NDArray[np.float64]:
    """A LLaMA whose rotary pairs are neighbours, written out in numpy `[L, 512]`."""
    arrays = dict(np.load(data / "weights" / "stories260K.npz"))
    w = {name: array.astype(np.float64) for name, array in arrays.items() if array.dtype == np.float32}
    num_heads, num_kv_heads, dim = 8, 4, 8
    places = np.arange(len(ids))
    turns = np.exp(1j * places[:, None] * 10000.0 ** (-np.arange(0, dim, 2) / dim))

    def norm(x: NDArray[Any], gain: NDArray[Any]) -> NDArray[Any]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    def turned(x: NDArray[Any]) -> NDArray[Any]:
        z = (x[:, 0::2] + 1j * x[:, 1::2]) * turns
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w["tok_embeddings"][ids]
    for i in range(5):
        h = norm(x, w["attention_norm"][i])
        q, k, v = ((h @ w[name][i].T).reshape(len(ids), -1, dim) for name in ("wq", "wk", "wv"))
        seen = []
        for head in range(num_heads):
            group = head * num_kv_heads // num_heads
            scores = turned(q[:, head]) @ turned(k[:, group]).T / np.sqrt(dim)
            shares = np.exp(np.where(places[:, None] >= places, scores, -np.inf))
            seen.append(shares / shares.sum(-1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(seen, -1) @ w["wo"][i].T
        h = norm(x, w["ffn_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["norm"]) @ w["tok_embeddings"].T


def plain_ids(data: Path, text: str) -> list[int]:
    """Byte-pair encoding: the pair of neighbours whose piece comes first is merged, the leftmost of equals."""
    pieces = json.loads((data / "weights" / "tok512.json").read_text(encoding="utf8"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = list(" " + text)
    while pairs := [(ids[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(found)) if a + b in ids]:
        _, i = min(pairs)
        found[i : i + 2] = [found[i] + found[i + 1]]
    return [1, *(ids[piece] for piece in found)]


def test_logits_are_those_of_the_arithmetic_it_was_trained_with(model: Any, data: Path) -> None:
    ids = torch.randint(0, 512, (40,), generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(plain_logits(data, ids.tolist()))
    with torch.no_grad():
        found = model(ids[None]).logits[0].double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # float32 against float64


def test_it_has_as_many_parameters_as_its_name_says(model: Any) -> None:
    assert model.num_parameters() == 260_032


def test_it_writes_the_documented_story(model: Any, tokenizer: Any) -> None:
    ids = model.generate(**tokenizer("", return_tensors="pt"), max_new_tokens=90, do_sample=False)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith(STORY)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_plain_byte_pair_encoding(tokenizer: Any, data: Path, text: str) -> None:
    assert tokenizer(text).input_ids == plain_ids(data, text)


@pytest.mark.parametrize("text", ["", *TEXTS, "  two  spaces ", "naïve 北京 😀\n\ttab \x00 …"])
def test_any_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_what_no_piece_covers_becomes_bytes(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("北").input_ids) == ["<s>", "▁", "<0xE5>", "<0x8C>", "<0x97>"]


@pytest.mark.slow
def test_folder_opens_as_any_other(
    stories: types.ModuleType,
    model: Any,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import transformers

    monkeypatch.setattr("sys.argv", ["stories.py", "--data", str(data), "--out", str(tmp_path)])
    stories.main()
    assert "260,032 parameters" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    assert [row[mask == 1].tolist() for row, mask in zip(*tokens.values(), strict=True)] == [
        plain_ids(data, text) for text in TEXTS
    ]
    with torch.no_grad():
        assert torch.equal(again(**tokens).logits, model(**tokens).logits)
