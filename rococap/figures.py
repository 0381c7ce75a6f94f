"""Numbers as people read them: durations, shares, rounded values."""


def counted(n: int, noun: str) -> str:
    """Like "1 picture" and "2 pictures"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def duration(seconds: float | None) -> str:
    """Like "2 h 05 min"; "?" if it is not known."""
    if seconds is None:
        return "?"
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {sec:02} s" if minutes else f"{sec} s"


def ago(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} ago"


def in_hours(hours: float) -> str:
    return f"about {duration(3600 * hours)}"


def percent(share: float | None) -> str:
    """A share of 1 as a whole number of percent; "-" if it is not known."""
    return "-" if share is None else f"{100 * share:.0f}"


def significant(number: float) -> float:
    """Rounded for display: one decimal from 10 on, three significant digits below."""
    return round(number, 1) if number >= 10 else float(f"{number:.3g}")
