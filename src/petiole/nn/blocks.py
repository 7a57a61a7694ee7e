"""Matrices cut into blocks of one width, the last block of a row or column as narrow as what is left."""

from torch import Tensor


def num_blocks(dim: int, width: int) -> int:
    """Returns how many blocks of a width cover `dim` entries."""
    return -(-dim // width)


def tile(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Returns blocks `[..., rows * columns, r, r]`, row by row, as one matrix `[..., rows * r, columns * r]`."""
    return blocks.unflatten(-3, (rows, columns)).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def untile(matrix: Tensor, rank: int) -> Tensor:
    """Returns the blocks `[rows * columns, r, r]`, row by row, that `tile` made one matrix of."""
    return matrix.unflatten(0, (-1, rank)).unflatten(-1, (-1, rank)).transpose(1, 2).flatten(0, 1)


def expand(cores: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Returns the matrix whose block (i, j) is `v cores[j, i]^T u`, for tiled cores.

    Args:
        cores: Tiled cores `[rows * r, columns * r]`.
        u: Input factor `[r, width]`.
        v: Output factor `[width, r]`.

    Returns:
        Matrix `[columns * width, rows * width]`: transposed, as weights of linear maps are.
    """
    r = len(u)
    blocks = cores.unflatten(0, (-1, r)).unflatten(-1, (-1, r)).permute(2, 0, 3, 1)
    return (v @ blocks @ u).transpose(1, 2).flatten(2).flatten(0, 1)
