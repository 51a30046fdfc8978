"""How the figures look: colours that the colour-blind can tell apart, on a light and on a dark background."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eafo_dynamic.errors import ConfigError, LogError

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "SUFFIXES", "Style", "check_picture", "drawing", "evenly", "save"]

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Style:
    """Colours of a figure.

    Args:
        ground: background.
        ink: text and axes.
        faint: grid lines and what is shown for comparison.
        lines: colours of single lines: those of Okabe and Ito that can be seen on the background.
        diverging: colours of a scale with a middle: low, middle, high.
        sequential: name of the colour map of a scale without one.
        span: part of that map that can be seen on the background.
    """

    ground: str
    ink: str
    faint: str
    lines: tuple[str, ...]
    diverging: tuple[str, str, str]
    sequential: str
    span: tuple[float, float]

    @property
    def around_zero(self) -> Colormap:
        """Colour map for values of both signs; zero is close to the ground."""
        from matplotlib.colors import LinearSegmentedColormap

        return LinearSegmentedColormap.from_list("around_zero", self.diverging)

    @property
    def scale(self) -> Colormap:
        """Colour map for values of one sign, steps of time and depth."""
        import matplotlib
        from matplotlib.colors import ListedColormap

        whole = matplotlib.colormaps[self.sequential]
        low, high = self.span
        return ListedColormap([whole(low + (high - low) * level / 255) for level in range(256)])


_OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LIGHT = Style(
    ground="#FFFFFF",
    ink="#222222",
    faint="#B0B0B0",
    lines=(*_OKABE_ITO, "#000000"),
    diverging=("#0072B2", "#F7F7F7", "#D55E00"),
    sequential="viridis",
    span=(0.0, 0.92),
)
DARK = Style(
    ground="#14171C",
    ink="#E6E6E6",
    faint="#5A6069",
    lines=("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#FFFFFF"),
    diverging=("#56B4E9", "#23272E", "#E69F00"),
    sequential="viridis",
    span=(0.15, 1.0),
)


@contextmanager
def drawing(style: Style) -> Generator[None]:
    """Draw in a style inside the block; matplotlib's settings are as before after it.

    Args:
        style: colours to draw in.

    Yields:
        Nothing.

    Raises:
        LogError: if matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    settings: Any = {
        "figure.facecolor": style.ground,
        "savefig.facecolor": style.ground,
        "axes.facecolor": style.ground,
        "axes.edgecolor": style.faint,
        "axes.labelcolor": style.ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": style.faint,
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
        "text.color": style.ink,
        "xtick.color": style.ink,
        "ytick.color": style.ink,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "font.family": "DejaVu Sans",
        "image.interpolation": "nearest",
    }
    with matplotlib.rc_context(settings):
        yield


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise LogError("figures need matplotlib: pip install 'eafo-dynamic[plots]'") from None
    return matplotlib


def check_picture(out: str | Path) -> None:
    """Check that a figure can be drawn and that its file's ending is a format; call it before long work.

    Args:
        out: the file.

    Raises:
        ConfigError: if the ending is not that of a format.
        LogError: if matplotlib is not installed.
    """
    _matplotlib()
    if Path(out).suffix.lower() not in SUFFIXES:
        raise ConfigError("--out", str(out), "no picture format", f"End the name in {', '.join(SUFFIXES)}.")


def save(figure: Figure, out: str | Path) -> Path:
    """Write a figure to a file.

    Args:
        figure: the figure.
        out: the file; its ending, `.png`, `.svg` or `.pdf`, is the format.

    Returns:
        The file.

    Raises:
        ConfigError: if the ending is another one, or the file cannot be written.
    """
    check_picture(out)
    path, matplotlib = Path(out), _matplotlib()
    stamp = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    try:
        # Without a salt of its own every SVG has other names for the same things.
        with matplotlib.rc_context({"svg.hashsalt": "eafo_dynamic"}):
            figure.savefig(path, dpi=150, metadata=stamp)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise ConfigError("--out", str(out), problem, "Name a file in a folder that exists.") from None
    return path


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return some of the items, evenly spaced, the first and the last among them.

    Args:
        items: what to choose from.
        count: number wanted, at least 2.

    Returns:
        All items if there are no more than `count`.
    """
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]
