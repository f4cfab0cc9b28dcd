"""Modules without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have their params on the meta device, and buffers in memory as ever."""
    plain = torch.nn.Module.register_parameter

    def register(self: torch.nn.Module, name: str, param: Any) -> None:
        plain(self, name, param)
        if param is not None and not param.is_meta:  # one that is tied stays the same
            self._parameters[name] = torch.nn.Parameter(param.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = register
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = plain
