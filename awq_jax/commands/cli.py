"""The `awq-jax` command: parse, call, print."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union

import tyro
from tyro.conf import Positional, arg

from awq_jax.cache import keep_compiled_programs
from awq_jax.commands.compare import Compare
from awq_jax.commands.ending import failed, silence_libraries
from awq_jax.commands.eval import Eval
from awq_jax.commands.flags import as_flags, one_of, one_or_more, one_word_of, some_of
from awq_jax.commands.progress import progress_bar
from awq_jax.commands.tables import console, say, sites_table, summary, tunings_table
from awq_jax.formats.servers import TARGETS
from awq_jax.near import did_you_mean
from awq_jax.pipeline.outputs import FORMATS
from awq_jax.transforms.stream import Feed

Preset = Literal["default", "fast", "rtn", "llm_awq", "autoawq", "llmcompressor"]


@dataclass(frozen=True)
class Quantize:
    """Make a model 4 times smaller: calibrate, search, write."""

    spelled: ClassVar = {"scales='beside'": "--format orbax", "skip=True in a rule": "--skip"}

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Hugging Face folder or hub id, or a GGUF file."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write."""
    bits: float = 4
    """Width of the codes, 2 to 8 (awq holds 4). 3.5, say, gives every site a width of its own, 3.5 in the mean."""
    group_size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: chosen)")] = None
    """Input channels that share a step; without it the largest of 128, 64, 32 that divides all widths."""
    format: Annotated[str | None, some_of(FORMATS), arg(help_behavior_hint="(default: awq)")] = None
    """awq: AutoAWQ safetensors for vLLM, SGLang, transformers. compressed-tensors: the same, any bits, TPUs too. gptq,
    gptq_v2, mlx: what these say. orbax: ours, a scale for each site. Several, awq,mlx, give a folder each in OUT."""
    target: Annotated[str | None, one_word_of(TARGETS)] = None
    """What is to run the model, instead of --format: chooses format, symmetry and groups that its fast kernels read,
    and says why."""
    preset: Annotated[Preset, one_of(Preset)] = "default"
    """How the numbers are chosen; fast takes a quarter of the text, smaller statistics and a coarser search;
    the last three do as others do."""
    calib: Annotated[tuple[str, ...], one_or_more()] = ()
    """Text files, files of chats or texts (.json, .jsonl, .csv, .parquet), ids of datasets, `self` for what the model
    writes; the packaged text without it. Several share the samples."""
    samples: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 32; fast 8)")] = None
    """Calibration sequences; the preset says how many."""
    seq_len: int = 512
    """Tokens a calibration sequence."""
    skip: Annotated[tuple[str, ...], one_or_more()] = ()
    """Regular expressions of param paths that stay dense, such as mlp/down; in awq files all of q, k, v or none, and
    of gate, up."""
    symmetric: bool = False
    """The zero point is the middle code."""
    feed: Annotated[Feed, one_of(Feed)] = "dense"
    """What a block is calibrated on: the output of the dense blocks before it, or of the quantized ones."""
    distill: int = 0
    """Passes over the calibration text that train the steps against the dense model, after the search: closer, slower,
    and all of the model in memory."""
    overwrite: bool = False
    """Replace what an earlier run wrote at OUT, and nothing else."""

    def run(self) -> None:
        from awq_jax.pipeline.outputs import formats_of, places
        from awq_jax.pipeline.quantize_checkpoint import quantize_checkpoint

        format, recipe = self.format or "awq", self.recipe()
        average_bits = None if self.bits == int(self.bits) else self.bits
        if self.target is not None:
            from awq_jax.pipeline.targets import for_target

            format, recipe, why = for_target(self.target, recipe, format=self.format, average_bits=average_bits)
            say(why)
        with progress_bar() as progress:
            done = quantize_checkpoint(
                self.model,
                self.out,
                recipe,
                format=format,
                calib=self.calib,
                samples=self.samples,
                seq_len=self.seq_len,
                feed=self.feed,
                average_bits=average_bits,
                distill=self.distill,
                overwrite=self.overwrite,
                progress=progress,
                told=say,
            )
        console().print(sites_table(done.sites), summary(done.before, done.half, done.after, done.seconds))
        for note in done.notes:
            say(note)
        first, *_ = places(formats_of(format), done.path).values()
        where = shlex.quote(str(first))
        say(f"Wrote {done.path}. Try: awq-jax generate {where} 'Why is the sky blue?'")

    def recipe(self) -> Any:
        from awq_jax.transforms.presets import PRESETS
        from awq_jax.weights.spec import Rule

        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits:g}: codes are 2 to 8 bits wide.")
        preset = PRESETS[self.preset]
        return replace(
            preset,
            bits=int(self.bits) if self.bits == int(self.bits) else 4,
            group_size=self.group_size,
            symmetric=self.symmetric,
            rules=tuple(Rule(pattern, skip=True) for pattern in self.skip),
        )


@dataclass(frozen=True)
class Convert:
    """A quantized model in another format: the same codes, or none."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A quantized checkpoint of any tool."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write."""
    to: Annotated[str, some_of(FORMATS)]
    """The format; several, awq,mlx, give a folder each in OUT."""
    bits: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as they are)")] = None
    """Another width of the codes, with --requantize."""
    group_size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: as they are)")] = None
    """Other groups, with --requantize."""
    symmetric: bool = False
    """Declare zero points to be the middle code; without loss where they are."""
    requantize: bool = False
    """Round weights anew, to nearest, that the format does not hold as they are."""
    overwrite: bool = False
    """Replace what an earlier run wrote at OUT, and nothing else."""

    def run(self) -> None:
        from awq_jax.pipeline.convert import convert

        names = ("bits", "group_size", "requantize", "overwrite")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        symmetric = self.symmetric or None
        with progress_bar() as progress:
            done = convert(self.model, self.out, self.to, symmetric=symmetric, **options, progress=progress, told=say)
        say(f"Wrote {done}.")


@dataclass(frozen=True)
class Generate:
    """Let a model answer."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Any checkpoint, dense or quantized."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT")]
    """What to answer."""
    max_new_tokens: int = 128
    """The answer's tokens at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities reach this."""
    seed: int = 0
    """Of what is drawn: another one, another answer, where the temperature is above 0."""
    raw: bool = False
    """Continue the prompt as it is instead of answering it as a chat."""

    def run(self) -> None:
        from awq_jax.models.generate import Speed, check_drawn
        from awq_jax.pipeline.load import key_of, opened

        check_drawn(self.max_new_tokens, self.temperature, self.top_p)
        key_of(self.seed)
        check_prompt(self.prompt)
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        speed = Speed()
        with progress_bar() as progress:
            progress("loading", 0, 1)
            model, read = opened(self.model, told=lambda line: print(line, file=sys.stderr))
            tokens = model.tokens_of(self.prompt, chat=not self.raw)
            # Refuses what it can while the weights are not read.
            model.stream(tokens, **options)
            answer = read().stream(tokens, **options, speed=speed)
            progress("loading", 1, 1)
            progress("compiling, once", 0, 1)
            begun = next(answer, "")
        try:
            for piece in chain([begun], answer):
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        print(speed, file=sys.stderr)


@dataclass(frozen=True)
class Inspect:
    """What is in a checkpoint: params by kind, bits a weight, bytes on disk, and errors where it was quantized here."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Any checkpoint, dense or quantized."""
    target: Annotated[str | None, one_word_of(TARGETS)] = None
    """Show what each matrix would run on there."""

    def run(self) -> None:
        from awq_jax.commands.inspect import inspect

        console().print(inspect(self.model, self.target))


@dataclass(frozen=True)
class Demo:
    """See it work: quantize a small model, compare it with the dense one, let both answer."""

    model: Annotated[Positional[str | None], arg(metavar="[MODEL]")] = None
    """Any model; without it SmolLM2-135M-Instruct, fetched once (98 MB)."""
    prompt: str = "What is gravity?"
    """What both models are asked."""

    def run(self) -> None:
        from awq_jax.commands.demo import demo

        check_prompt(self.prompt)
        with progress_bar() as progress:
            result = demo(self.model, self.prompt, progress)
        console().print(*result)


@dataclass(frozen=True)
class Tune:
    """Time the kernels on this GPU for the shapes of a quantized model, and use the fastest from then on."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A quantized checkpoint."""
    rows: tuple[int, ...] = (1, 1024, 16, 256, 4, 64)
    """Of the activations, in the order in which they are timed: sequences of a decode step, tokens of a prefill."""
    minutes: float = 5.0
    """After which no further matmul is begun."""

    def run(self) -> None:
        import jax.numpy as jnp

        from awq_jax.kernels.tilings.table import users_file
        from awq_jax.pipeline.load import opened
        from awq_jax.transforms.tune import check_gpu, tune

        if min(self.rows, default=0) < 1:
            raise ValueError(f"rows={min(self.rows, default=0)}: give numbers of 1 or more.")
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes:g}: give a number above 0.")
        check_gpu()
        model, _ = opened(self.model)

        def steps(params: Any) -> list[Any]:
            return [replace(model, params=params).logits(jnp.zeros((m, 1), jnp.int32)) for m in self.rows]

        with progress_bar() as progress:
            found = tune(steps, model.params, limit=60 * self.minutes, progress=progress)
        console().print(tunings_table(found))
        say(f"Kept in {users_file()}; delete it to forget them.")


@dataclass(frozen=True)
class Doctor:
    """What is installed, which GPU is here, what would run the matmuls, and what to install."""

    def run(self) -> None:
        from awq_jax.commands.doctor import examine

        for finding in examine():
            say(f"{finding.what}: {finding.found}" + (f" ({finding.advice})" if finding.advice else ""))


def check_prompt(prompt: str) -> None:
    """Refuse what no model can answer or continue."""
    if not prompt:
        raise ValueError("The prompt is empty: give a text.")


COMMANDS: dict[str, Any] = {
    "quantize": Quantize,
    "convert": Convert,
    "eval": Eval,
    "compare": Compare,
    "generate": Generate,
    "inspect": Inspect,
    "demo": Demo,
    "tune": Tune,
    "doctor": Doctor,
}
Command: Any = Union[tuple(Annotated[command, tyro.conf.subcommand(name)] for name, command in COMMANDS.items())]  # noqa: UP007


def parsed(words: list[str]) -> Any:
    """The command that is asked for; --version, --help and what cannot be understood end the program."""
    if words[:1] == ["--version"]:
        from awq_jax import __version__

        say(f"awq-jax {__version__}")
        sys.exit(0)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        near = did_you_mean(words[0], COMMANDS)
        print(f"awq-jax: there is no command {words[0]}{near}: give one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    description = "Activation-aware 4-bit weight quantization (AWQ) in JAX; --version tells which one this is."
    return tyro.cli(
        Command,
        prog="awq-jax",
        description=description,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )


@contextmanager
def in_flags(command: Any) -> Iterator[None]:
    """Puts errors of the block into the words of the command line."""
    try:
        yield
    except (ValueError, OSError) as e:
        if len(e.args) == 1 and isinstance(e.args[0], str):
            names = [field.name for field in fields(command)]
            e.args = (as_flags(e.args[0], names, getattr(command, "spelled", {}), sys.argv[1:]),)
        raise


def main() -> None:
    """Run the command; what the user can mend is one line on the error stream and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name of bytes that are no text, or a terminal without UTF-8, must not cost the work that is done.
            stream.reconfigure(errors="backslashreplace")
    command = parsed(sys.argv[1:])
    silence_libraries()
    keep_compiled_programs()
    try:
        with in_flags(command):
            command.run()
        sys.stdout.flush()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        print("awq-jax: stopped.", file=sys.stderr)
        sys.exit(130)
    # A panic of a library in Rust is no Exception.
    except BaseException as e:
        sys.exit(failed(e))
