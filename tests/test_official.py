"""The authors' published 1-bit files: read and written against plain loops, byte for byte."""

import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import petiole as pt
from models import MODELS, WIDTH
from petiole.files.official import decode, encode, load_official, save_official
from petiole.nn.packing import unpack

DEPTH, CLASSES = 2, ["a", "b", "c"]
KINDS = ("adaptformer", "adaptformer-bihead", "lora", "lora-bihead")
# ascending, as tabulated; 1 bit is the normal distribution's upper quartile
POSITIVE = {
    1: [0.6744897501960817],
    2: [0.377754, 1.265720],
    4: [0.105550, 0.319036, 0.540072, 0.775192, 1.034006, 1.333107, 1.707738, 2.265491],
}
LEVELS = {bits: [-level for level in reversed(half)] + half for bits, half in POSITIVE.items()}
OFFICIAL = Path(os.environ.get("PETIOLE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "official_bin"
NUM_CLASSES = {"clevr_dist": 6, "kitti": 4, "patch_camelyon": 2}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

every_kind = pytest.mark.parametrize("kind", KINDS)
every_bits = pytest.mark.parametrize("bits", LEVELS)
needs_files = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="needs the authors' files, set PETIOLE_DATA")


# the format once more, number by number


def names(kind: str, depth: int) -> list[str]:
    """The matrices in the order of the file, without the head."""
    places = ["attn.q", "attn.v"] if kind.startswith("lora") else ["mlp"]
    return [f"blocks.{i}.{place}.{side}" for i in range(depth) for place in places for side in ("down", "up")]


def write_file(kind: str, dim: int, bits: int, num_classes: int = 3, seed: int = 0) -> tuple[bytes, dict[str, Any]]:
    """A file of random content, and every matrix of it as numbers in rows by its name."""
    draw, data, content = random.Random(seed), b"", {}

    def number() -> float:
        return struct.unpack("<f", struct.pack("<f", draw.gauss(0, 0.1)))[0]

    def matrix(rows: int, columns: int, bits: int) -> tuple[bytes, list[list[float]]]:
        codes = [draw.randrange(2**bits) for _ in range(rows * columns)]
        mean, std = number(), abs(number())
        packed = bytearray()
        for start in range(0, len(codes), 8 // bits):
            packed.append(sum(code << bits * i for i, code in enumerate(codes[start : start + 8 // bits])))
        values = [mean + std * LEVELS[bits][code] for code in codes]
        return bytes(packed) + struct.pack("<2f", mean, std), [
            values[row * columns : (row + 1) * columns] for row in range(rows)
        ]

    for name in names(kind, DEPTH):
        shape = (dim, WIDTH) if name.endswith("down") else (WIDTH, dim)
        part, content[name] = matrix(*shape, bits)
        data += part
    if kind.endswith("bihead"):
        part, content["head"] = matrix(num_classes, WIDTH, 1)
        return data + part, content
    content["head"] = [[number() for _ in range(WIDTH)] for _ in range(num_classes)]
    content["bias"] = [number() for _ in range(num_classes)]
    flat = [number for row in content["head"] for number in row] + content["bias"]
    return data + struct.pack(f"<{len(flat)}f", *flat), content


def matrix_of(model: pt.Adapted, name: str) -> Tensor:
    """A matrix of a model by the name it has in `names`."""
    plugin = model.plugins[0]
    site, _, side = name.rpartition(".")
    maps = getattr(plugin, side)
    return getattr(maps, "weight", maps)[plugin.index[site]].detach()


def head_of(model: pt.Adapted) -> Tensor:
    return model.head.weight.detach() if isinstance(model.head, nn.Linear) else model.head.weight[0].detach()


def write_to(folder: Path, data: bytes) -> Path:
    path = folder / "official.bin"
    path.write_bytes(data)
    return path


def vit() -> nn.Module:
    return MODELS["vit"]()


def loaded(folder: Path, kind: str, dim: int = 2, bits: int = 1, **settings: Any) -> pt.Adapted:
    data, _ = write_file(kind, dim, bits)
    return load_official(write_to(folder, data), vit(), method=kind, classes=CLASSES, bits=bits, **settings)


@torch.no_grad()
def trained(plugin: Any, head_bits: int = 1, backbone: nn.Module | None = None) -> pt.Adapted:
    """A model with latent weights that are random, as if trained."""
    model = pt.adapt(backbone or vit(), plugin, classes=CLASSES, head_bits=head_bits, prove=False).eval()
    for i, (_, parameter) in enumerate(model.trained()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.copy_(0.1 * noise + 0.01)
    return model


@every_kind
@every_bits
@pytest.mark.parametrize("dim", [1, 3])
def test_file_is_read_as_plain_loops_write_it(kind: str, bits: int, dim: int, tmp_path: Path) -> None:
    data, content = write_file(kind, dim, bits)
    model = load_official(write_to(tmp_path, data), vit(), method=kind, classes=CLASSES, bits=bits)
    # the tables of 2 and 4 bits are known to six digits
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if bits == 1 else {"rtol": 1e-5, "atol": 1e-6}
    for name in names(kind, DEPTH):
        torch.testing.assert_close(matrix_of(model, name), torch.tensor(content[name]), **tolerance)
    torch.testing.assert_close(head_of(model), torch.tensor(content["head"]), rtol=1e-6, atol=1e-7)
    assert not isinstance(model.head, nn.Linear) or model.head.bias.tolist() == content["bias"]


@every_kind
@every_bits
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_encoding_gives_back_what_was_decoded(kind: str, bits: int, dim: int) -> None:
    data, _ = write_file(kind, dim, bits)
    official = decode(data, kind, 3, width=WIDTH, depth=DEPTH, bits=bits)
    assert (official.dim, official.bits, official.head_bits) == (dim, bits, 1 if kind.endswith("bihead") else 32)
    assert encode(official) == data


@every_kind
@every_bits
def test_loaded_file_is_saved_byte_for_byte(kind: str, bits: int, tmp_path: Path) -> None:
    model = loaded(tmp_path, kind, bits=bits)
    num_bytes = save_official(model, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "official.bin").read_bytes()
    assert num_bytes == (tmp_path / "again.bin").stat().st_size


@every_kind
def test_plugin_file_keeps_a_loaded_file_byte_for_byte(kind: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, kind, scale=10.0)
    pt.save(model, tmp_path / "plugin.safetensors")
    again = pt.load(tmp_path / "plugin.safetensors", vit())
    assert torch.equal(again(IMAGES), model(IMAGES))
    save_official(again, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "official.bin").read_bytes()


def test_weights_do_not_shrink_however_often_they_are_loaded_and_saved(tmp_path: Path) -> None:
    model = loaded(tmp_path, "lora-bihead")
    first = [matrix_of(model, name) for name in names("lora", DEPTH)]
    for _ in range(3):
        save_official(model, tmp_path / "official.bin")
        model = load_official(tmp_path / "official.bin", vit(), method="lora-bihead", classes=CLASSES)
    assert all(torch.equal(matrix_of(model, n), w) for n, w in zip(names("lora", DEPTH), first, strict=True))


@every_bits
@pytest.mark.parametrize("head_bits", [1, 32])
@pytest.mark.parametrize("backbone", ["vit", "hf_vit"])
def test_model_that_was_trained_here_answers_the_same_when_loaded(
    backbone: str, head_bits: int, bits: int, tmp_path: Path
) -> None:
    end = "-bihead" if head_bits == 1 else ""
    plugins = {
        "adaptformer": pt.AdaptFormer(dim=2, bias=False, bits=bits, scale=0.5),
        "lora": pt.LoRA(rank=2, roles=("v", "q"), bits=bits, scale=0.5),
    }
    for method, plugin in plugins.items():
        model = trained(plugin, head_bits, MODELS[backbone]())
        save_official(model, tmp_path / "a.bin")
        again = load_official(
            tmp_path / "a.bin", MODELS[backbone](), method=f"{method}{end}", classes=CLASSES, scale=0.5, bits=bits
        )
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_scale_and_classes_are_the_callers_and_the_model_rests(tmp_path: Path) -> None:
    backbone = vit().train()
    data, _ = write_file("adaptformer", 2, 1)
    model = load_official(write_to(tmp_path, data), backbone, method="adaptformer", classes=["x", "y", "z"], scale=10.0)
    assert (model.plugins[0].scale, model.plugins[0].bias, model.classes) == (10.0, False, ("x", "y", "z"))
    assert (model.training, backbone.training, model.holds_codes) == (False, True, True)


def test_proof_of_the_walk_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[nn.Module] = []
    monkeypatch.setattr("petiole.files.official.prove_view", lambda view, backbone: proved.append(backbone))
    loaded(tmp_path, "lora", prove=False)
    assert not proved
    loaded(tmp_path, "lora")
    assert len(proved) == 1


def test_scale_is_the_factor_of_what_is_added(tmp_path: Path) -> None:
    whole, none = (loaded(tmp_path, "lora", scale=scale) for scale in (1.0, 0.0))
    alone = pt.adapt(vit(), pt.Linear(), classes=CLASSES).eval()
    alone.head.load_state_dict(none.head.state_dict())
    torch.testing.assert_close(none(IMAGES), alone(IMAGES))
    assert not torch.allclose(whole(IMAGES), alone(IMAGES), atol=1e-3)


def test_images_are_prepared_as_the_authors_do(tmp_path: Path) -> None:
    model = loaded(tmp_path, "lora")
    _, recipe = pt.recipe("bi-lora-paper", "kitti")
    own = model.view.input_config(model.backbone)
    assert model.input_config == own | recipe.input_config(own)


def test_double_precision_backbone_keeps_the_bytes(tmp_path: Path) -> None:
    data, _ = write_file("adaptformer", 3, 2)
    model = load_official(write_to(tmp_path, data), vit().double(), method="adaptformer", classes=CLASSES, bits=2)
    save_official(model, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == data


# the authors' own files


def official_files() -> list[Path]:
    return sorted(OFFICIAL.glob("*.bin"))


def parts_of(path: Path) -> tuple[str, int, int]:
    """Kind, number of classes and dim, from the name `<kind>--<task>-bit1-dim<dim>.bin`."""
    kind, rest = path.stem.split("--")
    task, _, dim = rest.split("-")
    return kind, NUM_CLASSES[task], int(dim.removeprefix("dim"))


@needs_files
def test_all_24_files_of_the_authors_are_there() -> None:
    assert len(official_files()) == 24


@needs_files
@pytest.mark.parametrize("path", official_files(), ids=lambda path: path.stem)
def test_file_of_the_authors_is_decoded_and_encoded_byte_for_byte(path: Path) -> None:
    kind, num_classes, dim = parts_of(path)
    official = decode(path.read_bytes(), kind, num_classes)
    assert (official.method, official.dim) == (kind.removesuffix("-bihead"), dim)
    assert official.head[0].numel() == 768 * num_classes // (8 if official.head_bits == 1 else 1)
    assert encode(official) == path.read_bytes()


@needs_files
def test_numbers_of_a_file_of_the_authors_are_those_of_plain_loops() -> None:
    data = (OFFICIAL / "lora-bihead--kitti-bit1-dim1.bin").read_bytes()
    official = decode(data, "lora-bihead", 4)
    pairs = {"down": official.down, "up": official.up}
    for i in range(48):
        codes, (mean, std) = data[i * 104 : i * 104 + 96], struct.unpack_from("<2f", data, i * 104 + 96)
        found, statistics = pairs["up" if i % 2 else "down"]
        assert statistics[i // 2].tolist() == [mean, std]
        numbers = unpack(found[i // 2 * 96 : (i // 2 + 1) * 96], 1, (768,))
        assert numbers.tolist() == [codes[j // 8] >> j % 8 & 1 for j in range(768)]
    assert len(data) - 48 * 104 == 768 * 4 // 8 + 8


@pytest.fixture(scope="module")
def vit_b16() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", pretrained=False).eval()


@needs_files
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaptformer-bihead", "lora"])
def test_file_of_the_authors_goes_through_a_plugin_file_byte_for_byte(
    kind: str, vit_b16: nn.Module, tmp_path: Path
) -> None:
    path, classes = OFFICIAL / f"{kind}--kitti-bit1-dim32.bin", ["1", "2", "3", "4"]
    model = load_official(path, vit_b16, method=kind, classes=classes)
    pt.save(model, tmp_path / "plugin.safetensors")
    save_official(pt.load(tmp_path / "plugin.safetensors", vit_b16), tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


# what is refused


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            lambda data: data,
            {"method": "adaptfomer"},
            r"no official file is of 'adaptfomer' \(did you mean 'adaptformer'\?\): choose adaptformer, ",
        ),
        (lambda data: data, {"num_classes": 0}, "the file needs classes, width and depth, got 0, 32 and 2"),
        (
            lambda data: data[:-1],
            {},
            "the file has 67 bytes, but adaptformer-bihead of 1 bit with 3 classes on width 32 and depth 2 has 68 "
            "bytes at dim 1 and 84 bytes at dim 2: check method, classes, bits and backbone$",
        ),
        (lambda data: b"", {}, "the file has 0 bytes, but adaptformer-bihead of 1 bit with 3 classes .* has 68 bytes"),
        (
            lambda data: data,
            {"num_classes": 5},
            "the file has 68 bytes, but adaptformer-bihead of 1 bit with 5 classes on width 32 and depth 2 has 76 "
            "bytes at dim 1 and 92 bytes at dim 2: .*; adaptformer-bihead of 1 bit with 3 classes on width 32 and "
            "depth 2 at dim 1 is as long",
        ),
        (
            lambda data: data,
            {"method": "lora-bihead"},
            "; adaptformer-bihead of 1 bit with 3 classes on width 32 and depth 2 at dim 1 is as long",
        ),
        (
            lambda data: data[:4] + struct.pack("<f", math.nan) + data[8:],
            {},
            "the file, read as adaptformer-bihead of 1 bit with 3 classes on width 32 and depth 2 at dim 1, has the "
            "mean nan and the deviation .* in matrix 0 of down: check",
        ),
        (
            lambda data: data[:20] + struct.pack("<f", -1) + data[24:],
            {},
            "the deviation -1 in matrix 0 of up: check",
        ),
        (lambda data: data[:-4] + struct.pack("<f", math.inf), {}, "the deviation inf in matrix 0 of head: check"),
        (lambda data: data, {"bits": 8}, "1, 2 or 4 bits per weight here, not 8: the original code has a table of 256"),
        (lambda data: data, {"bits": 32}, "not 32: the original code writes the head alone then"),
        (lambda data: data, {"bits": 3}, "not 3: the original code packs whole numbers of codes into a byte"),
    ],
)
def test_bytes_that_are_no_such_file_are_refused(
    change: Callable[[bytes], bytes], settings: dict[str, Any], message: str
) -> None:
    data, _ = write_file("adaptformer-bihead", 1, 1)
    asked = {"method": "adaptformer-bihead", "num_classes": 3, "width": WIDTH, "depth": DEPTH, **settings}
    with pytest.raises(pt.PluginFileError, match=message):
        decode(change(data), **asked)


def test_head_that_is_not_finite_is_refused() -> None:
    data, _ = write_file("lora", 1, 1)
    with pytest.raises(pt.PluginFileError, match="has numbers in the head that are not finite"):
        decode(data[:-4] + struct.pack("<f", math.nan), "lora", 3, width=WIDTH, depth=DEPTH)


def test_class_count_that_the_length_allows_is_refused_by_its_deviations() -> None:
    # 24 matrices of a dim are as long as 24 classes of a head
    draw = random.Random(0)
    data = b"".join(draw.randbytes(96 * num) + struct.pack("<2f", 0, 0.1) for num in [32] * 24 + [4])
    assert decode(data, "adaptformer-bihead", 4).dim == 32
    with pytest.raises(pt.PluginFileError, match="with 4 classes on width 768 and depth 12 at dim 32 is as long"):
        decode(data, "adaptformer-bihead", 28)


def test_matrices_that_fill_no_whole_bytes_are_refused() -> None:
    # a byte and the statistics for each of 2 matrices [3, 3], then a head: the ninth number would be lost
    lost = "a matrix of 9 numbers has 9 bits, which fill no whole bytes, .* never writes the last 1: choose another dim"
    with pytest.raises(pt.PluginFileError, match=lost):
        decode(bytes(2 * (1 + 8) + 4 * 4 * 2), "adaptformer", 2, width=3, depth=1)
    with pytest.raises(pt.PluginFileError, match="a matrix of 12 numbers has 12 bits"):
        decode(bytes(2 * (4 + 8) + 1 + 8), "adaptformer-bihead", 3, width=4, depth=1, bits=4)


def tiny(**settings: Any) -> nn.Module:
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **settings})


@pytest.mark.parametrize(
    ("backbone", "method", "error", "message"),
    [
        (tiny, "lora-bi", pt.PluginFileError, "no official file is of 'lora-bi' .*'lora-bihead'"),
        (
            lambda: tiny(embed_dim=48), "lora", pt.PluginFileError,
            "has 492 bytes, but lora of 1 bit with 3 classes on width 48 and depth 2 has 700 bytes at dim 1",
        ),
        (lambda: tiny(depth=3), "lora", pt.PluginFileError, "has 492 bytes, but lora .* on width 32 and depth 3 has"),
        (
            lambda: vit().bfloat16(), "lora", pt.PluginFileError,
            "official.bin holds float32, the backbone is torch.bfloat16: convert it after loading, not before",
        ),
        (
            MODELS["swin"], "adaptformer", pt.PluginFileError,
            "holds mlp in each block, of the width 32 that the head sees; this backbone has .*mlp, 16 to 16: choose a",
        ),
        (nn.Identity, "lora", pt.BackboneError, "Identity"),
    ],
)  # fmt: skip
def test_backbones_that_a_file_does_not_fit_are_refused(
    backbone: Callable[[], nn.Module], method: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = write_to(tmp_path, write_file("lora", 1, 1)[0])
    with pytest.raises(error, match=message):
        load_official(path, backbone(), method=method, classes=CLASSES)


def test_backbone_that_is_not_the_authors_is_told_apart_by_width_and_depth(tmp_path: Path) -> None:
    path = write_to(tmp_path, bytes(24 * (96 * 32 + 8) + 96 * 3 + 8))
    message = "on width 32 and depth 2 has .*; adaptformer-bihead .* on width 768 and depth 12 at dim 32 is as long"
    with pytest.raises(pt.PluginFileError, match=message):
        load_official(path, vit(), method="adaptformer-bihead", classes=CLASSES)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pt.PluginFileError, match="cannot be read: No such file"):
        load_official(tmp_path / "none.bin", vit(), method="lora", classes=CLASSES)


def narrow() -> nn.Module:
    return tiny(embed_dim=12, depth=1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (vit, "save_official takes what petiole.adapt returned, got VisionTransformer"),
        (lambda: trained(pt.FacT(bits=1)), "holds one plugin, AdaptFormer or LoRA, the model has FacT: petiole.save"),
        (
            lambda: pt.adapt(vit(), pt.LoRA(bits=1), pt.LoRA(bits=1), classes=CLASSES, prove=False),
            "holds one plugin, AdaptFormer or LoRA, the model has LoRA, LoRA: petiole.save",
        ),
        (lambda: trained(pt.AdaptFormer(bits=1)), r"holds no biases: train with AdaptFormer\(bias=False\)"),
        (lambda: trained(pt.LoRA(roles=("q", "k", "v"), bits=1)), "holds LoRA on q and v, not on q, k, v"),
        (lambda: trained(pt.LoRA()), "1, 2 or 4 bits per weight here, not 32: .* the head alone"),
        (lambda: trained(pt.LoRA(bits=8)), "1, 2 or 4 bits per weight here, not 8: .* a table of 256 levels"),
        (lambda: trained(pt.LoRA(bits=1), head_bits=4), "a head of 1 or 32 bits, the model has one of 4 bits"),
        (
            lambda: pt.adapt(vit(), pt.LoRA(bits=1), prove=False),
            "a head of 1 or 32 bits, the model has the backbone's own classifier",
        ),
        (
            lambda: trained(pt.LoRA(bits=1), backbone=MODELS["open_clip"]()),
            "q and v in each block, of the width 24 that the head sees; this backbone has .*q, 32 to 32",
        ),
        (
            lambda: trained(pt.LoRA(rank=1, bits=1), head_bits=32, backbone=narrow()),
            "a matrix of 12 numbers has 12 bits, which fill no whole bytes, .* never writes the last 4: choose another",
        ),
        (lambda: trained(pt.LoRA(rank=2, bits=1), backbone=narrow()), "a matrix of 36 numbers has 36 bits"),
    ],
)
def test_models_that_the_format_cannot_hold_are_refused(
    model: Callable[[], pt.Adapted], message: str, tmp_path: Path
) -> None:
    with pytest.raises(pt.PluginFileError, match=message):
        save_official(model(), tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["plugins.0.up.0", "head.bias"])
def test_model_that_is_not_finite_is_refused(part: str, tmp_path: Path) -> None:
    model = trained(pt.LoRA(rank=2, bits=1), head_bits=32)
    with torch.no_grad():
        model.get_parameter(part).fill_(math.nan)
    with pytest.raises(pt.PluginFileError, match=r"cannot hold .* nan|cannot hold .* not finite"):
        save_official(model, tmp_path / "a.bin")
