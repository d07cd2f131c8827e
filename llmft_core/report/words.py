"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """`1,493,647`."""
    return f"{number:,.0f}"


def counted(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"


def share(fraction: float) -> str:
    """`12.5 %`."""
    return f"{100 * fraction:.1f} %"


def size(number: float) -> str:
    """Bytes in powers of 1000: `13.5 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if round(number, 1) < 1000:  # 999,960 is 1.0 MB, not 1000.0 kB
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
