"""Code books, quantisation and packing against closed forms, autograd and the authors' tables."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.special import ndtr

from petiole.nn.codebook import levels
from petiole.nn.packing import look_up, pack, unpack
from petiole.nn.quantisation import decode, encode, quantise, statistics

GOLDEN = json.loads((Path(__file__).parent / "golden" / "codebooks.json").read_text())
# the authors' tables are float32
FLOAT32 = 2e-7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_reference_table_is_the_authors(bits: int) -> None:
    expected = torch.tensor(GOLDEN[str(bits)], dtype=torch.float64)
    torch.testing.assert_close(levels(bits, "reference"), expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_authors_tables_are_converged_up_to_four_bits(bits: int) -> None:
    expected = torch.tensor(GOLDEN[str(bits)], dtype=torch.float64)
    torch.testing.assert_close(levels(bits), expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_halves_the_probability_of_its_cell(bits: int) -> None:
    table = levels(bits)
    ends = torch.tensor([torch.inf], dtype=torch.float64)
    edges = ndtr(torch.cat([-ends, (table[1:] + table[:-1]) / 2, ends]))
    torch.testing.assert_close(ndtr(table) - edges[:-1], edges[1:] - ndtr(table), rtol=0, atol=1e-14)
    assert torch.equal(table, -table.flip(0))


def test_one_bit_is_the_quartile() -> None:
    assert levels(1).tolist() == pytest.approx([-0.6744897501960817, 0.6744897501960817], abs=1e-15)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.473222), (2, 0.265766), (4, 0.074548), (8, 0.004879)])
def test_mean_absolute_error_is_the_known_one(bits: int, error: float) -> None:
    z = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    table = levels(bits)
    nearest = table[torch.bucketize(z, (table[1:] + table[:-1]) / 2)]
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    assert torch.trapezoid((z - nearest).abs() * density, z).item() == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("bits", "table"), [(0, "converged"), (9, "converged"), (1, "lloyd")])
def test_unknown_table_is_refused(bits: int, table: str) -> None:
    with pytest.raises(ValueError, match=f"1 to 8 bits and is converged or reference, got {bits} bits and '{table}'"):
        levels(bits, table)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_gradient_is_autograds_with_the_code_passed_straight_through(bits: int) -> None:
    weight, cotangent, table = normal(5, 7).requires_grad_(), normal(5, 7, seed=1), levels(bits)
    mean, std = weight.mean(), weight.std()
    z = (weight - mean) / (std + 1e-5)
    nearest = (z.detach()[..., None] - table).abs().argmin(-1)
    expected = mean + std * (z + (table[nearest] - z).detach())
    found = quantise(weight, levels(bits))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    grads = [torch.autograd.grad(out, weight, cotangent)[0] for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)


def test_matrices_of_a_batch_are_quantised_each_by_itself() -> None:
    weights = torch.stack([normal(4, 6), 10 + 3 * normal(4, 6, seed=1)])
    torch.testing.assert_close(quantise(weights, levels(2)), torch.stack([quantise(w, levels(2)) for w in weights]))


@pytest.mark.parametrize("weight", [torch.full((3, 4), 2.0), torch.full((1, 1), 2.0)], ids=["constant", "one number"])
def test_constant_matrix_stays_what_it_is_and_has_a_finite_gradient(weight: Tensor) -> None:
    weight.requires_grad_()
    found = quantise(weight, levels(1))
    found.square().sum().backward()
    assert torch.equal(found, weight)
    assert torch.isfinite(weight.grad).all()


def test_quantising_what_is_quantised_by_the_same_statistics_changes_nothing() -> None:
    weight, table = normal(8, 9), levels(2)
    mean, std = statistics(weight)
    codes = encode(weight, mean, std, table)
    assert torch.equal(encode(decode(codes, mean, std, table), mean, std, table), codes)


@pytest.mark.parametrize("shape", [(13, 5), (1,), (0, 4), (3, 1, 7)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back_however_many(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert len(packed) == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, shape), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"), [([1, 0, 0, 0, 0, 0, 0, 0, 1], 1, [1, 1]), ([1, 2, 3], 2, [57])]
)
def test_the_first_code_is_in_the_lowest_bits(codes: list[int], bits: int, expected: list[int]) -> None:
    assert pack(torch.tensor(codes), bits).tolist() == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("sizes", [(13,), (16, 8), (3, 5, 5)])
def test_levels_of_packed_codes_are_those_of_the_table(bits: int, sizes: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, (sum(sizes),), generator=torch.Generator().manual_seed(0))
    table = normal(2**bits).float()
    found = list(look_up(pack(codes, bits), table, sizes))
    assert [len(part) for part in found] == [*sizes]
    assert torch.cat(found).tolist() == [table[code].item() for code in codes]


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="9 codes of 1 bits are 2 bytes, got 1"):
        unpack(torch.zeros(1, dtype=torch.uint8), 1, (3, 3))
