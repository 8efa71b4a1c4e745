"""Draws points for which less is better on both axes, and the frontier of those that no other point beats."""

from collections.abc import Iterable, Mapping
from html import escape

WIDTH, HEIGHT, MARGIN = 720, 440, 60
LABEL_WIDTH, LABEL_HEIGHT = 90, 13
Point = tuple[float, float]


def draw_frontier(points: Mapping[str, Point], *, x_label: str, y_label: str) -> str:
    """Returns an SVG that is readable on white and on black. points: by name, each (x, y)."""
    x_max, y_max = (1.1 * max(point[axis] for point in points.values()) for axis in (0, 1))

    def place(point: Point) -> Point:
        return (
            MARGIN + point[0] / x_max * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - point[1] / y_max * (HEIGHT - 2 * MARGIN),
        )

    best = find_frontier(points.values())
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, best))
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if point in best else 3.5}"/>'
        for point in points.values()
        for x, y in [place(point)]
    ]
    labels = [
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{"end" if x < place(points[name])[0] else "start"}">'
        f"{escape(name)}</text>"
        for name, (x, y) in _place_labels({name: place(point) for name, point in points.items()}).items()
    ]
    ticks = [
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - MARGIN + 18}">{_shown(x_max * share)}</text>'
        f'<text class="tick" x="{MARGIN - 26}" y="{y + 4:.1f}">{_shown(y_max * share)}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
        for x, y in [place((x_max * share, y_max * share))]
    ]
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
            "<style>text{font-size:12px;fill:#888}circle{fill:#3a7bd5}.tick{text-anchor:middle}"
            "polyline,line{fill:none;stroke:#888}polyline{stroke:#3a7bd5;stroke-width:2}</style>",
            f'<line x1="{MARGIN}" y1="{bottom}" x2="{right}" y2="{bottom}"/>',
            f'<line x1="{MARGIN}" y1="{MARGIN}" x2="{MARGIN}" y2="{bottom}"/>',
            f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT - 14}">{escape(x_label)}</text>',
            f'<text x="{MARGIN - 40}" y="{MARGIN - 20}">{escape(y_label)}</text>',
            *ticks,
            f'<polyline points="{path}"/>',
            *marks,
            *labels,
            "</svg>\n",
        ]
    )


def _place_labels(marks: Mapping[str, Point]) -> dict[str, Point]:
    """Returns, by name, where a label starts, or where it ends if left of its mark. No two labels overlap."""
    placed: dict[str, Point] = {}
    for name, (x, y) in sorted(marks.items(), key=lambda mark: mark[1][1]):
        is_left = x > 0.75 * WIDTH
        beside = (other[1] for other in placed.values() if abs(other[0] - x) < LABEL_WIDTH)
        lowest = max((other + LABEL_HEIGHT for other in beside), default=0.0)
        placed[name] = (x - 8 if is_left else x + 8, max(y + 4, lowest))
    return placed


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def find_frontier(points: Iterable[Point]) -> list[Point]:
    """Returns the points that no other beats on both axes, from the least x to the least y."""
    frontier: list[Point] = []
    for point in sorted(points):
        if not frontier or point[1] < frontier[-1][1]:
            frontier.append(point)
    return frontier
