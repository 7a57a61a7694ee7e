"""Pure functions against plain loops."""

import pytest
import torch

from petiole.nn.blocks import expand, num_blocks, tile
from petiole.nn.convolution import convolve
from petiole.nn.product import add_product


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_num_blocks_counts_a_narrow_last_block() -> None:
    assert [num_blocks(dim, 4) for dim in (1, 4, 5, 8)] == [1, 1, 2, 2]


def test_tile_puts_each_block_in_its_place() -> None:
    blocks = random(6, 2, 2)
    matrix = tile(blocks, 3, 2)
    for i in range(3):
        for j in range(2):
            assert torch.equal(matrix[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], blocks[2 * i + j])


def test_expand_equals_a_loop_over_blocks() -> None:
    blocks, u, v = random(6, 2, 2), random(2, 5, seed=1), random(5, 2, seed=2)
    dense = expand(tile(blocks, 3, 2), u, v)
    assert dense.shape == (10, 15)
    for i in range(3):
        for j in range(2):
            # row convention y = x W: the change of block (i, j) is u^T S v^T, and a weight is its transpose
            expected = (u.T @ blocks[2 * i + j] @ v.T).T
            torch.testing.assert_close(dense[5 * j : 5 * j + 5, 5 * i : 5 * i + 5], expected)


@pytest.mark.parametrize("blocks", [1, 3])
def test_add_product_equals_the_sum_with_its_gradients(blocks: int) -> None:
    w, x = random(6 * blocks, 4).requires_grad_(), random(2, 5, 4, seed=1).requires_grad_()
    code, up = random(2, 5 * blocks, 3, seed=2).requires_grad_(), random(6, 3, seed=3).requires_grad_()
    found = add_product(x @ w.T, code, up)
    expected = x @ w.T + (code @ up.T).reshape(2, 5, 6 * blocks)
    torch.testing.assert_close(found, expected)
    weights = random(*expected.shape, seed=4)
    inputs = (w, x, code, up)
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("is_written_into", [True, False])
def test_add_product_to_some_columns_leaves_the_others(is_written_into: bool) -> None:
    w, x = random(12, 4).requires_grad_(), random(2, 5, 4, seed=1).requires_grad_()
    code, up = random(2, 5, 3, seed=2).requires_grad_(), random(4, 3, seed=3).requires_grad_()
    y = x @ w.T
    found = add_product(y if is_written_into else y.view_as(y), code, up, 8)
    expected = x @ w.T + torch.cat([torch.zeros(2, 5, 8, dtype=torch.float64), code @ up.T], dim=-1)
    torch.testing.assert_close(found, expected)
    weights, inputs = random(2, 5, 12, seed=4), (w, x, code, up)
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_add_product_leaves_a_view_as_it_was() -> None:
    base = random(2, 5, 12)
    part = base[..., :6]
    before = base.clone()
    add_product(part, random(2, 5, 3), random(6, 3))
    assert torch.equal(base, before)


def test_add_product_takes_one_matrix_per_row() -> None:
    y, code, ups = random(2, 5, 6), random(2, 5, 3, seed=1), random(2, 6, 3, seed=2)
    expected = torch.stack([y[i] + code[i] @ ups[i].T for i in range(2)])
    torch.testing.assert_close(add_product(y, code, ups), expected)


def test_add_product_is_differentiated_by_torch_func() -> None:
    w, x, code, up = random(6, 4), random(2, 5, 4, seed=1), random(2, 5, 3, seed=2), random(6, 3, seed=3)
    found = torch.func.grad(lambda up: add_product(x @ w.T, code, up).square().sum())(up)
    expected = torch.func.grad(lambda up: (x @ w.T + code @ up.T).square().sum())(up)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolve_equals_a_loop_over_the_grid(size: int) -> None:
    x, kernels, biases = random(2, 2 + 6, 3), random(2, 4, 3, size, size, seed=1), random(2, 4, seed=2)
    middle = size // 2
    # one kernel per row of the batch; a prefix token sees the centre alone
    expected = x[..., :1] * 0 + biases[:, None]
    for b in range(2):
        for t in range(2):
            expected[b, t] += kernels[b, :, :, middle, middle] @ x[b, t]
        for row in range(2):
            for column in range(3):
                for i in range(2):
                    for j in range(3):
                        down, right = i - row + middle, j - column + middle
                        if 0 <= down < size and 0 <= right < size:
                            expected[b, 2 + row * 3 + column] += kernels[b, :, :, down, right] @ x[b, 2 + i * 3 + j]
    torch.testing.assert_close(convolve(x, 2, (2, 3), kernels, biases), expected)
    for b in range(2):
        torch.testing.assert_close(convolve(x[b : b + 1], 2, (2, 3), kernels[b], biases[b])[0], expected[b])


def test_convolve_takes_a_grid_without_prefix_tokens() -> None:
    x, kernel, bias = random(2, 6, 3), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    with_prefix = convolve(torch.cat([x[:, :1], x], dim=1), 1, (2, 3), kernel, bias)
    torch.testing.assert_close(convolve(x, 0, (2, 3), kernel, bias), with_prefix[:, 1:])
