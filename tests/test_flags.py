"""Errors in the words of the command line."""

import pytest

from awq_jax.flags import as_flags

NAMES = ("group_size", "format", "overwrite", "calib", "bits")
SPELLED = {"fold=False": "--format orbax", "skip=True in a rule": "--skip"}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("use group_size=64, or else", "use --group-size 64, or else"),
        ("write format='orbax'.", "write --format orbax."),
        ("calib='my text': no", "--calib 'my text': no"),
        ("give overwrite=True to", "give --overwrite to"),
        ("leave it dense (skip=True in a rule)", "leave it dense (--skip)"),
        ("Quantize with fold=False, and", "Quantize with --format orbax, and"),
        ("leave calib= out, or calib=", "leave --calib out, or --calib"),
        ("do not fit config.json's group_size=128", "do not fit config.json's group_size=128"),
        ("other=3 my_bits=3", "other=3 my_bits=3"),
        ("/data/bits=4/x is bits=4/x at bits=5", "/data/bits=4/x is bits=4/x at --bits 5"),
    ],
)
def test_arguments_become_flags_and_names_of_files_stay(message, told):
    assert as_flags(message, NAMES, SPELLED, ["quantize", "/data/bits=4/x", "bits=4/x"]) == told
