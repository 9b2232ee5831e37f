"""Say in one sentence what a comparison found: which method came closest to clean labels, and how far others are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metrics.format import short

__all__ = ["BASELINE", "ORACLE", "Score", "say_finding"]

# Roles of rows.
ORACLE = "oracle"  # trained on clean labels: what the others are compared with
BASELINE = "baseline"  # trained on the labels as they are

_ORACLE = "the oracle, the same model trained on clean labels"


@dataclass(frozen=True)
class Score:
    """The distance of a method's images from real ones."""

    title: str
    value: float | None  # lower is better; None: there is none
    interval: tuple[float, float] | None = None
    role: str = ""  # ORACLE, BASELINE or none


def say_finding(scores: Sequence[Score], metric: str) -> str:
    """Return one sentence on the scores. `metric` is what their values are called."""
    known = [score for score in scores if score.value is not None]
    oracle, baseline = (next((s for s in known if s.role == role), None) for role in (ORACLE, BASELINE))
    others = sorted((s for s in known if s.role not in (ORACLE, BASELINE)), key=lambda score: score.value)
    if not others:
        if not oracle or not baseline:
            return f"Nothing can be said yet: no method has a {metric} that could be compared."
        text = f"No method yet besides the baseline, whose {metric} is {short(baseline.value)}"
        return text + f", {_times(baseline, oracle)}the oracle's {short(oracle.value)}."
    best = others[0]
    if baseline and baseline.value <= best.value:
        text = f"No method helped: the baseline, which believes every label, has the lowest {metric}"
        text += f", {short(baseline.value)}, and the next one is {best.title} with {short(best.value)}"
        return text + (f"; {_ORACLE}, has {short(oracle.value)}." if oracle else ".")
    if oracle is None:
        text = f"{_capital(best.title)} has the lowest {metric}, {short(best.value)}"
    elif best.value <= oracle.value:
        text = f"{_capital(best.title)} reached {_ORACLE}: its {metric} is {short(best.value)}, "
        text += f"the oracle's {short(oracle.value)}"
    else:
        text = f"{_capital(best.title)} came closest to {_ORACLE}: its {metric} is {short(best.value)}, "
        text += f"{_times(best, oracle)}the oracle's {short(oracle.value)}"
    if oracle and _overlap(best, oracle):
        text += " (their intervals overlap)"
    if baseline:
        text += f"; the baseline, which believes every label, has {short(baseline.value)}"
        text += f", {_times(baseline, oracle)}the oracle's" if oracle and oracle.value > 0 else ""
    return text + "."


def _times(score: Score, oracle: Score) -> str:
    """Return how much larger or smaller than the oracle's this value is, in words that `the oracle's` follows."""
    if oracle.value <= 0:
        return "beside "
    ratio = score.value / oracle.value
    if ratio < 1:
        return f"{1 - ratio:.1%} below "
    return f"{ratio - 1:.1%} above " if ratio < 2 else f"{short(ratio)} times "


def _overlap(a: Score, b: Score) -> bool:
    if a.interval is None or b.interval is None:
        return False
    return a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
