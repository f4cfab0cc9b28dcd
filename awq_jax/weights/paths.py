"""What the leaves of a params pytree are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from awq_jax.weights.tensor import is_quantized


def named_leaves(params: Any, is_leaf: Callable[[Any], bool] = is_quantized) -> dict[str, Any]:
    """The leaves of a params pytree by path, QuantizedTensors as one leaf each.

    What flax boxes (nn.Partitioned, nnx.Param) is named like what it is in, without "/value" at the end.

    Raises:
      ValueError: two leaves have one path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
    inside = Counter(path[:k] for path, _ in leaves for k in range(len(path)))
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        is_boxed = path[-1:] == (jax.tree_util.GetAttrKey("value"),) and inside[path[:-1]] == 1
        name = jax.tree_util.keystr(path[:-1] if is_boxed else path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two params are both called {name!r}: rename one, a key with a slash in it say.")
        named[name] = leaf
    return named
