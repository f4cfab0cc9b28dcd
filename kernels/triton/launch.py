"""Calls a Triton kernel from jax. The one file that knows versions of triton and jax-triton."""

from __future__ import annotations

import functools as ft
import importlib
import importlib.util
import inspect
from typing import Any

import jax

from awq_jax.kernels.gpu import architecture


def install() -> str:
    """The command that brings what the kernels need, for the CUDA that jax has or, without one, CUDA 12."""
    cuda = "cuda13" if importlib.util.find_spec("jax_cuda13_plugin") else "cuda12"
    return f"pip install 'awq-jax[{cuda}]'"


@ft.cache
def broken() -> str | None:
    """Why jax-triton cannot be imported. Asked once: an import that fails is tried again by each that needs it."""
    # Versions that do not fit each other fail in many ways: names that are gone, signatures, broken libraries.
    try:
        importlib.import_module("jax_triton")
    except Exception as e:
        return f"jax-triton cannot be imported beside jax {jax.__version__} ({type(e).__name__}: {e})"
    return None


def missing() -> str | None:
    """What of the packages that run Triton kernels is not installed or does not fit the others; None if all is well."""
    lacking = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if lacking:
        return f"{' and '.join(lacking).replace('_', '-')} not installed: {install()}"
    return f"{reason}: {install()}" if (reason := broken()) else None


def too_old(kernel: str) -> str | None:
    """Why this triton cannot compile a kernel for the GPU, None if it can."""
    arch = architecture() or 0
    if kernel not in ("tile", "ragged") or not 100 <= arch < 120:
        return None
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        # It compiles 128 x 128 tiles to a trap, and unrolls smaller ones into twice the instructions.
        return f"triton {triton.__version__} compiles many rows wrongly for sm_{arch}: pip install 'triton>=3.9'"
    return None


def unavailable(kernel: str) -> str | None:
    """Why a kernel cannot be launched with what is installed here, None if it can."""
    return missing() or too_old(kernel)


def launch(
    kernel: str,
    *arrays: jax.Array,
    out: Any,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    **constants: Any,
) -> Any:
    """The result of a kernel of kernels.py, compiled when the program around it is.

    Args:
      kernel: its name. Pointers of `arrays` come first among its arguments, then that of the result.
      out: a ShapeDtypeStruct, or a tuple of them where there are several results.
      constants: its compile-time constants.

    Raises:
      NotImplementedError: a package is missing, or too old for the GPU.
    """
    if reason := unavailable(kernel):
        raise NotImplementedError(reason)
    import jax_triton

    from awq_jax.kernels.triton import kernels as triton_kernels

    known = inspect.signature(jax_triton.triton_call).parameters
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "grid": grid, "name": f"awq_{kernel}"}
    # jax-triton 0.4 renamed out_shape. triton 3.9 writes PTX 9.4, which XLA's assembler of CUDA 13.0 and older refuses.
    options |= (
        {"out_shape": out}
        if "out_shape" in known
        else {"out_type": out, "backend_options": {"ptx_version": 83, "enable_fp_fusion": True}}
    )
    _mend_dead_code_rule(jax_triton)
    return jax_triton.triton_call(
        *arrays, kernel=getattr(triton_kernels, kernel), compute_capability=architecture(), **options, **constants
    )


def _mend_dead_code_rule(jax_triton: Any) -> None:
    """jax 0.12 passes its rules of dead code a third argument, which jax-triton 0.4.1 does not take."""
    from jax.interpreters import partial_eval

    rules = getattr(partial_eval, "dce_rules", {})
    primitive = jax_triton.triton_lib.triton_kernel_call_p
    rule = rules.get(primitive)
    if jax.__version_info__ >= (0, 12) and rule is not None and len(inspect.signature(rule).parameters) == 2:
        rules[primitive] = lambda used, *rest: ([True] * len(rest[-1].invars), rest[-1])
