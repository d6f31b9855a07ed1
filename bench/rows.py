"""Rows of results: a shape, and what each rival took at it. How they are gathered, and how they look as a table."""

from collections.abc import Callable, Container, Iterable

from .rivals import COMPILED, OURS
from .shapes import Shape

CAPTIONS = {"device_ms": "device", "wall_ms": "wall", "peak_mib": "peak"}
TIMES = {"ms": {"device_ms": "{:.3f}", "wall_ms": "{:.2f}"}, "µs": {"device_ms": "{:.1f}", "wall_ms": "{:.0f}"}}
PER_MS = {"ms": 1, "µs": 1e3}


def measured(
    key: str,
    shapes: Iterable[Shape],
    names: Iterable[str],
    quick: bool,
    note: Callable[[str], None],
    measure: Callable[[Shape, list[str], bool], dict[str, dict]],
    compiled: Container[Shape] = (),
) -> list[dict]:
    """A row for each shape. `compiled`: where there is time to compile PEFT's layer; never on a quick run."""
    rows = []
    for shape in shapes:
        note(f"{key}: {shape}")
        chosen = [n for n in names if n != COMPILED or (shape in compiled and not quick)]
        rows.append(vars(shape) | {"rivals": measure(shape, chosen, quick)})
    return rows


def table(
    rows: list[dict], captions: dict[str, str], heading: str, label: Callable[[dict], str], unit: str = "ms"
) -> list[str]:
    """Markdown: a column for each rival, a cell for what it took; a floor where one was measured, and our device time
    over it."""
    names = [n for n in captions if any(n in row["rivals"] for row in rows)]
    units = {"device_ms": unit, "wall_ms": unit, "peak_mib": "MiB"}
    measures = [m for m in units if any(m in r for row in rows for r in row["rivals"].values())]
    columns = [f"**{captions[n]}**" if n.startswith(OURS) else captions[n] for n in names]
    floors = any("floor_ms" in row for row in rows)
    if floors:
        columns.append(f"floor {unit}, dora_ext over it")
    lines = [
        f"Each cell: {' / '.join(f'{CAPTIONS[m]} {units[m]}' for m in measures)}.",
        "",
        f"| {heading} | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = [_cell(row["rivals"].get(n), measures, unit) for n in names]
        if floors:
            cells.append(_floor(row, unit))
        lines.append(f"| {label(row)} | " + " | ".join(cells) + " |")
    return lines


def _cell(result: dict | None, measures: list[str], unit: str) -> str:
    """What could be measured before a failure is told."""
    if result is None:
        return ""
    if not any(m in result for m in measures):
        return "failed"
    return " / ".join(_number(result[m], m, unit) if m in result else "failed" for m in measures)


def _number(value: float, measure: str, unit: str) -> str:
    return f"{value:.0f}" if measure == "peak_mib" else TIMES[unit][measure].format(value * PER_MS[unit])


def _floor(row: dict, unit: str) -> str:
    if "floor_ms" not in row:
        return ""
    floor, ours = row["floor_ms"], row["rivals"].get(OURS, {}).get("device_ms")
    return _number(floor, "device_ms", unit) + ("" if ours is None else f", {ours / floor:.2f}")
