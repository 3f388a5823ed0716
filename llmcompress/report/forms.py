"""How numbers are written for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:20`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """`4.9 MB`: decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def significant(value: float) -> str:
    """Three significant digits, without an exponent where that is readable: `0.0123`, `12.3`, `1,230`."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.2e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def share(value: float) -> str:
    """`96.2 %`."""
    return f"{value:.1%}".replace("%", " %")


FORMS: Mapping[str, Callable[[float], str]] = {
    "number": significant,
    "perplexity": lambda value: f"{value:.2f}" if value < 1000 else f"{value:,.0f}",
    "bits": lambda value: f"{value:.4f}",
    "share": share,
    "nats": lambda value: f"{value:.4f}",
    "bytes": size,
    "seconds": lambda value: f"{value * 1000:.0f} ms" if value < 10 else f"{value:.1f} s",
    "rate": lambda value: f"{value:,.1f}",
    "joules": lambda value: f"{value:.3g} J",
    "words": lambda value: f"{value:.1f}",
}
"""Name of a form → how a value is written."""


def signed(value: float, form: str) -> str:
    """A difference, with its sign."""
    text = FORMS[form](abs(value))
    return f"+{text}" if value >= 0 else f"−{text}"
