"""Draws a placement: one column per GPU, as high as its memory, filled with the processes on that GPU."""

from collections.abc import Iterator
from html import escape

from cluster.machines.inventory import Gpu
from deployments.plan.place import Process, gib
from deployments.plan.plan import Plan

COLUMN, GAP, HEIGHT, TOP, LEFT = 196, 28, 300, 70, 24
"""In pixels: width of a GPU's column, gap between columns, height of the largest GPU, top and left margin."""
COLOURS = {"encode": "#2a9d8f", "denoise": "#3a7bd5", "decode": "#e09f3e"}
LEAST_LABELLED = 14
"""In pixels: a process with a lower box than this is only labelled below the column."""


def draw_placement(plan: Plan) -> str:
    """Returns an SVG that is readable on white and on black; the same plan gives the same bytes."""
    gpus = plan.placement.gpus
    most = max(gpu.memory_bytes for gpu in gpus)
    foot = 18 * max((len(plan.placement.on(gpu)) for gpu in gpus), default=0) + 40
    width, height = LEFT + len(gpus) * (COLUMN + GAP), TOP + HEIGHT + foot
    asked = ", ".join(map(str, plan.sizes.sizes))
    title = f"{plan.name} at {asked}" + ("" if not plan.shortfalls else ": does not fit")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 420)} {height}" '
        'font-family="sans-serif">',
        "<style>text{font-size:11px;fill:#888}.title{font-size:15px}.on{fill:#fff}"
        ".gpu{fill:none;stroke:#888}.over{fill:none;stroke:#d62828;stroke-width:2}</style>",
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
    ]
    for column, gpu in enumerate(gpus):
        parts += _column(plan, gpu, LEFT + column * (COLUMN + GAP), HEIGHT / most)
    return "\n".join([*parts, "</svg>\n"])


def _column(plan: Plan, gpu: Gpu, x: int, scale: float) -> Iterator[str]:
    """scale: pixels per byte."""
    bottom, height = TOP + HEIGHT, gpu.memory_bytes * scale
    used = plan.placement.used_bytes(gpu)
    use = "" if plan.rate is None else f", busy {plan.rate.gpu_use[gpu]:.0%}"
    yield f'<text x="{x}" y="{bottom - height - 20:.1f}">{escape(str(gpu))}</text>'
    yield f'<text x="{x}" y="{bottom - height - 6:.1f}">{gib(used)} of {gib(gpu.memory_bytes)}{use}</text>'
    top = float(bottom)
    for line, process in enumerate(plan.placement.on(gpu)):
        part = process.bytes_on(gpu) * scale
        top -= part
        yield (
            f'<rect x="{x}" y="{max(top, 0):.1f}" width="{COLUMN}" height="{part:.1f}" rx="2" '
            f'fill="{COLOURS[process.stage]}"/>'
        )
        if part >= LEAST_LABELLED:
            yield f'<text class="on" x="{x + 6}" y="{top + part / 2 + 4:.1f}">{escape(_label(process))}</text>'
        y = bottom + 20 + 18 * line
        yield f'<rect x="{x}" y="{y - 9}" width="10" height="10" rx="2" fill="{COLOURS[process.stage]}"/>'
        yield f'<text x="{x + 16}" y="{y}">{escape(_legend(process, gpu))}</text>'
    kind = "over" if used > gpu.memory_bytes else "gpu"
    yield f'<rect class="{kind}" x="{x}" y="{bottom - height:.1f}" width="{COLUMN}" height="{height:.1f}" rx="2"/>'


def _label(process: Process) -> str:
    blocks = process.sizes.blocks or ()
    ranges = dict.fromkeys(f"{start}-{end - 1}" for start, end in blocks)
    return str(process) + (f": {', '.join(ranges)}" if ranges else "")


def _legend(process: Process, gpu: Gpu) -> str:
    return f"{process} {gib(process.bytes_on(gpu))} ({process.num_gpus:g})"
