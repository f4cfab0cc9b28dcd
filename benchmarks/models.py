"""What the bridge makes of transformers' families: docs/models.md.

python benchmarks/models.py [FAMILY ...]       # tiny random models, seconds each; rows into results/models.jsonl
python benchmarks/models.py --table            # docs/models.md from these rows
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))
ROWS = Path(__file__).parent / "results" / "models.jsonl"
TABLE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """# Models of transformers, through the bridge

`awq.from_torch` makes a JAX function of transformers' own PyTorch code. Each family here as a tiny model with random
weights (2 layers, 64 wide): the largest difference of its logits to torch's over the largest of these, in float32; how
many of torch's linears are sites (experts of one matmul are sites beside them); how many folds there are, the
sites in them, and how far the logits move when all folds are made with random factors; the error of the logits of
rounding to nearest and of AWQ in 4 bits and groups of 32. Random weights have hardly any outliers, so the last two tell
that both run, not how good they are. Made by `python benchmarks/models.py`.

| family | logits | linears found | other sites | folds (sites) | after folds | nearest | AWQ |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    family: str
    error: float
    found: int
    linears: int
    others: int
    folds: int
    folded: int
    moved: float
    nearest: float | None = None
    awq: float | None = None

    def __str__(self) -> str:
        quantized = " | ".join("" if e is None else f"{e:.3f}" for e in (self.nearest, self.awq))
        return (
            f"| {self.family} | {self.error:.0e} | {self.found} of {self.linears} | {self.others} | "
            f"{self.folds} ({self.folded}) | {self.moved:.0e} | {quantized} |"
        )


def row(family: str, quantized: bool) -> Row:
    from hf_families import bridged, refolded

    import awq_jax as awq

    found = bridged(family)
    traced = awq.sites(found.fn, found.params, *found.inputs)
    linears = found.linears
    return Row(
        family,
        found.error,
        sum(param in traced.sites for param in linears.values()),
        len(linears),
        len(set(traced.sites) - set(linears.values())),
        len(traced.folds),
        len({site for fold in traced.folds for site in fold.sites}),
        found.apart(refolded(found, traced)),
        *(errors(found) if quantized else ()),
    )


def errors(found: Any) -> tuple[float, float]:
    """Of the logits, rounded to nearest and by AWQ in 4 bits and groups of 32."""
    import jax
    import numpy as np

    import awq_jax as awq

    calibration = awq.calibrate(found.fn, found.params, [found.inputs])

    def apart(recipe: awq.Recipe) -> float:
        params, _ = awq.quantize(found.params, calibration, replace(recipe, group_size=32))
        logits = np.asarray(jax.jit(awq.quantized(found.fn))(params, *found.inputs))
        return float(np.linalg.norm(logits - found.want) / np.linalg.norm(found.want))

    return apart(awq.PRESETS["rtn"]), apart(awq.Recipe())


def table() -> str:
    from hf_families import FAMILIES

    rows = {r["family"]: Row(**r) for r in map(json.loads, ROWS.read_text().splitlines())}
    lines = [str(rows[name]) for name in sorted(FAMILIES) if name in rows]
    lacking = [name for name in sorted(FAMILIES) if name not in rows]
    missing = f"\nNot traced: {', '.join(lacking)}, which loop over values.\n" if lacking else ""
    return HEAD + "\n".join(lines) + "\n" + missing


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if sys.argv[1:] == ["--table"]:
        TABLE.write_text(table())
        return
    from hf_families import FAMILIES

    names = [name for name in sys.argv[1:] if name != "--quantized"]
    for family in names or FAMILIES:
        try:
            found = row(family, "--quantized" in sys.argv)
        except ValueError as e:
            print(f"{family}: {e}", flush=True)
            continue
        with ROWS.open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        print(found, flush=True)


if __name__ == "__main__":
    main()
