"""Device time by kernel, summed over a profile that `benchmarks.step --trace FOLDER` has written.

python -m benchmarks.kernels FOLDER [--top 40] [--steps 3]
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path


def main(argv: list[str]) -> None:
    """Print the milliseconds per step, the number of calls, and the name of each kernel."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args(argv)
    from jax.profiler import ProfileData

    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    whole = 0.0
    for path in options.folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    name = f"{stats.get('hlo_op', '')} {event.name}"
                    name = " ".join(
                        "".join(c for c in word if not c.isdigit()) for word in name.split()
                    )[:150]
                    sums[name][0] += event.duration_ns / 1e6
                    sums[name][1] += 1
                    whole += event.duration_ns / 1e6
    sys.stdout.write(f"{whole / options.steps:9.2f} ms a step in all kernels\n")
    for name, (total, count) in sorted(sums.items(), key=lambda item: -item[1][0])[: options.top]:
        sys.stdout.write(f"{total / options.steps:9.2f} {count / options.steps:7.1f}  {name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
