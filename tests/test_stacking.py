"""Lists of equal tensors are kept as one and come back as they were."""

import torch

from petiole.files.stacking import stack, unstack

EQUAL = {f"a.down.{i}": torch.full((2, 3), float(i)) for i in range(12)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_equal_tensors_become_one_in_the_order_of_their_numbers() -> None:
    packed = stack(EQUAL)
    assert packed.keys() == {"a.down.*"}
    assert packed["a.down.*"][:, 0, 0].tolist() == list(range(12))


def test_round_trip_restores_every_name() -> None:
    mixed = {
        **EQUAL,
        "head.weight": torch.ones(4, 4),
        "a.up.0": torch.ones(2),
        "a.up.1": torch.ones(3),
        "b.0": torch.ones(1),
    }
    assert same(unstack(stack(mixed)), mixed)


def test_the_number_may_stand_in_the_middle_and_the_last_one_counts() -> None:
    stages = {f"layers.{s}.blocks.{i}.norm.bias": torch.full((2,), s + i / 10) for s in range(2) for i in range(3)}
    packed = stack(stages)
    assert packed.keys() == {"layers.0.blocks.*.norm.bias", "layers.1.blocks.*.norm.bias"}
    assert packed["layers.1.blocks.*.norm.bias"][2].tolist() == [torch.tensor(1.2).item()] * 2
    assert same(unstack(packed), stages)


def test_lists_of_other_shapes_or_with_gaps_stay_apart() -> None:
    shapes = {"a.0": torch.ones(2), "a.1": torch.ones(3)}
    gaps = {"a.0": torch.ones(2), "a.2": torch.ones(2)}
    dtypes = {"a.0": torch.ones(2), "a.1": torch.ones(2, dtype=torch.float64)}
    assert all(same(stack(tensors), tensors) for tensors in (shapes, gaps, dtypes))
