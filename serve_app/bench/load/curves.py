"""Draws runs of `relay bench serve`: the distribution of latencies, and the time spent in each stage."""

from collections.abc import Mapping, Sequence
from html import escape

from serve_app.bench.load.figures import REST

WIDTH, MARGIN, PLOT_TOP, PLOT_BOTTOM = 760, 56, 60, 290
BARS_TOP, BAR_PITCH, BAR = 350, 26, 18
COLOURS = ("#3a7bd5", "#d5803a", "#3aa66b", "#b04ac2", "#c9a227", "#d53a5c", "#5a8f9e")
REST_COLOUR = "#8a8a8a"
STYLE = (
    "<style>text{font-size:12px;fill:#888}line{stroke:#888}polyline{fill:none;stroke-width:2}"
    ".mid{text-anchor:middle}.end{text-anchor:end}</style>"
)


def draw_curves(latencies: Mapping[str, Sequence[float]], stages: Mapping[str, Mapping[str, float]]) -> str:
    """Returns an SVG that is readable on white and on black.

    latencies: by load, the seconds of each answered request. stages: by load, its `stage_means`.
    """
    height = BARS_TOP + BAR_PITCH * len(stages) if any(stages.values()) else PLOT_BOTTOM + 50
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
            STYLE,
            *_legend(list(latencies), dict(zip(latencies, COLOURS * len(latencies), strict=False)), y=14),
            *_cumulative(latencies),
            *(_bars(stages) if any(stages.values()) else ()),
            "</svg>\n",
        ]
    )


def _cumulative(latencies: Mapping[str, Sequence[float]]) -> list[str]:
    """Returns the plot of the share of answered requests over their latency."""
    longest = max((max(of) for of in latencies.values() if of), default=1.0)
    right = WIDTH - MARGIN

    def place(seconds: float, share: float) -> str:
        x, y = MARGIN + seconds / longest * (right - MARGIN), PLOT_BOTTOM - share * (PLOT_BOTTOM - PLOT_TOP)
        return f"{x:.1f},{y:.1f}"

    marks = [
        f'<text x="{MARGIN}" y="{PLOT_TOP - 14}">share of the answered requests, over their latency in s</text>',
        f'<line x1="{MARGIN}" y1="{PLOT_BOTTOM}" x2="{right}" y2="{PLOT_BOTTOM}"/>',
        f'<line x1="{MARGIN}" y1="{PLOT_TOP}" x2="{MARGIN}" y2="{PLOT_BOTTOM}"/>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(share * longest, share).split(",")
        marks.append(f'<text class="mid" x="{x}" y="{PLOT_BOTTOM + 16}">{share * longest:.2g}</text>')
        marks.append(f'<text class="end" x="{MARGIN - 6}" y="{float(y) + 4:.0f}">{share:.0%}</text>')
    for number, of in enumerate(latencies.values()):
        steps = [place(0, 0)]
        for index, seconds in enumerate(sorted(of)):
            steps += [place(seconds, index / len(of)), place(seconds, (index + 1) / len(of))]
        marks.append(f'<polyline points="{" ".join(steps)}" stroke="{COLOURS[number % len(COLOURS)]}"/>')
    return marks


def _bars(stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Returns one bar per load, made of its stages' mean times in sequence."""
    names = list(dict.fromkeys(name for means in stages.values() for name in means))
    colours = {name: REST_COLOUR if name == REST else COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    left, right = MARGIN + 90, WIDTH - MARGIN - 60
    longest = max(sum(map(_shown, means.values())) for means in stages.values())
    marks = _legend(names, colours, y=BARS_TOP - 28)
    for number, (load, means) in enumerate(stages.items()):
        x, y = float(left), BARS_TOP + BAR_PITCH * number
        marks.append(f'<text class="end" x="{left - 8}" y="{y + 13}">{escape(load)}</text>')
        for name, ms in means.items():
            width = _shown(ms) / longest * (right - left)
            marks.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colours[name]}"/>')
            x += width
        marks.append(f'<text x="{x + 6:.1f}" y="{y + 13}">{sum(means.values()):.0f} ms</text>')
    return marks


def _shown(ms: float) -> float:
    """Clips at 0: the rest is negative if stages overlap."""
    return max(0.0, ms)


def _legend(names: Sequence[str], colours: Mapping[str, str], *, y: int) -> list[str]:
    x, marks = MARGIN, []
    for name in names:
        marks.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colours[name]}"/>')
        marks.append(f'<text x="{x + 18}" y="{y + 10}">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    return marks
