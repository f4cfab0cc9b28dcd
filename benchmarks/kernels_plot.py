"""Draws results/kernels.svg from results/kernels.json, which kernels.py writes.

python benchmarks/kernels_plot.py [--from kernels.json] [--to kernels.svg]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.rcParams["svg.hashsalt"] = "kernels"
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--to", type=Path, default=RESULTS / "kernels.svg")
    options = parser.parse_args()
    result = json.loads(options.source.read_text())
    shapes = list(dict.fromkeys((row["k"], row["n"]) for row in result["rows"]))
    fig, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), sharey=True, layout="constrained")
    for ax, (k, n) in zip(axes if len(shapes) > 1 else [axes], shapes, strict=True):
        of_shape = [row for row in result["rows"] if (row["k"], row["n"]) == (k, n)]
        for name in dict.fromkeys(row["name"] for row in of_shape):
            of_name = [row for row in of_shape if row["name"] == name]
            ax.plot([row["m"] for row in of_name], [row["over_bf16"] for row in of_name], marker=".", label=name)
        ax.set_xscale("log", base=2)
        ax.set_title(f"{k} x {n}")
        ax.set_xlabel("rows of x")
        ax.spines[["top", "right"]].set_visible(False)
    fig.supylabel("times as fast as XLA in bfloat16")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    fig.suptitle(result["device"])
    fig.savefig(options.to, metadata={"Date": None})


if __name__ == "__main__":
    main()
