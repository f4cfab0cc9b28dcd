"""Functions as users write them: they promote dtypes and ranks, which the tests forbid this project's own code."""

import functools as ft

import jax


def loose(fn):
    @ft.wraps(fn)
    def run(*args, **options):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return fn(*args, **options)

    return run
