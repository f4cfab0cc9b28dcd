"""Compiles a Triton kernel for a GPU that is not here and counts what its machine code holds. Needs only triton."""

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from awq_jax.kernels.triton import kernels as triton_kernels

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "codes": "*i16",
    "scales": "*fp16",
    "zeros": "*u8",
    **dict.fromkeys(("layer", "experts", "firsts", "ends"), "*i32"),
}


POINTERS |= {f"{name}{i}": POINTERS[name] for name in ("codes", "scales", "zeros") for i in range(3)}


@dataclass(frozen=True)
class Cubin:
    """registers a thread, stack (bytes spilled), shared memory; opcodes of the whole kernel and of its loops."""

    registers: int
    stack: int
    shared: int
    opcodes: collections.Counter
    loops: collections.Counter
    wide_copies: int


def compiled(kernel: str, dtype: str, arch: int, warps: int, stages: int, **constants: object) -> Cubin:
    function = getattr(triton_kernels, kernel)
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
    types = POINTERS | {f"{name}{i}": f"*{short}" for name in ("x", "out") for i in ("", 0, 1, 2)}
    names = function.arg_names
    constants |= {"asm": True} | ({"f16": dtype == "float16"} if "f16" in names else {})
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types},
    )
    done = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(done.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file], capture_output=True, text=True, check=True).stdout
    number = lambda what: int(re.search(rf"{what}:(\d+)", usage.stdout)[1])
    lines = re.findall(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", code, re.M)
    opcodes = collections.Counter(op.split(".")[0] for _, op, _ in lines if op)
    loops: collections.Counter = collections.Counter()
    labels: dict[str, int] = {}
    for i, (label, op, rest) in enumerate(lines):
        if label:
            labels[label] = i
        target = re.search(r"(\.L_x_\d+)", rest) if op.split(".")[0] == "BRA" else None
        if target and target[1] in labels:
            inside = {j: lines[j][1].split(".")[0] for j in range(labels[target[1]], i) if lines[j][1]}
            loops.update(inside.values())
    wide = sum(1 for _, op, _ in lines if op.startswith(("LDGSTS", "LDG")) and ".128" in op)
    return Cubin(number("REG"), number("STACK"), done.metadata.shared, opcodes, loops, wide)
