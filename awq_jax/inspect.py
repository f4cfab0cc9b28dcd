"""What is in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from awq_jax.convert import REPORT
from awq_jax.formats.errors import reading
from awq_jax.formats.files import inside, parse_json
from awq_jax.load import load
from awq_jax.paths import named_leaves
from awq_jax.report import size
from awq_jax.tensor import is_quantized


def inspect(path: str | Path) -> Group:
    """Tables of a checkpoint's tensors (layers of the same shape and storage as one row) and its totals."""
    model = load(path)
    errors = read_errors(Path(path))
    rows: dict[tuple[Any, ...], list[str]] = {}
    total = dense_total = 0
    for name, leaf in named_leaves(model.params).items():
        kind = name.split("/", 1)[1] if name.startswith("layers_") else name
        stored = f"{leaf.spec.bits}-bit, g{leaf.spec.group_size}" if is_quantized(leaf) else str(leaf.dtype)
        rows.setdefault((kind, tuple(leaf.shape), stored, leaf.nbytes), []).append(name)
        total += leaf.nbytes
        dense_total += 2 * leaf.size
    # Short headings: with the sizes of a real model the table just fits a terminal.
    table = Table(title=escape(str(path)))
    for column in ("tensor", "shape", "stored as"):
        table.add_column(column)
    for column in ("n", "bytes", "error", "worst"):
        table.add_column(column, justify="right")
    for (kind, shape, stored, nbytes), names in rows.items():
        found = [errors[n] for n in names if n in errors]
        mean, worst = (f"{sum(found) / len(found):.2%}", f"{max(found):.2%}") if found else ("", "")
        shown = " x ".join(map(str, shape))
        table.add_row(kind, shown, stored, str(len(names)), size(nbytes * len(names)), mean, worst)
    sizes = Table.grid(padding=(0, 2))
    sizes.add_row("in memory", size(total), f"{dense_total / total:.2f} times smaller than in 16 bits")
    return Group(table, sizes)


def read_errors(folder: Path) -> dict[str, float]:
    """Each site's relative error from the report that `quantize_checkpoint` leaves, {} without one."""
    file = inside(folder, REPORT)
    if file is None:
        return {}
    with reading(f"{file} is no report of awq_jax", "delete it"):
        return {str(site["name"]): float(site["error"]) for site in parse_json(file) if site["spec"] is not None}
