"""What a quantized model is written as: one format or several, of which one search serves all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from awq_jax.errors import InputError, one_line
from awq_jax.formats import orbax
from awq_jax.formats.checkpoint import Checkpoint
from awq_jax.formats.codecs import WRITTEN, Codec
from awq_jax.formats.codecs import check_fits as check_weight
from awq_jax.formats.quantized_writer import Writer
from awq_jax.models.family import Family
from awq_jax.near import did_you_mean
from awq_jax.pipeline.fused import Fused, left_whole
from awq_jax.transforms.finite import require_finite_weights
from awq_jax.transforms.recipe import GROUPS, Recipe
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import is_quantized

OURS = "orbax"
FORMATS = (*WRITTEN, OURS)


def formats_of(said: str | Sequence[str], argument: str = "format") -> tuple[str, ...]:
    """The formats that are asked for, "awq,mlx" or ["awq", "mlx"].

    Args:
      argument: where they are asked for.

    Raises:
      InputError: none, one that there is not, or one twice.
    """
    names = [said] if isinstance(said, str) else list(said)
    found = tuple(part.strip() for name in names for part in str(name).split(","))
    if odd := [name for name in found if name not in FORMATS]:
        raise InputError(f"{argument}={odd[0]!r}: choose one of {', '.join(FORMATS)}{did_you_mean(odd[0], FORMATS)}.")
    if not found or len({*found}) < len(found):
        raise InputError(f"{argument}={','.join(found)!r}: name one format or several, each once.")
    return found


def codecs_of(formats: Sequence[str]) -> list[Codec]:
    """The codecs among formats."""
    return [WRITTEN[name] for name in formats if name in WRITTEN]


def refuse_in_out(model: str | Path, family: Family, formats: Sequence[str], argument: str = "format") -> None:
    """Refuse formats, of an argument, whose readers would take a family's [in, out] matrices for [out, in] ones."""
    if codecs_of(formats) and family.in_out:
        raise in_out_refused(model, family.architectures[0], formats, f"write {argument}='orbax'")


def in_out_refused(model: str | Path, architecture: str, formats: Sequence[str], remedy: str) -> InputError:
    """The error for [in, out] matrices in formats of codecs."""
    return InputError(
        f"{model}: readers of {codecs_of(formats)[0].title} files replace linear layers only, and those of "
        f"{architecture} are stored the other way round (Conv1D): {remedy}."
    )


def places(formats: Sequence[str], folder: Path) -> dict[str, Path]:
    """The folder of each format: `folder` itself for one, for several one of the format's name in it."""
    found = {name: folder if len(formats) == 1 else folder / name for name in formats}
    for place in found.values():
        place.mkdir(exist_ok=True)
    return found


def for_formats(recipe: Recipe, formats: Sequence[str]) -> Recipe:
    """`recipe` with scales where all of the formats have room for them: folded for all but ours."""
    served = bool(codecs_of(formats))
    return replace(recipe, scales="folded" if served else "beside")


def fitted(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]], formats: Sequence[str]) -> tuple[Recipe, str]:
    """`recipe` with the largest group size that divides the inputs of all its sites, and a line that says so."""
    rules = ((recipe.rule_of(name), i) for name, (*_, i, _) in shapes.items())
    widths = sorted({i for rule, i in rules if rule is None or not (rule.skip or rule.group_size)})
    known, all_ = ", ".join(map(str, GROUPS)), ", ".join(map(str, widths))
    group = next((g for g in GROUPS if all(i % g == 0 for i in widths)), None)
    if group is None and (served := codecs_of(formats)):
        raise InputError(
            f"No group size of {known} divides all widths ({all_}), as {served[0].title} files need: leave sites dense "
            "(skip=True in a rule), or write format='orbax', which pads."
        )
    if group is None:
        return replace(recipe, group_size=GROUPS[0]), f"Groups of {GROUPS[0]}, padded: none of {known} divides {all_}."
    return replace(recipe, group_size=group), f"Groups of {group}: the largest of {known} that divides {all_}."


def check_average(formats: Sequence[str], bits: float) -> None:
    """Refuse bits by site where a format has one width for all."""
    if one := [codec.title for codec in codecs_of(formats) if not codec.holds.mixed]:
        raise InputError(f"{bits} bits on average: an {one[0]} file has one width, use format='orbax'.")


def check_fits(formats: Sequence[str], shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, fused: Fused) -> None:
    """Refuse, before any work, weights that one of the formats cannot hold, or that its readers cannot join.

    Args:
      shapes: (i, o) of each site by its path, (experts, i, o) of theirs.
    """
    specs = {name: spec for name in shapes if (spec := recipe.spec_of(name)) is not None}
    if not specs:
        raise InputError("The rules (skip=True in a rule) leave every matrix dense: drop one of them.")
    for name, spec in specs.items() if OURS in formats else ():
        check_group(name, shapes[name], spec)
    for codec in codecs_of(formats):
        for name, spec in specs.items():
            check_weight(codec, name, shapes[name][-2:], spec)
            if not codec.holds.mixed and (spec.bits, spec.group_size) != (recipe.bits, recipe.group_size):
                raise InputError(
                    f"{name}: a rule gives it {spec.bits} bits in groups of {spec.group_size}, but an {codec.title} "
                    f"file has one of each ({recipe.bits}, {recipe.group_size}): skip the site, or write "
                    "format='orbax'."
                )
        for names in fused.values():
            if len({specs[name] for name in names if name in specs}) > 1:
                raise InputError(
                    f"{', '.join(names)}: rules give them different bits, groups or symmetry, but servers make one "
                    "matrix of them: give all the same, or write format='orbax'."
                )


def check_group(name: str, shape: tuple[int, ...], spec: QuantSpec) -> None:
    """Refuse groups of which most would be padding, in a format that pads."""
    if spec.group_size > max(shape[-2], GROUPS[0]):
        raise InputError(
            f"{name}: group_size={spec.group_size} is more than its {shape[-2]} input features: give group_size=-1 for "
            "one group a column."
        )


def writer(
    format: str, folder: Path, checkpoint: Checkpoint, family: Family, recipe: Recipe, fused: Fused
) -> tuple[Callable[[str, Any], None], Callable[[str], None]]:
    """`(write(part, params), finish(dtype))` of a format; ours is read in any dtype."""
    kept: orbax.Writer | Writer
    if format == OURS:
        kept = own = orbax.Writer(folder, checkpoint, recipe)
        named = lambda part, params: halved(params) if checkpoint.kind == "gguf" else params
        finish: Callable[[str], None] = lambda dtype: own.finish()
    else:
        kept = theirs = Writer(WRITTEN[format], folder, checkpoint, recipe.spec, left_whole(recipe, fused))
        named, finish = lambda part, params: family.to_names({part: params}), theirs.finish

    def write(part: str, params: Any) -> None:
        # What stays dense is not seen by any search, which would refuse it.
        require_finite_weights(params, f"{part}/")
        kept.write(part, named(part, params))

    return write, finish


def halved(params: Any) -> Any:
    """Matrices that stay dense in float16, where it holds them: a GGUF gives float32 for what it stores in less.

    Held are rows of which no weight changes by more than float16's precision of the largest.
    """

    def half(w: Any) -> Any:
        if is_quantized(w) or w.ndim < 2:
            return w
        small = jnp.asarray(w).astype(jnp.float16)
        eps = float(jnp.finfo(jnp.float16).eps)
        fits = (jnp.abs(small.astype(w.dtype) - w).max(-1) <= eps * jnp.abs(w).max(-1)).all()
        return small if fits else w

    return jax.tree.map(half, params, is_leaf=is_quantized)


def named_failure(out: str | Path, f: Callable[..., None]) -> Callable[..., None]:
    """`f`, its errors as one that says where they happened: what a full disk raises depends on the library."""

    def run(*args: Any) -> None:
        try:
            f(*args)
        except InputError:
            raise
        except (OSError, ValueError) as e:
            reason = one_line(e, 2000)
            advice = ": free space or choose another disk" if "no space" in reason.lower() else ""
            raise OSError(f"{out} could not be written ({reason}){advice}.") from e

    return run
