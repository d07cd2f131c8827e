"""Loss spikes: a step whose loss is far above what the last steps had."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

WINDOW = 64
"""Steps that say what is usual."""
LEAST = 16
"""Steps before which nothing is said: the first losses fall too fast to be compared."""
DEVIATIONS = 6.0
"""How far above the median a spike is, in robust standard deviations (1.4826 × the median absolute deviation, which
equals the standard deviation of a normal distribution and, unlike it, is not moved by the spikes themselves). Source:
Leys et al. 2013, "Detecting outliers"; they take 3 for samples, where 1 of 700 is beyond; here thousands are looked at.
"""
LEAST_RISE = 0.1
"""And at least by this share of the median: a loss that hardly moves has no deviation to speak of."""


class SpikeDetector:
    """Remembers the losses of the last steps. A spike is told once, where it begins; a loss that stays high becomes the
    usual one."""

    def __init__(self, memory: Mapping[str, Any]) -> None:
        """`memory`: of the run that is resumed, else empty."""
        self._losses: deque[float] = deque(memory.get("losses", ()), maxlen=WINDOW)
        self._in_spike: bool = memory.get("in_spike", False)

    @property
    def memory(self) -> dict[str, Any]:
        """JSON data from which a resumed run goes on."""
        return {"losses": list(self._losses), "in_spike": self._in_spike}

    def look(self, loss: float) -> float | None:
        """Takes the loss of a step, in nats per trained token. The usual loss where a spike begins, else None."""
        usual = median(self._losses) if len(self._losses) >= LEAST else None
        high = False
        if usual is not None:
            deviation = 1.4826 * median(abs(one - usual) for one in self._losses)
            high = loss > usual + max(DEVIATIONS * deviation, LEAST_RISE * usual)
        begins = high and not self._in_spike
        self._in_spike = high
        self._losses.append(loss)
        return usual if begins else None
