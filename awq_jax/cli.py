"""The `awq-jax` command: parse, call, print."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import absl.logging
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tyro.conf import Positional, arg

from awq_jax.cache import keep_compiled_programs
from awq_jax.report import console, scores_table, sites_table, summary, tunings_table

Preset = Literal["default", "fast", "rtn", "llm_awq", "autoawq", "llmcompressor"]


@dataclass(frozen=True)
class Quantize:
    """Make a model 4 times smaller: calibrate, search, write."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Hugging Face folder or hub id, or a GGUF file."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write."""
    bits: float = 4
    """Width of the codes, 2 to 8 (awq files hold 4). 3.5, say, gives every site a width of its own, 3.5 in the mean."""
    group_size: int = 128
    """Input channels that share a step; 64 or 32 where 128 does not divide the widths."""
    format: Literal["awq", "orbax"] = "awq"
    """awq: AutoAWQ safetensors for vLLM, SGLang, transformers. orbax: ours, a scale for each site."""
    preset: Preset = "default"
    """How the numbers are chosen; fast takes a quarter of the text, smaller statistics and a coarser search;
    the last three do as others do."""
    calib: tuple[str, ...] = ()
    """Text files, .jsonl of chats or texts, ids of datasets, `self` for what the model writes; the packaged text
    without it. Several share the samples."""
    samples: int | None = None
    """Calibration sequences; the preset says how many (32; fast 8)."""
    seq_len: int = 512
    """Tokens a calibration sequence."""
    skip: tuple[str, ...] = ()
    """Regular expressions of param paths that stay dense, such as mlp/down."""
    symmetric: bool = False
    """The zero point is the middle code."""
    feed: Literal["dense", "quantized"] = "dense"
    """What a block is calibrated on: the output of the dense blocks before it, or of the quantized ones."""
    distill: int = 0
    """Passes over the calibration text that train the steps against the dense model, after the search: closer, slower,
    and all of the model in memory."""
    overwrite: bool = False
    """Replace what is at OUT."""

    def run(self) -> None:
        from awq_jax.convert import quantize_checkpoint

        with bar() as progress:
            done = quantize_checkpoint(
                self.model,
                self.out,
                self.recipe(),
                format=self.format,
                calib=self.calib,
                samples=self.samples,
                seq_len=self.seq_len,
                feed=self.feed,
                average_bits=None if self.bits == int(self.bits) else self.bits,
                distill=self.distill,
                overwrite=self.overwrite,
                progress=progress,
            )
        console().print(sites_table(done.sites), summary(done.before, done.half, done.after, done.seconds))
        where = shlex.quote(str(done.path))
        say(f"Wrote {done.path}. Try: awq-jax generate {where} 'Why is the sky blue?'")

    def recipe(self) -> Any:
        from awq_jax.presets import PRESETS
        from awq_jax.spec import Rule

        return replace(
            PRESETS[self.preset],
            bits=int(self.bits) if self.bits == int(self.bits) else 4,
            group_size=self.group_size,
            symmetric=self.symmetric,
            rules=tuple(Rule(pattern, skip=True) for pattern in self.skip),
        )


@dataclass(frozen=True)
class Eval:
    """Perplexity of a text; with --dense also KL and top-1 agreement with that model."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Any checkpoint, dense or quantized."""
    text: Annotated[Positional[Path], arg(metavar="TEXT")]
    """Text file; best one that calibration never saw."""
    dense: str | None = None
    """The model to compare with."""
    windows: int = 8
    """Windows from the start of the text."""
    length: int = 1024
    """Tokens a window."""

    def run(self) -> None:
        import jax.numpy as jnp

        from awq_jax.evaluate import score, windows
        from awq_jax.load import load

        text = read_text(self.text)
        # In one dtype everywhere, so that scores of two machines can be compared.
        model = load(self.model, jnp.float32)
        reference = load(self.dense, jnp.float32) if self.dense else None
        tokens = windows(text, model.tokenizer, self.windows, self.length, str(self.text))
        with bar() as progress:
            rows = {self.model: score(model, tokens, reference, lambda k, n: progress("window", k, n))}
            if reference is not None and self.dense is not None:
                rows[self.dense] = score(reference, tokens)
        console().print(scores_table(rows))


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
    raw: bool = False
    """Continue the prompt as it is instead of answering it as a chat."""

    def run(self) -> None:
        from awq_jax.load import load

        answer = load(self.model).generate(
            self.prompt, max_new_tokens=self.max_new_tokens, temperature=self.temperature, chat=not self.raw
        )
        say(answer)


@dataclass(frozen=True)
class Inspect:
    """What is in a checkpoint: sites, bits, bytes, and each site's error where it was quantized here."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Any checkpoint, dense or quantized."""

    def run(self) -> None:
        from awq_jax.inspect import inspect

        console().print(inspect(self.model))


@dataclass(frozen=True)
class Demo:
    """See it work: quantize a small model, compare it with the dense one, let both answer."""

    model: Annotated[Positional[str | None], arg(metavar="MODEL")] = None
    """Any model; without it SmolLM2-135M-Instruct, fetched once (98 MB)."""
    prompt: str = "What is gravity?"
    """What both models are asked."""

    def run(self) -> None:
        from awq_jax.demo import demo

        with bar() as progress:
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

        from awq_jax.kernels.table import users_file
        from awq_jax.load import load
        from awq_jax.tune import tune

        model = load(self.model)

        def steps(params: Any) -> list[Any]:
            return [replace(model, params=params).logits(jnp.zeros((m, 1), jnp.int32)) for m in self.rows]

        with bar() as progress:
            found = tune(steps, model.params, limit=60 * self.minutes, progress=progress)
        console().print(tunings_table(found))
        say(f"Kept in {users_file()}; delete it to forget them.")


@dataclass(frozen=True)
class Doctor:
    """What is installed, which GPU is here, what would run the matmuls, and what to install."""

    def run(self) -> None:
        from awq_jax.doctor import examine

        for finding in examine():
            say(f"{finding.what}: {finding.found}" + (f" ({finding.advice})" if finding.advice else ""))


Command = (
    Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with time left, on the terminal's error stream; `(stage, done, total)` moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    from rich.console import Console

    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as live:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = live.add_task(stage, total=total)
            live.update(tasks[stage], completed=done, total=total)

        yield progress


def say(text: str) -> None:
    """Text as it is, whatever the width of the terminal."""
    console().print(text, markup=False, soft_wrap=True)


def read_text(file: Path) -> str:
    from awq_jax.formats.errors import InputError

    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{file} cannot be read ({e}): give a text file in UTF-8.") from e


def main() -> None:
    """Run the command; what the user can mend is one line on the error stream and exit code 2."""
    description = "Activation-aware 4-bit weight quantization (AWQ) in JAX."
    command = tyro.cli(Command, prog="awq-jax", description=description)  # type: ignore[arg-type]
    # transformers says otherwise that it misses torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Orbax logs the traceback of an error before it raises it.
    absl.logging.set_verbosity(absl.logging.FATAL)
    keep_compiled_programs()
    # So that scratch folders go as they do at Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command.run()
    except (ValueError, OSError) as e:
        print("awq-jax:", " ".join(str(e).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("awq-jax: stopped.", file=sys.stderr)
        sys.exit(130)
