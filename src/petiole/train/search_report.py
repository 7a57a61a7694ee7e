"""How a search looks: a table of its candidates, and accuracy against each number that was searched."""

from collections.abc import Sequence
from typing import Any

from .grids import text, words
from .record import Candidate
from .searching import SearchResult

# more lines than this have no legend: nobody could tell them apart
_MANY_LINES = 8


def candidate_columns(found: SearchResult) -> tuple[str, ...]:
    """Returns the heads of the table of candidates."""
    return (*found.chosen.settings, "validation", "trained parameters", "seconds", "chosen")


def candidate_rows(found: SearchResult) -> list[tuple[str, ...]]:
    """Returns the cells of the table of candidates, in the order of the grid."""
    return [
        (
            *map(text, candidate.settings.values()),
            "diverged" if candidate.val_accuracy is None else f"{candidate.val_accuracy:.1%}",
            f"{candidate.trained_parameters:,}",
            f"{candidate.seconds:.0f}",
            "*" if candidate is found.chosen else "",
        )
        for candidate in found.candidates
    ]


def numeric_axes(found: SearchResult) -> list[str]:
    """Returns the settings of which several numbers were tried and scored."""
    scored = _scored(found)
    return [
        name
        for name in found.chosen.settings
        if all(_is_number(candidate.settings[name]) for candidate in scored)
        and len({candidate.settings[name] for candidate in scored}) > 1
    ]


def draw_candidates(axes: Sequence[Any], found: SearchResult) -> None:
    """Draws validation accuracy against each numeric setting, a line for each combination of the others."""
    for ax, name in zip(axes, numeric_axes(found), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for candidate in found.candidates:
            others = {key: value for key, value in candidate.settings.items() if key != name and _varies(found, key)}
            line = lines.setdefault(words(others) if others else "", [])
            if candidate.val_accuracy is not None:
                line.append((float(candidate.settings[name]), candidate.val_accuracy))
        lines = {label: points for label, points in lines.items() if points}
        for label, points in lines.items():
            ax.plot(*zip(*sorted(points), strict=True), ".-", label=label.replace("$", r"\$") or None)
        ax.plot(found.chosen.settings[name], found.chosen.val_accuracy, "o", ms=10, mfc="none", mec="black")
        values = sorted({x for points in lines.values() for x, _ in points})
        # scales, ranks and learning rates go in powers
        is_wide = values[0] > 0 and values[-1] >= 8 * values[0]
        ax.set(xlabel=name, ylabel="validation accuracy", xscale="log" if is_wide else "linear")
        ax.set_xticks(values, labels=map(text, values))
        ax.minorticks_off()
        if 1 < len(lines) <= _MANY_LINES:
            ax.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _scored(found: SearchResult) -> list[Candidate]:
    return [candidate for candidate in found.candidates if candidate.val_accuracy is not None]


def _varies(found: SearchResult, name: str) -> bool:
    return len({text(candidate.settings[name]) for candidate in found.candidates}) > 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
