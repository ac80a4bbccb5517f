"""Texts of the status lines: durations and waiting times."""


def duration(seconds: float) -> str:
    """About how long, in words."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds)} seconds"
    return f"about {round(seconds / 60)} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def waiting(ahead: int, seconds: float | None) -> str:
    """The status line of a visitor who waits for the model."""
    if ahead == 0:
        return "Waiting for the model: you are next."
    before = "one request is" if ahead == 1 else f"{ahead} requests are"
    left = "" if seconds is None else f", {duration(seconds)}"
    return f"Waiting for the model: {before} before yours{left}."
