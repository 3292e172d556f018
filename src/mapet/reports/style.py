"""What all reports look like: colours and dashes of lines, and the style sheets."""

from importlib.resources import files

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's (2008), told apart by the colour-blind; the dashes help further."""
DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))


def look(i: int) -> tuple[str, tuple[int, ...]]:
    """Colour and dashes of the i-th line."""
    return COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]


def resource(name: str) -> str:
    """A text file that lies beside this module."""
    return files("mapet.reports").joinpath(name).read_text(encoding="utf-8")


def stylesheet(*names: str) -> str:
    """Style sheets, one after the other."""
    return "\n".join(map(resource, names))
