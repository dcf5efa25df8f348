"""From matplotlib axes to inline SVG.

The colors of the SVG are CSS variables of the page, so that one drawing serves light mode, dark mode and print. matplotlib
draws with placeholder colors, which are replaced in its output.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLORS = {name: f"#fe01{i:02x}" for i, name in enumerate(("ink", "muted", "line", "teacher", "student"))}
"""CSS variable -> placeholder color."""
_STYLE: dict[Any, Any] = {  # matplotlib types the keys as literals, which f-strings are not
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["muted"],
    "axes.edgecolor": COLORS["line"],
    "axes.axisbelow": True,
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.7,
    "ytick.major.size": 0,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{f"{axis}tick.color": COLORS["line"] for axis in "xy"},
    **{f"{axis}tick.labelcolor": COLORS["muted"] for axis in "xy"},
}


@dataclass(frozen=True)
class Plot:
    """A chart; `note` is shown below its title."""

    title: str
    note: str
    svg: Markup


Draw = Callable[[Axes], None]


def plot(title: str, note: str, label: str, draw: Draw, height: float = 2.5, width: float = 4.2) -> Plot:
    """Render a chart.

    Args:
        label: text alternative for screen readers.
        draw: draws on the axes.
        height, width: in inches. The default width is that of a phone; the page scales the SVG.

    Returns:
        The chart. Its SVG has no ids that could collide on the page, no links and no fixed size.
    """
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has the glyph
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", buffer.getvalue(), count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box, "matplotlib writes a viewBox"
    svg = f'<svg {view_box[0]} role="img" aria-label="{escape(label)}">' + svg[svg.index(">") + 1 :]
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return Plot(title, note, Markup(svg))


def count_axis(axes: Axes, label: str) -> None:
    """Format x as counts and draw horizontal grid lines."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")


def bars(
    title: str,
    note: str,
    values: Mapping[str, float],
    colors: Sequence[str],
    shown: Callable[[float], str],
    samples: Mapping[str, Sequence[float]] | None = None,
) -> Plot:
    """Draw horizontal bars with their values.

    Args:
        values: name -> length of the bar.
        colors: a key of `COLORS` for each bar.
        shown: formats a value.
        samples: name -> the measurements that the value summarizes, drawn as rings.
    """

    def draw(axes: Axes) -> None:
        widths = list(values.values())
        axes.barh(list(values), widths, height=0.62, color=[COLORS[color] for color in colors])
        ends = list(widths)
        for row, name in enumerate(values):
            each = (samples or {}).get(name, ())
            axes.plot(each, [row] * len(each), "o", ms=3.5, mfc="none", mec=COLORS["ink"], mew=0.9)
            ends[row] = max([widths[row], *each])
        for row, value in enumerate(widths):
            axes.annotate(shown(value), (ends[row], row), (6, 0), textcoords="offset points", va="center")
        axes.set(xlim=(0, 1.32 * max(ends) or 1), ylim=(len(values) - 0.4, -0.6))
        axes.tick_params(axis="y", labelcolor=COLORS["ink"])
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    label = f"{title}: " + ", ".join(f"{name} {shown(value)}" for name, value in values.items())
    return plot(title, note, label, draw, 0.5 + 0.26 * len(values))
