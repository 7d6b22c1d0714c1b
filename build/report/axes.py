"""Numbers -> where they stand on an axis, and its few ticks. Knows no SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

MOST_TICKS = 5
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Axis(NamedTuple):
    """label: with its unit. ticks: a value and what is written there."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far along the axis, 0 to 1; what lies beyond an end stands on it."""
        if self.logarithmic:
            low, high, value = (
                math.log10(max(number, self.low)) for number in (self.low, self.high, value)
            )
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def linear_axis(label: str, low: float, high: float, *, to_tick: bool = False) -> Axis:
    """to_tick: the last tick is the end, at or above `high`."""
    if not low < high:
        around = abs(low) / 20 or 1.0
        low, high = low - around, low + around
    step = _step((high - low) / (MOST_TICKS - 1))
    if to_tick:
        high = math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if step * 10**decimals % 1 > 1e-6:  # 2.5 and its like
        decimals += 1
    ticks = [number * step for number in range(first, last + 1)]
    return Axis(label, low, high, tuple((tick, _written(tick, decimals)) for tick in ticks))


def logarithmic_axis(label: str, values: Sequence[float], decades: int) -> Axis:
    """Whole decades up to the largest value, at most so many; what is below, 0 too, stands on the
    lower end, which then says so.
    """
    positive = [value for value in values if value > 0]
    top = math.ceil(math.log10(max(positive, default=1.0)) - 1e-9)
    smallest = math.floor(math.log10(min(positive, default=1.0)) + 1e-9)
    bottom = min(max(smallest, top - decades), top - 1)
    stride = math.ceil((top - bottom) / (MOST_TICKS - 1))
    exponents = range(bottom, top + 1, stride)
    below = any(value < 10.0**bottom for value in values)
    ticks = [(10.0**exponent, _power(exponent)) for exponent in exponents]
    if below:
        ticks[0] = (ticks[0][0], f"≤{ticks[0][1]}")
    return Axis(label, 10.0**bottom, 10.0**top, tuple(ticks), logarithmic=True)


def named_axis(label: str, names: Sequence[str]) -> Axis:
    """Places 0, 1, 2 ..., each with its name, and half a place free at both ends."""
    shown = max(1, math.ceil(len(names) / (MOST_TICKS + 1)))
    ticks = [(float(place), name) for place, name in enumerate(names) if place % shown == 0]
    return Axis(label, -0.5, len(names) - 0.5, tuple(ticks))


def _step(least: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9)
    )


def _written(value: float, decimals: int) -> str:
    if abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value + 0.0:,.{decimals}f}"


def _power(exponent: int) -> str:
    if -2 <= exponent <= 2:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(_SUPERSCRIPT)
