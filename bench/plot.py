"""python -m bench.plot r.json: draws results as r.png. Each point is a rival's device time over the row's floor (of a
kernel: over the time in which a copy moves its bytes); without a floor, as on a CPU, its time over the first rival's,
which is the frozen layer wherever there is one."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from .benches import BENCHES
from .rivals import OURS

MISSING = None if importlib.util.find_spec("matplotlib") else "matplotlib is missing: pip install matplotlib"


def ratios(row: dict, captions: dict[str, str]) -> tuple[str, dict[str, float]]:
    """What the times are divided by, and the quotients, by rival; without those that failed."""
    rivals = {n: row["rivals"][n] for n in captions if n in row["rivals"]}
    if "floor_ms" in row:
        return "the floor", {n: r["device_ms"] / row["floor_ms"] for n, r in rivals.items() if "device_ms" in r}
    if any("us" in r for r in rivals.values()):
        return "the floor", {n: r["us"] / r["copy_us"] for n, r in rivals.items() if "us" in r}
    measure = "device_ms" if any("device_ms" in r for r in rivals.values()) else "wall_ms"
    first, caption = next(iter(captions.items()))
    one = rivals.get(first, {}).get(measure)
    return caption, {n: r[measure] / one for n, r in rivals.items() if one and measure in r}


def draw(results: dict, path: Path) -> None:
    """A panel for each bench that took times, a line in it for each row, a point on that for each rival."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    panels = [b for b in BENCHES.values() if hasattr(b, "label") and results.get(b.KEY)]
    if not panels:
        print("nothing to draw: no times", file=sys.stderr)
        return
    heights = [1.6 + 0.35 * len(results[bench.KEY]) for bench in panels]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    for ax, bench in zip(figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0], panels, strict=True):
        rows = results[bench.KEY]
        points = [ratios(row, bench.NAMES) for row in rows]
        for name, caption in bench.NAMES.items():
            at = [(quotients[name], i) for i, (_, quotients) in enumerate(points) if name in quotients]
            if at:
                ax.plot(*zip(*at, strict=True), "kD" if name == OURS else "o", label=caption)
        ax.axvline(1, color="gray", linewidth=0.8)
        ax.set_yticks(range(len(rows)), [bench.label(row) for row in rows])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlabel(f"time over {points[0][0]}")
        ax.set_title(f"{bench.TITLE}: {bench.HEADING}")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(", ".join(results[key] for key in ("device", "commit", "date") if key in results))
    figure.savefig(path, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("file", type=Path)
    path = parser.parse_args().file
    if MISSING:
        parser.error(MISSING)
    draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
