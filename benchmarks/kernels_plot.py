"""Draws what gpu_steps.py found of the kernels: times as fast as bfloat16, and what the machine's ceilings would allow.

python benchmarks/kernels_plot.py [results/GPU.json ...]

Each gives a results/GPU.svg beside it; without names, all files that have figures of kernels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from gpu_kernels import BASELINE, OURS

mpl.rcParams["svg.hashsalt"] = "kernels"
RESULTS = Path(__file__).parent / "results"


def draw(device: str, rows: list[dict[str, Any]], file: Path) -> None:
    shapes = list(dict.fromkeys((row["k"], row["n"]) for row in rows))
    fig, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), sharey=True, layout="constrained")
    for ax, (k, n) in zip(axes if len(shapes) > 1 else [axes], shapes, strict=True):
        of_shape = sorted((row for row in rows if (row["k"], row["n"]) == (k, n)), key=lambda row: row["m"])
        dense = {row["m"]: row["us"] for row in of_shape if row["name"] == BASELINE}
        of_shape = [row for row in of_shape if row["m"] in dense]
        ours = [row for row in of_shape if row["name"] == OURS]
        ideal = [dense[row["m"]] / row["floor_us"] for row in ours]
        ax.plot([row["m"] for row in ours], ideal, color="gray", linestyle="--", label="the machine's ceilings")
        for name in dict.fromkeys(row["name"] for row in of_shape):
            of_name = [row for row in of_shape if row["name"] == name]
            speeds = [dense[row["m"]] / row["us"] for row in of_name]
            ax.plot([row["m"] for row in of_name], speeds, marker=".", label=name)
        ax.set_xscale("log", base=2)
        ax.set_title(f"{k} x {n}")
        ax.set_xlabel("rows of x")
        ax.spines[["top", "right"]].set_visible(False)
    fig.supylabel("times as fast as XLA in bfloat16")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    fig.suptitle(device)
    fig.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", default=sorted(RESULTS.glob("*.json")))
    for file in parser.parse_args().files:
        found = json.loads(file.read_text()).get("kernels")
        if found and found["details"]:
            draw(found["machine"]["device"], found["details"], file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
