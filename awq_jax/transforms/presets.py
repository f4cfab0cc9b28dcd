"""Recipes by name: our own, and what other implementations do as a known point to start from.

The others' choices of statistic, grid, weight term and clip are theirs; the error that all of them minimise is the
site's own, from moments (llm-awq and AutoAWQ replay the whole attention or MLP for q, k, v and for gate, up), on at
most 512 columns of a weight.
"""

from __future__ import annotations

from awq_jax.search import Clip, Feedback, FeedbackGrid, Grid, no_clip, to_nearest
from awq_jax.transforms.recipe import Recipe

_TWENTY = tuple(i / 20 for i in range(20))
_MIRRORED = Clip(mirrored=True)
_QUERY_KEY = r"(^|/)(q|k|q_proj|k_proj|query|key|qkv)(/|$)"

PRESETS: dict[str, Recipe] = {
    "default": Recipe(),
    "fast": Recipe(
        scale=FeedbackGrid(Grid((0.0, 0.2, 0.4, 0.6), columns=32)),
        clip=Clip((1.0, 0.9, 0.8, 0.7)),
        rounding=Feedback(sweeps=0),
        gram_block=640,
        samples=8,
    ),
    "rtn": Recipe(scale=Grid(ratios=(0.0,)), clip=no_clip, rounding=to_nearest, gram_block=128),
    "llm_awq": Recipe(scale=Grid(_TWENTY), clip=_MIRRORED, unclipped=_QUERY_KEY, rounding=to_nearest, gram_block=128),
    "autoawq": Recipe(
        scale=Grid(_TWENTY, duo="always"), clip=_MIRRORED, unclipped=_QUERY_KEY, rounding=to_nearest, gram_block=128
    ),
    "llmcompressor": Recipe(
        scale=Grid(tuple(i / 18 for i in range(19)), duo="always"), clip=no_clip, rounding=to_nearest, gram_block=128
    ),
}
"""Whole recipes; `dataclasses.replace(PRESETS["fast"], group_size=64)` is `--preset fast --group-size 64`.

- default: 8 exponents, each scored after error feedback; clip search; error feedback, refitted steps, descent.
- fast: a coarser search on smaller statistics of a quarter of the text, no descent.
- rtn: round to nearest; no scale, no clip.
- llm_awq, autoawq, llmcompressor: the scales and clips that these try, rounded to nearest.
"""
