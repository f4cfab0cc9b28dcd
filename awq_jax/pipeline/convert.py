"""`convert`: a quantized model from one format to another, without loss or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float

from awq_jax.errors import InputError
from awq_jax.files import inside
from awq_jax.formats import orbax
from awq_jax.formats.chat_syntax import broken_templates
from awq_jax.formats.checkpoint import Checkpoint, open_checkpoint
from awq_jax.formats.codecs import WRITTEN, Codec, Codes, codes_of, tensor_of
from awq_jax.formats.codecs.codec import group_for, lacks, no_room, usual
from awq_jax.formats.declared import FIELDS
from awq_jax.formats.half import as_float16
from awq_jax.formats.quantized_writer import HEAD, Writer
from awq_jax.formats.written import check_destination, written_whole
from awq_jax.models.family import param_shapes
from awq_jax.pipeline.decoder import Progress
from awq_jax.pipeline.load import architecture
from awq_jax.pipeline.outputs import OURS, check_group, formats_of, named_failure, places, refuse_in_out
from awq_jax.pipeline.report import REPORT
from awq_jax.pipeline.weights_of import Weights, weights_of
from awq_jax.weights.spec import QuantSpec
from awq_jax.weights.tensor import QuantizedTensor, dequantize, is_quantized, round_to_nearest

DECLARED = "give symmetric=True if its zero points are all the middle one, or "
ANEW = "give requantize=True to round it anew, which loses a little, or choose another format"
WIDE = "has steps in float32 that float16, in which files of servers have them, does not hold"


@dataclass(frozen=True)
class Undeclared:
    """What a folder takes over from a checkpoint, without what that says of its quantization."""

    config: Mapping[str, Any]
    companions: Sequence[Path]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Undeclared:
        return cls({k: v for k, v in checkpoint.config.items() if k not in FIELDS}, checkpoint.companions)


def convert(
    model: str | Path,
    out: str | Path,
    to: str | Sequence[str],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
    told: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the quantized model at `model` into the folder `out` in another format.

    Codes, steps, zero points and dense tensors stay as they are, to the bit, and are checked to; memory holds one of
    them at a time.

    Args:
      model: a folder in any format that `load` reads, quantized.
      out: a new or empty folder, or one that this package wrote, with `overwrite`.
      to: a format or several, as for `quantize_checkpoint`.
      bits, group_size, symmetric: other ones than the weights have; None for theirs. Weights whose zero points are the
        middle code are declared symmetric without loss.
      requantize: round weights to nearest that the format does not hold as they are.
      told: called with a line on what was done.

    Raises:
      FileExistsError: `out` holds something.
      InputError: a weight that the format does not hold as it is, and the argument that helps; by what headers tell,
        before any work.

    Example:
      >>> awq.convert("model-awq", "model-ct", "compressed-tensors")
    """
    formats = formats_of(to, "to")
    given = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    asked = {name: value for name, value in given.items() if value is not None}
    replace(QuantSpec(), **asked)  # Raises where a number is out of range.
    check_destination(out, overwrite=overwrite, inputs=[model])
    checkpoint = open_checkpoint(model)
    if checkpoint.kind in ("huggingface", "gguf"):
        raise InputError(f"{model} is not quantized in a format that is converted: use quantize.")
    if checkpoint.kind == "orbax":
        refuse_in_out(model, architecture(checkpoint)[0], formats, "to")
    weights = weights_of(checkpoint)
    plans = {name: planned(WRITTEN.get(name), weights, asked, requantize) for name in formats}
    for broken in broken_templates(checkpoint.tokenizer_files):
        told(broken)
    with written_whole(out, overwrite=overwrite, inputs=[model]) as scratch:
        for name, place in places(formats, scratch).items():
            taken = Taken(WRITTEN.get(name), plans[name], requantize)
            write = write_ours if name == OURS else write_theirs
            named_failure(out, write)(checkpoint, weights, taken, place, progress)
            report = inside(checkpoint.path, REPORT)
            if report and not taken.anew:
                (place / REPORT).write_bytes(report.read_bytes())
            how = f"{len(taken.anew)} rounded anew" if taken.anew else "all to the bit"
            dense = [other for other, tensor in checkpoint.tensors.items() if tensor.picked]
            also = f"; made dense: {', '.join(dense)}" if dense else ""
            told(f"{name}: {len(weights.specs)} quantized weights, {how}{also}.")
    return Path(out)


def planned(
    codec: Codec | None, weights: Weights, asked: Mapping[str, Any], requantize: bool
) -> dict[str, QuantSpec | None]:
    """How each quantized weight is to be written, None for dense.

    Args:
      codec: None for our own format, which holds anything.
      asked: fields of all specs.

    Raises:
      InputError: the format does not hold one as it is, and rounding anew is not asked for; or none as it is asked for.
    """
    found: dict[str, QuantSpec | None] = {}
    most, _ = usual({name: replace(spec, **asked) for name, (_, spec) in weights.specs.items()}, QuantSpec())
    for name, (shape, spec) in weights.specs.items():
        wanted, why, advice = replace(spec, **asked), None, ANEW
        if codec is None and "group_size" in asked:
            check_group(name, shape, wanted)
        if (wanted.bits, wanted.group_size) != (spec.bits, spec.group_size):
            why = f"it has {spec.bits} bits in groups of {spec.group_size}, not {wanted.bits} in {wanted.group_size}"
        elif codec is not None and (why := unheld(codec, name, shape, wanted, most)):
            declared = unheld(codec, name, shape, replace(wanted, symmetric=True), most)
            advice = (DECLARED if declared is None else "") + ANEW
        if why and not requantize:
            raise InputError(f"{name}: {why}: {advice}.")
        given = found[name] = held(codec, name, shape, wanted, most) if why and codec else wanted
        for field, value in asked.items():
            if given is not None and getattr(given, field) != value:
                why = codec and unheld(codec, name, shape, wanted, most)
                raise InputError(f"{name}: {field}={value} cannot be ({why or 'not in this format'}): leave it out.")
    return found


def unheld(codec: Codec, name: str, shape: tuple[int, ...], spec: QuantSpec, most: QuantSpec) -> str | None:
    """Why a format does not hold a weight, from its shape and spec and how most others are quantized."""
    if name == f"{HEAD}.weight" and not codec.holds.head:
        return f"readers of {codec.title} files expect a dense head"
    if not codec.holds.mixed and (spec.bits, spec.group_size) != (most.bits, most.group_size):
        return f"an {codec.title} file has one width, {most.bits} bits in groups of {most.group_size}"
    found = no_room(codec, shape, spec)
    return found and found[0]


def held(codec: Codec, name: str, shape: tuple[int, ...], spec: QuantSpec, most: QuantSpec) -> QuantSpec | None:
    """The spec nearest to one that the format holds; None where that is none, as of a head that is to be dense."""
    holds = codec.holds
    near = spec if holds.mixed else most
    bits = min(holds.bits, key=lambda bits: (abs(bits - near.bits), -bits))
    group = near.group_size if holds.groups is None or near.group_size in holds.groups else group_for(codec, shape[-2])
    if group is None:
        return None
    near = QuantSpec(bits, group, near.symmetric or not holds.asymmetric)
    if near.padding(shape[-2]) and holds.mixed:
        near = replace(near, group_size=group_for(codec, shape[-2]) or group)
    return None if unheld(codec, name, shape, near, near) else near


class Taken:
    """Weights as a format is to hold them; `anew` names those that had to be rounded.

    Args:
      codec: None for our own format.
      plan: see `planned`.
    """

    def __init__(self, codec: Codec | None, plan: Mapping[str, QuantSpec | None], requantize: bool) -> None:
        self.codec, self.plan, self.requantize = codec, plan, requantize
        self.anew: list[str] = []

    def __call__(self, name: str, w: Any) -> Any:
        """Codes, or an array [out, in] for a weight that is to be dense.

        Raises:
          InputError: the format does not hold the weight as it is; steps that are no numbers.
        """
        if not isinstance(w, Codes | QuantizedTensor):
            return w
        codes, wanted = codes_of(w) if isinstance(w, QuantizedTensor) else w, self.plan[name]
        if not np.isfinite(codes.scale.astype(np.float32)).all():
            raise InputError(f"{name} has steps that are NaN or infinite: quantize the model or download it again.")
        if (why := self._why(codes, wanted, getattr(w, "input_scale", None))) is None:
            return replace(codes, spec=wanted)
        if not self.requantize:
            raise InputError(f"{name} {why}: {ANEW}.")
        self.anew.append(name)
        if why == WIDE and self.codec is not None:
            steps = as_float16(f"{name}, its steps", codes.scale, self.codec.title, axis=-2)
            return replace(codes, spec=wanted, scale=steps)
        dense = dequantize(w) if isinstance(w, QuantizedTensor) else jnp.asarray(w.dense())
        if wanted is None:
            return np.asarray(dense.swapaxes(-1, -2)).astype(w.scale.dtype if isinstance(w, Codes) else w.dtype)
        return codes_of(round_to_nearest(dense.astype(jnp.float32), wanted))

    def _why(self, codes: Codes, wanted: QuantSpec | None, input_scale: Any) -> str | None:
        if wanted is None:
            return "is to be dense"
        if input_scale is not None and self.codec is not None:
            return f"has an input scale, which {self.codec.title} files cannot hold"
        if (wanted.bits, wanted.group_size) != (codes.spec.bits, codes.spec.group_size):
            return "has another grid"
        if self.codec is None:
            return "has groups of rows that lie apart (act order)" if codes.group_of is not None else None
        return lacks(self.codec, replace(codes, spec=wanted)) or (None if fits_16_bits(codes.scale) else WIDE)


def fits_16_bits(steps: Float[np.ndarray, "*shape"]) -> bool:
    """Whether a file holds these steps as they are."""
    with np.errstate(over="ignore"):
        return steps.dtype.itemsize == 2 or bool((steps.astype(np.float16) == steps).all())


def write_theirs(checkpoint: Checkpoint, weights: Weights, taken: Taken, folder: Path, progress: Progress) -> None:
    """A folder of safetensors in the format of a codec; computed in the dtype that the source says."""
    assert taken.codec is not None
    specs = {name: spec for name, spec in taken.plan.items() if spec is not None}
    most, _ = usual(specs, QuantSpec())
    writer = Writer(taken.codec, folder, Undeclared.of(checkpoint), most, half=False)
    for done, (part, tensors) in enumerate(weights.parts(), 1):
        writer.write(part, {name: taken(name, w) for name, w in tensors.items()})
        progress("part", done, weights.count)
    writer.finish(None)


def write_ours(checkpoint: Checkpoint, weights: Weights, taken: Taken, folder: Path, progress: Progress) -> None:
    """A folder in our own format, a part of the params after the other."""
    if checkpoint.kind == OURS:
        raise InputError(f"{checkpoint.path} is in awq_jax's own format already: choose another.")
    family, config = architecture(checkpoint)

    def read(name: str) -> Any:
        tensor = checkpoint.tensors[name]
        w = taken(name, tensor.codes() if name in weights.specs and tensor.codes else tensor.read())
        return tensor_of(w, tensor.dtype) if isinstance(w, Codes) else w

    paths: dict[str, list[str]] = {}
    for path in param_shapes(config):
        paths.setdefault(path.split("/")[0], []).append(path)
    writer = orbax.Writer(folder, Undeclared.of(checkpoint))
    for done, (part, names) in enumerate(paths.items(), 1):
        found = {path: family.param(read, config, path) for path in names}
        params = {path: w if is_quantized(w) else np.ascontiguousarray(w) for path, w in found.items()}
        writer.write(part, unflatten_dict(params, sep="/")[part])
        progress("part", done, len(paths))
    writer.finish()
