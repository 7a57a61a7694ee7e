"""Token merging and pruning against plain loops, conservation laws and the authors' own numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from petiole.errors import PluginError
from petiole.nn.matching import Merging, match, merge, prune, sources, unmerge
from petiole.nn.schedule import macs, most_removed, removed, resolve, schedule, tokens_after
from test_golden import det, golden

Groups = list[list[int]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def counts(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 6, shape, generator=torch.Generator().manual_seed(seed)).double()


def groups_of(merging: Merging, row: int) -> Groups:
    """Which tokens each token of the shortened sequence stands for."""
    target = merging.target[row].tolist()
    return [[i for i, place in enumerate(target) if place == m] for m in range(merging.num_after)]


def cosine(a: list[float], b: list[float]) -> float:
    dot, norms = sum(x * y for x, y in zip(a, b, strict=True)), sum(x * x for x in a) * sum(y * y for y in b)
    return dot / norms**0.5 if norms else 0.0


def groups_by_loop(metric: Tensor, num_merged: int, num_protected: int) -> Groups:
    """The matching of one sequence `[N, d]`, token by token; a group starts with the token that stays."""
    keys, num_tokens = metric.tolist(), len(metric)
    even, odd = ([i for i in range(num_protected, num_tokens) if i % 2 == parity] for parity in (0, 1))
    partner = {i: max(odd, key=lambda j: cosine(keys[i], keys[j])) for i in even} if odd else {}
    ranked = sorted(partner, key=lambda i: -cosine(keys[i], keys[partner[i]]))
    num_merged = min(num_merged, (num_tokens - num_protected) // 2)
    joining, stay = ranked[:num_merged], ranked[num_merged:]
    order = [*range(num_protected), *(sorted(stay) if num_protected else stay), *odd]
    return [[i, *(j for j in joining if partner[j] == i)] for i in order]


def merged_by_loop(x: Tensor, weights: Tensor, groups: list[Groups]) -> Tensor:
    """Weighted means of groups, sum by sum."""
    rows = [
        [sum(weights[b, i] * x[b, i] for i in group) / sum(weights[b, i] for i in group) for group in found]
        for b, found in enumerate(groups)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("case", golden("tome_merge")["cases"], ids=lambda c: f"{c['tokens']}-{c['r']}")
def test_two_rounds_agree_with_the_authors_implementation(case: dict[str, Any]) -> None:
    name, protected = f"{case['tokens']}.{case['dim']}.{case['r']}", int(case["class_token"])
    x, sizes = det(f"tome.x.{name}", (2, case["tokens"], case["dim"]), 1.0), None
    metric = det(f"tome.metric.{name}", tuple(x.shape), 1.0)
    for expected in (case, case["second"]):
        merging = match(metric, case["r"], protected)
        assert merging is not None
        x, sizes = merge(x, sizes, merging)
        assert merging.num_after == x.shape[1] == expected["out_tokens"]
        if expected.get("source_groups"):
            assert [groups_of(merging, row) for row in range(2)] == expected["source_groups"]
        found = [x.sum(), x.square().sum(), (x * sizes[..., None]).sum()]
        for value, key in zip(found, ("sum", "sumsq", "weighted"), strict=True):
            assert key not in expected or value.item() == pytest.approx(expected[key], abs=1e-6)
        assert sizes.flatten().sort(descending=True).values[:20].tolist() == expected["sizes_sorted"]
        metric = det(f"tome.metric2.{name}", tuple(x.shape), 1.0)


@pytest.mark.parametrize("num_merged", [1, 3, 100])
@pytest.mark.parametrize("num_protected", [0, 1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 6, 7, 8, 16, 17])
def test_matching_is_that_of_the_loop(num_tokens: int, num_protected: int, num_merged: int) -> None:
    metric = normal(3, num_tokens, 4, seed=num_tokens)
    merging = match(metric, num_merged, num_protected)
    if num_tokens - num_protected < 2:
        assert merging is None
        return
    assert merging is not None
    assert merging.num_before == num_tokens
    expected = [groups_by_loop(row, num_merged, num_protected) for row in metric]
    assert merging.kept.tolist() == [[group[0] for group in groups] for groups in expected]
    assert [groups_of(merging, b) for b in range(3)] == [[sorted(group) for group in groups] for groups in expected]


@pytest.mark.parametrize("num_merged", [0, -3])
def test_nothing_to_merge_is_none(num_merged: int) -> None:
    assert match(normal(2, 9, 4), num_merged) is None
    assert prune(normal(2, 9), num_merged) is None


def test_ties_go_to_the_token_in_front() -> None:
    # one-hot keys, so that equal cosines are equal to the last bit
    merging = match(torch.eye(2)[None, [0, 0, 0, 0, 1, 1, 0, 1, 1]], 3, 0)
    assert merging is not None
    assert merging.removed.tolist() == [[0, 2, 4]]
    assert merging.kept[0, merging.into[0]].tolist() == [1, 1, 5]


def test_zero_keys_are_like_nothing_and_give_numbers() -> None:
    metric = normal(1, 9, 4)
    metric[:, 2:6] = 0
    merging = match(metric, 4)
    assert merging is not None
    assert groups_of(merging, 0) == [sorted(group) for group in groups_by_loop(metric[0], 4, 1)]
    assert match(torch.zeros(1, 9, 4, requires_grad=True), 4) is not None
    assert merge(normal(1, 9, 3), None, merging)[0].isfinite().all()


@pytest.mark.parametrize("num_merged", [1, 4, 8])
def test_merged_tokens_and_gradients_are_those_of_the_loop(num_merged: int) -> None:
    x, sizes, metric = normal(2, 17, 5).requires_grad_(), counts(2, 17), normal(2, 17, 4, seed=1)
    merging = match(metric, num_merged)
    assert merging is not None
    y, _ = merge(x, sizes, merging)
    expected = merged_by_loop(x, sizes, [groups_by_loop(row, num_merged, 1) for row in metric])
    torch.testing.assert_close(y, expected)
    cotangent = normal(*y.shape, seed=2)
    for found, wanted in zip(
        torch.autograd.grad(y, x, cotangent), torch.autograd.grad(expected, x, cotangent), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_merging_conserves_the_sum_of_sizes_and_of_what_they_weigh() -> None:
    x, sizes = normal(2, 20, 5), counts(2, 20, 1)
    merging = match(normal(2, 20, 4), 7, 2)
    assert merging is not None
    y, total = merge(x, sizes, merging)
    assert total.shape == (2, 13, 1)
    torch.testing.assert_close(total.sum(1), sizes.sum(1), rtol=0, atol=0)
    torch.testing.assert_close((total * y).sum(1), (sizes * x).sum(1))


def test_inputs_stay_as_they_are_and_tokens_alone_keep_every_bit() -> None:
    x, metric = normal(2, 17, 5, dtype=torch.float32), normal(2, 17, 4)
    sizes = counts(2, 17).float()
    before = [x.clone(), sizes.clone(), metric.clone()]
    merging = match(metric, 5, 3)
    assert merging is not None
    y, _ = merge(x, sizes, merging)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, sizes, metric), strict=True))
    assert torch.equal(y[:, :3], x[:, :3])
    for b in range(2):
        alone = [(m, group[0]) for m, group in enumerate(groups_of(merging, b)) if len(group) == 1]
        assert alone
        assert all(torch.equal(y[b, m], x[b, i]) for m, i in alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once_and_does_not_overflow(dtype: torch.dtype) -> None:
    x = (1e4 * normal(2, 17, 6)).to(dtype)
    sizes = 100 * counts(2, 17)  # products with the values are far beyond 65504
    merging = match(normal(2, 17, 4).to(dtype), 8)
    assert merging is not None
    y, total = merge(x, sizes.float(), merging)
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y, merge(x.double(), sizes, merging)[0].to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_half_precision_metric_is_ranked_in_full() -> None:
    metric = normal(2, 33, 8).half()
    found, expected = match(metric, 9), match(metric.double(), 9)
    assert found is not None
    assert expected is not None
    assert torch.equal(found.target, expected.target)
    assert torch.equal(found.kept, expected.kept)


def test_autocast_changes_nothing() -> None:
    x, metric = normal(2, 33, 8, dtype=torch.float32), normal(2, 33, 8, dtype=torch.float32, seed=1)
    expected = match(metric, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = match(metric, 9)
        assert found is not None
        y, _ = merge(x, None, found)
    assert expected is not None
    assert torch.equal(found.target, expected.target)
    assert torch.equal(y, merge(x, None, expected)[0])


def test_tokens_that_merged_have_one_row_again() -> None:
    x, sizes = normal(2, 17, 5), counts(2, 17)
    merging = match(normal(2, 17, 4), 6)
    assert merging is not None
    y, _ = merge(x, sizes, merging)
    again = unmerge(y, merging)
    assert again.shape == x.shape
    for b in range(2):
        for m, group in enumerate(groups_of(merging, b)):
            assert all(torch.equal(again[b, i], y[b, m]) for i in group)
    torch.testing.assert_close(merge(again, sizes, merging)[0], y)


def test_sources_over_blocks_are_the_tokens_a_mean_is_of() -> None:
    first = x = normal(2, 21, 5)
    sizes, mergings = None, []
    for block in range(3):
        mergings.append(match(normal(2, x.shape[1], 4, seed=block), 4))
        x, sizes = merge(x, sizes, mergings[-1])
    ended = sources([mergings[0], None, *mergings[1:]])
    assert ended.shape == (2, 21)
    for b in range(2):
        for m in range(9):
            assert (ended[b] == m).sum() == sizes[b, m]
            torch.testing.assert_close(x[b, m], first[b, ended[b] == m].mean(0))


def test_sources_without_a_merging_are_refused() -> None:
    with pytest.raises(PluginError, match="nothing to trace"):
        sources([None, None])


def pruned_by_loop(scores: Tensor, num_removed: int, num_protected: int) -> Groups:
    ranked = sorted(range(num_protected, len(scores)), key=lambda i: -scores[i].item())
    num_kept = len(ranked) - min(num_removed, len(ranked) - 1) - 1
    return [[i] for i in (*range(num_protected), *sorted(ranked[:num_kept]))] + [ranked[num_kept:]]


@pytest.mark.parametrize("num_removed", [1, 5, 100])
@pytest.mark.parametrize("num_protected", [0, 1, 3])
def test_pruning_fuses_the_lowest_scores_by_their_weight(num_removed: int, num_protected: int) -> None:
    x, scores, sizes = normal(2, 12, 5), normal(2, 12, seed=1).softmax(-1), counts(2, 12)
    merging = prune(scores, num_removed, num_protected)
    assert merging is not None
    groups = [pruned_by_loop(row, num_removed, num_protected) for row in scores]
    assert [groups_of(merging, b) for b in range(2)] == [[sorted(group) for group in found] for found in groups]
    y, total = merge(x, sizes, merging)
    torch.testing.assert_close(y, merged_by_loop(x, scores, groups))
    torch.testing.assert_close(total.sum(1), sizes.sum(1), rtol=0, atol=0)
    by_size = prune(scores, num_removed, num_protected, is_weighted=False)
    assert by_size is not None
    torch.testing.assert_close(merge(x, sizes, by_size)[0], merged_by_loop(x, sizes, groups))


def test_gradient_of_pruning_reaches_tokens_and_scores() -> None:
    x, scores = normal(1, 8, 3).requires_grad_(), normal(1, 8, seed=1).softmax(-1).requires_grad_()

    def fused(x: Tensor, scores: Tensor) -> Tensor:
        merging = prune(scores, 4)
        assert merging is not None
        return merge(x, None, merging)[0]

    assert torch.autograd.gradcheck(fused, (x, scores))


def test_scores_of_zero_weigh_the_same() -> None:
    x = normal(1, 6, 3, dtype=torch.float32)
    merging = prune(torch.zeros(1, 6), 100)
    assert merging is not None
    torch.testing.assert_close(merge(x, None, merging)[0][:, 1], x[:, 1:].mean(1))


class Shortening(nn.Module):
    """Two mergings and a pruning around a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes, mergings = None, []
        for decide in (match, match, lambda h, num: prune(h.square().mean(-1), num)):
            x = self.linear(x)
            mergings.append(decide(x, 2))
            x, sizes = merge(x, sizes, mergings[-1])
        return x, sizes, sources(mergings)


def shortening() -> tuple[Shortening, Tensor]:
    torch.manual_seed(0)
    return Shortening(), normal(2, 11, 6, dtype=torch.float32)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_shortens_any_batch(strict: bool) -> None:
    net, x = shortening()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), strict=strict, dynamic_shapes=({0: batch},))
    images = normal(5, 11, 6, seed=1, dtype=torch.float32)
    torch.testing.assert_close(program.module()(images), net(images))


@pytest.mark.compile
def test_compiles_to_one_graph_with_the_same_gradients() -> None:
    net, x = shortening()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    parameters = list(net.parameters())
    found, expected = (torch.autograd.grad(f(x)[0].square().sum(), parameters) for f in (compiled, net))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("budget", "depth", "expected"),
    [
        (8, 3, (8, 8, 8)),
        ((8, -1), 12, (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)),
        ([8, -1.0], 12, (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)),
        ((13, -1), 12, (26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0)),
        ((8, 0.0), 3, (8, 8, 8)),
        ((8, 1.0), 5, (0, 4, 8, 12, 16)),
        ((5, -1), 1, (5,)),
        ([4, 0, 2], 5, (4, 0, 2, 0, 0)),
        ([8, 1], 3, (8, 1, 0)),
        ((8, 1), 2, (8, 1)),
        (0.7, 2, (0.7, 0.7)),
        ([0, 0, 0.7, 0, 1.0], 5, (0, 0, 0.7, 0, 1.0)),
        ([0, 0.7], 3, (0, 0.7, 0)),
    ],
)
def test_schedule_says_what_each_block_is_asked_for(budget: Any, depth: int, expected: tuple[float, ...]) -> None:
    found = schedule(budget, depth)
    assert found == expected
    assert [type(request) for request in found] == [type(request) for request in expected]


@pytest.mark.parametrize(("reduction", "total"), [(8, 91), (13, 151), (16, 187)])
def test_truncated_line_removes_the_known_total(reduction: int, total: int) -> None:
    assert sum(schedule((reduction, -1), 12)) == total


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (-1, "0 or more.* got -1"),
        (1.5, "got 1.5"),
        (0.0, "got 0.0"),
        (True, "got True"),
        ("8", "a whole number, a share .* got '8'"),
        (None, "got None"),
        ([1, 2, 3, 4, 5], "5 blocks are to remove tokens, but the backbone has 4"),
        ([8, 4, -1], "got -1"),
        ((8, -2), "between -1 .* got -2"),
        ((8, 1), r"write \(8, 1.0\) for the line, \[8, 1\] for the blocks"),
    ],
)
def test_wrong_budgets_are_refused(budget: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        schedule(budget, 4)


def test_shares_keep_at_least_what_they_say() -> None:
    assert removed(0.7, 11) == 3  # 0.7 * 10 is a rounding error above 7
    assert removed(0.7, 197, is_pruning=True) == 196 - 138
    assert resolve(0.5, 3, num_tokens=17) == (8, 4, 2)
    assert resolve(0.01, 3, num_tokens=9, is_pruning=True) == (7, 0, 0)
    assert resolve(1.0, 3, num_tokens=17) == (0, 0, 0)


@pytest.mark.parametrize("num_protected", [0, 1, 2, 5])
@pytest.mark.parametrize("budget", [3, 100, 0.8, (4, -1), [0, 5, 0.5]])
def test_resolved_schedule_is_what_matching_does(budget: Any, num_protected: int) -> None:
    x = normal(1, 23, 4)
    found, pruned = [], []
    for request in schedule(budget, 4):
        merging = match(x, removed(request, x.shape[1], num_protected), num_protected)
        x = x if merging is None else merge(x, None, merging)[0]
        found.append(x.shape[1])
    assert tuple(found) == tokens_after(budget, 4, 23, num_protected)
    scores = normal(1, 23).softmax(-1)
    for count in resolve(budget, 4, 23, num_protected, is_pruning=True):
        merging = prune(scores, count, num_protected)
        assert (0 if merging is None else merging.num_before - merging.num_after) == count
        scores = scores if merging is None else merge(scores[..., None], None, merging)[0][..., 0]
        pruned.append(scores.shape[1])
    assert tuple(pruned) == tokens_after(budget, 4, 23, num_protected, is_pruning=True)


def test_a_block_removes_no_protected_token() -> None:
    assert [most_removed(n, 5) for n in (3, 5, 6, 7, 8, 9)] == [0, 0, 0, 1, 1, 2]
    assert [most_removed(n, 5, is_pruning=True) for n in (3, 5, 6, 7, 8)] == [0, 0, 0, 1, 2]
    assert tokens_after(8, 4, num_tokens=9, num_protected=5) == (7, 6, 6, 6)


# constant reduction: tokens at the end, then giga-MACs of ViT-S/16 and ViT-B/16 on 224 pixels
COSTS = [
    (0, 197, 4.60, 17.56),
    (4, 149, 4.00, 15.32),
    (8, 101, 3.42, 13.10),
    (12, 53, 2.84, 10.91),
    (13, 41, 2.70, 10.37),
    (16, 11, 2.29, 8.77),
    (18, 6, 2.06, 7.87),
    (20, 4, 1.87, 7.13),
]


@pytest.mark.parametrize(("reduction", "last", "small", "base"), COSTS)
def test_costs_of_constant_reduction_are_the_known_ones(reduction: int, last: int, small: float, base: float) -> None:
    tokens = (197, *tokens_after(reduction, 12, num_tokens=197))
    assert tokens[-1] == last
    for width, expected in ((384, small), (768, base)):
        assert macs(tokens, width) / 1e9 == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("reduction", "expected"), [(8, 11.75), (13, 8.10), (16, 5.86)])
def test_costs_of_falling_reduction_are_the_known_ones(reduction: int, expected: float) -> None:
    tokens = (197, *tokens_after((reduction, -1), 12, num_tokens=197))
    assert macs(tokens, 768) / 1e9 == pytest.approx(expected, rel=2e-3)
