"""What is in a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from awq_jax.formats import orbax
from awq_jax.formats.checkpoint import Checkpoint, open_checkpoint
from awq_jax.formats.servers import Target
from awq_jax.memory import nbytes_of, size
from awq_jax.pipeline.agreement import check_params
from awq_jax.pipeline.bridged import fallback
from awq_jax.pipeline.fused import Fused
from awq_jax.pipeline.load import architecture
from awq_jax.pipeline.report import read_report
from awq_jax.pipeline.targets import kernels, target_of
from awq_jax.weights.spec import QuantSpec

MAIN = re.compile(r"/(kernel|scale|embedding)$")
"""What the name of a layer's main param ends with."""
LAYER = re.compile(r"\.\d+\.")
"""The number of a layer or an expert in a name of torch's."""


@dataclass(frozen=True)
class Stored:
    """A param on disk: its shape, [in, out] of matrices, how it is stored, in how many bytes, what would run it."""

    shape: tuple[int, ...]
    stored_as: str
    nbytes: int
    spec: QuantSpec | None = None
    kernel: str = ""


def inspect(path: str | Path, target: str | None = None) -> Group:
    """Tables of a checkpoint's params (layers of the same shape and storage as one row) and its totals.

    Nothing but headers is read.

    Args:
      target: what is to run it; the table then says on which kernel.

    Raises:
      InputError: the checkpoint cannot be read, or there is no such target.
    """
    server = None if target is None else target_of(target)
    checkpoint = open_checkpoint(path)
    found, fused = own_params(checkpoint) if checkpoint.kind == "orbax" else params_of(checkpoint)
    found = found if server is None else with_kernels(checkpoint.kind, found, fused, server)
    errors = read_errors(checkpoint.path)
    # Short headings and names: with the sizes of a real model the table just fits a terminal.
    table = Table(title=escape(str(path)))
    for column in ("tensor", "shape", "stored as"):
        table.add_column(column)
    for column in ("n", "bytes", "bits", *(("error", "worst") if errors else ())):
        table.add_column(column, justify="right")
    if server is not None:
        table.add_column(f"on {server.name}")
    inside = {name for name in found if name.startswith("layers_")}
    for section in (found.keys() - inside, inside):
        rows: dict[tuple[str, Stored], list[str]] = {}
        for name in (name for name in found if name in section):
            kind = name.split("/", 1)[1] if name in inside else name
            rows.setdefault((MAIN.sub("", LAYER.sub(".*.", kind)), found[name]), []).append(name)
        for (kind, one), names in rows.items():
            known = [errors[n] for n in names if n in errors]
            shown = (f"{sum(known) / len(known):.2%}", f"{max(known):.2%}") if known else ("", "") if errors else ()
            shown += (one.kernel,) if server else ()
            shape, nbytes = " x ".join(map(str, one.shape)), len(names) * one.nbytes
            bits = f"{8 * one.nbytes / math.prod(one.shape):.2f}"
            table.add_row(kind, shape, one.stored_as, str(len(names)), size(nbytes), bits, *shown)
        table.add_section()
    weights = sum(math.prod(one.shape) for one in found.values())
    totals = Table.grid(padding=(0, 2))
    nbytes = checkpoint.nbytes
    totals.add_row(
        "tensors on disk",
        size(nbytes),
        f"{8 * nbytes / weights:.2f} bits a weight",
        f"{2 * weights / nbytes:.2f} times smaller than 16 bits",
    )
    return Group(table, totals)


def params_of(checkpoint: Checkpoint) -> tuple[dict[str, Stored], Fused]:
    """The params of a checkpoint by the names that they have here, or in the file where no model here computes it; and
    those of which servers make one matrix, where that is known."""
    if fallback(checkpoint) is not None:
        return {name: Stored(t.shape, t.stored_as, t.nbytes, t.spec) for name, t in checkpoint.tensors.items()}, {}
    family, config = architecture(checkpoint)

    def found(shape: tuple[int, ...], names: Sequence[str]) -> Stored:
        tensors = [checkpoint.tensors[name] for name in names]
        return Stored(shape, tensors[0].stored_as, sum(t.nbytes for t in tensors), tensors[0].spec)

    return {path: found(s.shape, s.names) for path, s in family.stored(config).items()}, family.fused(config)


def with_kernels(format: str, found: Mapping[str, Stored], fused: Fused, target: Target) -> dict[str, Stored]:
    """Params that say what they would run on."""
    weights = {name: (one.shape, one.spec) for name, one in found.items() if one.spec}
    on = kernels(target, format, weights, list(fused.values()))
    return {name: replace(one, kernel=on.get(name, "dense")) for name, one in found.items()}


def own_params(checkpoint: Checkpoint) -> tuple[dict[str, Stored], Fused]:
    """As `params_of`, of a folder in our own format."""
    params = orbax.shapes(checkpoint.path)
    family, config = architecture(checkpoint)
    check_params(checkpoint.path, params, config)

    def stored(leaf: Any) -> Stored:
        parts = jax.tree.leaves(leaf)
        nbytes = nbytes_of(parts)
        spec = getattr(leaf, "spec", None)
        stored_as = f"{spec.bits}-bit g{spec.group_size}" if spec else str(leaf.dtype)
        return Stored(tuple(leaf.shape), stored_as, nbytes, spec)

    return {name: stored(leaf) for name, leaf in params.items()}, family.fused(config)


def read_errors(folder: Path) -> dict[str, float]:
    """Each site's relative error from the report that `quantize_checkpoint` leaves, {} without one."""
    return dict(read_report(folder, lambda site: (str(site["name"]), float(site["error"]))))
