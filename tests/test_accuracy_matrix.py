"""The accuracy matrix against sums done by hand."""

import math

import pytest

import petiole as pt
from petiole.continual.matrix import AccuracyMatrix

NAN = math.nan


def matrix(rows: list[list[float]], met: list[int] | None = None, counts: list[int] | None = None) -> AccuracyMatrix:
    columns = [str(i) for i in range(len(rows[0]))]
    return AccuracyMatrix(columns, counts or [10] * len(columns), met or [*range(len(columns))], rows)


# three experiences; the second rises before it falls, so that best and first differ
HAND = [
    [0.9, NAN, NAN, NAN],
    [0.6, 0.5, NAN, NAN],
    [0.7, 0.8, 1.0, NAN],
    [0.5, 0.7, 0.6, 0.8],
]


def test_averages_are_over_what_was_met() -> None:
    assert matrix(HAND).averages() == pytest.approx([0.9, 1.1 / 2, 2.5 / 3, 2.6 / 4])


def test_final_average_is_the_mean_of_the_last_row() -> None:
    assert matrix(HAND).final_average() == pytest.approx(0.65)


def test_average_incremental_is_the_mean_of_averages() -> None:
    assert matrix(HAND).average_incremental() == pytest.approx((0.9 + 0.55 + 2.5 / 3 + 0.65) / 4)


def test_final_accuracy_weighs_columns_by_their_samples() -> None:
    found = matrix(HAND, counts=[10, 10, 20, 60]).final_accuracy()
    assert found == pytest.approx((5 + 7 + 12 + 48) / 100)


def test_forgetting_is_best_minus_last() -> None:
    assert matrix(HAND).forgetting() == pytest.approx(((0.9 - 0.5) + (0.8 - 0.7) + (1.0 - 0.6)) / 3)


def test_forgetting_since_first_is_diagonal_minus_last() -> None:
    assert matrix(HAND).forgetting("first") == pytest.approx(((0.9 - 0.5) + (0.5 - 0.7) + (1.0 - 0.6)) / 3)


def test_backward_transfer_is_last_minus_diagonal() -> None:
    assert matrix(HAND).backward_transfer() == pytest.approx(((0.5 - 0.9) + (0.7 - 0.5) + (0.6 - 1.0)) / 3)


def test_best_leaves_the_last_row_out() -> None:
    assert matrix([[0.2, NAN], [0.9, 1.0]]).forgetting() == pytest.approx(0.2 - 0.9)


def test_learning_accuracy_is_the_mean_diagonal() -> None:
    assert matrix(HAND).learning_accuracy() == pytest.approx((0.9 + 0.5 + 1.0 + 0.8) / 4)


def test_forward_transfer_is_the_row_before_minus_chance() -> None:
    rows = [[0.9, 0.3, 0.1], [0.6, 0.5, 0.4], [0.7, 0.8, 1.0]]
    assert matrix(rows).forward_transfer([0.2, 0.1, 0.3]) == pytest.approx(((0.3 - 0.1) + (0.4 - 0.3)) / 2)


def test_forward_transfer_needs_scores_ahead() -> None:
    with pytest.raises(pt.FitError, match=r"nothing was scored before it was met: .* run\(\.\.\., looks_ahead=True\)"):
        matrix(HAND).forward_transfer([0.0] * 4)


def test_forward_transfer_needs_chance_for_each_column() -> None:
    with pytest.raises(pt.FitError, match="there are 4 columns and 1 accuracies by chance: give as many"):
        matrix(HAND).forward_transfer([0.1])


def test_column_that_is_met_late_counts_from_there() -> None:
    # classes of a stream without boundaries: the second comes in the third stretch
    found = matrix([[0.9, NAN], [0.8, NAN], [0.7, 0.4], [0.6, 0.3]], met=[0, 2])
    assert found.averages() == pytest.approx([0.9, 0.8, 0.55, 0.45])
    assert found.forgetting() == pytest.approx(((0.9 - 0.6) + (0.4 - 0.3)) / 2)
    assert found.learning_accuracy() == pytest.approx((0.9 + 0.4) / 2)


def test_what_was_scored_ahead_is_in_no_average() -> None:
    assert matrix([[0.9, 0.1], [0.8, 0.6]]).averages() == pytest.approx([0.9, 0.7])


def test_accuracy_that_was_not_measured_is_left_out() -> None:
    found = matrix([[NAN, NAN], [0.8, 0.4], [NAN, 0.2]], met=[0, 1])
    assert found.averages()[1:] == pytest.approx([0.6, 0.2])
    assert math.isnan(found.averages()[0])
    assert found.average_incremental() == pytest.approx(0.4)
    assert found.final_accuracy() == pytest.approx(0.2)
    assert found.forgetting() == pytest.approx(0.2)
    assert found.learning_accuracy() == pytest.approx(0.4)


def test_single_experience_forgets_nothing_that_could_be_measured() -> None:
    found = matrix([[0.7]])
    assert found.metrics()["final_average"] == found.final_accuracy() == 0.7
    assert math.isnan(found.forgetting())
    assert math.isnan(found.forward_transfer([0.5]))


@pytest.mark.parametrize("rows", [[], [[], []]], ids=["before the first row", "without test samples"])
def test_matrix_of_nothing_has_metrics_that_are_nan(rows: list[list[float]]) -> None:
    columns = [] if rows else ["0"]
    found = AccuracyMatrix(columns, [5] * len(columns), [0] * len(columns), rows)
    assert all(math.isnan(value) for value in found.metrics().values())


def test_rows_can_be_added() -> None:
    found = AccuracyMatrix(["0", "1"], [4, 4], [0, 1])
    found.add([1, NAN])
    found.add([0.5, 0.75])
    assert found.values.tolist()[1] == [0.5, 0.75]
    assert found.values.shape == (2, 2)


def test_metrics_have_names() -> None:
    found = matrix(HAND).metrics()
    assert found["forgetting_since_best"] == matrix(HAND).forgetting("best")
    assert found["forgetting_since_first"] == matrix(HAND).forgetting("first")
    assert [*found][:3] == ["final_average", "final_accuracy", "average_incremental"]
