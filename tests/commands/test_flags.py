"""Errors in the words of the command line."""

from pathlib import Path

import pytest

from awq_jax.commands.flags import as_flags
from awq_jax.errors import InputError
from awq_jax.formats.quantized_folder import read_declared

NAMES = ("group_size", "format", "overwrite", "calib", "bits")
SPELLED = {"scales='beside'": "--format orbax", "skip=True in a rule": "--skip"}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("use group_size=64, or else", "use --group-size 64, or else"),
        ("write format='orbax'.", "write --format orbax."),
        ("calib='my text': no", "--calib 'my text': no"),
        ("give overwrite=True to", "give --overwrite to"),
        ("leave it dense (skip=True in a rule)", "leave it dense (--skip)"),
        ("Quantize with scales='beside', and", "Quantize with --format orbax, and"),
        ("leave calib= out, or calib=", "leave --calib out, or --calib"),
        ("do not fit config.json's group_size=128", "do not fit config.json's group_size=128"),
        ("its QuantSpec(bits=4, group_size=32) has bits=4", "its QuantSpec(bits=4, group_size=32) has --bits 4"),
        ("other=3 my_bits=3", "other=3 my_bits=3"),
        ("/data/bits=4/x is bits=4/x at bits=5", "/data/bits=4/x is bits=4/x at --bits 5"),
    ],
)
def test_arguments_become_flags_and_names_of_files_stay(message, told):
    assert as_flags(message, NAMES, SPELLED, ["quantize", "/data/bits=4/x", "bits=4/x"]) == told


@pytest.mark.parametrize(
    "field",
    [{"group_size": "x"}, {"q_group_size": None}, {"group_size": 48}, {"bits": "4"}, {"w_bit": 4.0}, {"zero_point": 1}],
    ids=str,
)
def test_a_field_of_a_config_stays_as_it_is(field):
    with pytest.raises(InputError) as refused:
        read_declared(Path("m"), {"quantization_config": {"quant_method": "awq", **field}})
    assert f"quantization_config's {next(iter(field))}=" in str(refused.value)
    assert as_flags(str(refused.value), (*NAMES, "zero_point", "q_group_size", "w_bit"), SPELLED) == str(refused.value)
