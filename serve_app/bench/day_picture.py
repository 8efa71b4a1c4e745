"""Draws the simulated day: GPUs held over the day, and how well each placement uses its GPUs."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from serve_app.bench.report import Row

WIDTH, HEIGHT, MARGIN = 760, 700, 56
PLOT_BOTTOM, BARS_TOP, BAR = 260, 330, 15
COLOURS = ("#8a8a8a", "#3a7bd5", "#3aa55b", "#d5803a")
"""Colours of the placements, in the order of the rows."""


def draw_day(rows: Sequence[Row], held_gpus: Mapping[str, npt.NDArray[np.int64]]) -> str:
    """Returns an SVG that is readable on white and on black.

    rows: as `relay bench simulate` reports them. held_gpus: by placement, [T], the GPUs held at every second in
    the runs of the last rows.
    """
    colours = dict(zip(held_gpus, COLOURS, strict=True))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
            "<style>text{font-size:12px;fill:#888}line{stroke:#888}polyline{fill:none;stroke-width:2}"
            ".mid{text-anchor:middle}.end{text-anchor:end}</style>",
            *_legend(colours),
            *_curves(held_gpus, colours, rows[-1]["gpus"]),
            *_bars(rows, colours, "use", "utilisation of held GPUs", left=MARGIN, longest=1.0, form="{:.0%}"),
            *_bars(rows, colours, "p95_s", "p95 latency", left=WIDTH // 2 + MARGIN, longest=60.0, form="{:.0f} s"),
            "</svg>\n",
        ]
    )


def _legend(colours: Mapping[str, str]) -> list[str]:
    x, marks = MARGIN, []
    for name, colour in colours.items():
        marks.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{colour}"/>')
        marks.append(f'<text x="{x + 18}" y="24">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    return marks


def _curves(
    held_gpus: Mapping[str, npt.NDArray[np.int64]], colours: Mapping[str, str], num_gpus: object
) -> list[str]:
    """Returns the curves of GPUs held over the hours. Each point is the maximum over many seconds."""
    top, right = 50, WIDTH - MARGIN
    most = max(int(held.max()) for held in held_gpus.values())
    marks = [
        f'<text x="{MARGIN}" y="{top - 6}">GPUs held over the day, out of {num_gpus}</text>',
        f'<line x1="{MARGIN}" y1="{PLOT_BOTTOM}" x2="{right}" y2="{PLOT_BOTTOM}"/>',
        f'<line x1="{MARGIN}" y1="{top}" x2="{MARGIN}" y2="{PLOT_BOTTOM}"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = MARGIN + share * (right - MARGIN), PLOT_BOTTOM - share * (PLOT_BOTTOM - top)
        marks.append(f'<text class="mid" x="{x:.0f}" y="{PLOT_BOTTOM + 16}">{24 * share:.0f} h</text>')
        marks.append(f'<text class="end" x="{MARGIN - 6}" y="{y + 4:.0f}">{most * share:.0f}</text>')
    for name, held in held_gpus.items():
        points = held[: len(held) // 240 * 240].reshape(240, -1).max(axis=1)
        path = " ".join(
            f"{MARGIN + i / 239 * (right - MARGIN):.1f},{PLOT_BOTTOM - value / most * (PLOT_BOTTOM - top):.1f}"
            for i, value in enumerate(points)
        )
        marks.append(f'<polyline points="{path}" stroke="{colours[name]}"/>')
    return marks


def _bars(
    rows: Sequence[Row], colours: Mapping[str, str], key: str, title: str, *, left: int, longest: float, form: str
) -> list[str]:
    """Returns one bar per row, beside the number of GPUs. A bar over `longest` is cut; its label has the value."""
    marks = [f'<text x="{left}" y="{BARS_TOP - 20}">{title}</text>']
    y, gpus = float(BARS_TOP), None
    for row in rows:
        if row["gpus"] != gpus:
            gpus, y = row["gpus"], y + 6 * (gpus is not None)
            marks.append(f'<text class="end" x="{left - 6}" y="{y + 12:.0f}">{gpus}</text>')
        value = float(row[key])
        length = min(value / longest, 1) * 210
        colour = colours[str(row["placement"])]
        marks.append(f'<rect x="{left}" y="{y:.0f}" width="{length:.1f}" height="{BAR - 3}" fill="{colour}"/>')
        marks.append(f'<text x="{left + length + 5:.1f}" y="{y + 11:.0f}">{form.format(value)}</text>')
        y += BAR
    return marks
