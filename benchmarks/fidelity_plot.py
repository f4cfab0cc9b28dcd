"""Draws docs/fidelity.svg from benchmarks/results/fidelity.json, which fidelity.py writes.

python benchmarks/fidelity_plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.rcParams["svg.hashsalt"] = "fidelity"
HERE = Path(__file__).parent


def main() -> None:
    rows = json.loads((HERE / "results" / "fidelity.json").read_text())["result"]["rows"]
    rows = {name: by_text for name, by_text in rows.items() if " g64" in name}
    texts = list(next(iter(rows.values())))
    names = sorted(rows, key=lambda name: -sum(rows[name][text]["kl"] for text in texts))
    fig, ax = plt.subplots(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    height = 0.8 / len(texts)
    for k, text in enumerate(texts):
        at = [y + (k - (len(texts) - 1) / 2) * height for y in range(len(names))]
        bars = ax.barh(at, [rows[name][text]["kl"] for name in names], height * 0.9, label=text)
        ax.bar_label(bars, [f"{rows[name][text]['kl']:.3f}" for name in names], padding=3, fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("KL(dense || quantized) per token, nats; shorter is better")
    ax.legend(loc="lower right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(HERE.parent / "docs" / "fidelity.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
