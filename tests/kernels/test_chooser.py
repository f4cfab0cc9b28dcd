"""Implementations are entries: the first that does not refuse runs, and all reasons stand in one error."""

import dataclasses
from pathlib import Path

import pytest

from awq_jax import kernels
from awq_jax.kernels.chooser import IMPLEMENTATIONS, choose, named
from awq_jax.kernels.implementation import Implementation
from awq_jax.kernels.tilings import table


def test_when_nothing_can_all_reasons_are_told():
    big, small = (
        Implementation(name, lambda x, why=why: why, int) for name, why in (("one", "too big"), ("two", "too small"))
    )
    with pytest.raises(NotImplementedError, match=r"one: too big.*two: too small"):
        choose((big, small), 0)
    with pytest.raises(NotImplementedError, match=r"^too small"):
        named((big, small), "two", 0)
    with pytest.raises(ValueError, match=r"implementation='three': choose one of \['one', 'two'\] or None"):
        named((big, small), "three", 0)
    able = dataclasses.replace(small, refuses=lambda x: None)
    assert choose((big, able, small), 0) is able


def test_each_kernel_of_the_table_has_one_implementation():
    assert sorted(table.KERNELS) == sorted(kernel for i in IMPLEMENTATIONS for kernel in i.kernels)


def test_no_implementation_imports_another():
    for file in Path(kernels.__file__).parent.glob("*/*.py"):
        others = {"triton", "mosaic", "xla"} - {file.parent.name}
        assert not [o for o in others if f"awq_jax.kernels.{o}" in file.read_text()], file
