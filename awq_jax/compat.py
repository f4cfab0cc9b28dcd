"""The one file that knows jax versions."""

from __future__ import annotations

from typing import Any


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan equation's operands are constants, and how many are carried.

    jax 0.11 replaced `num_consts` and `num_carry` by the flat tree `ft_in` of (consts, carry, xs).
    """
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]
