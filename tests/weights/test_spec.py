import dataclasses

import pytest

from awq_jax.transforms.recipe import Recipe
from awq_jax.weights.spec import QuantSpec, Rule


@pytest.mark.parametrize("bits", [-4, 0, 1, 9, 16, 4.5, "4", None])
def test_bits_outside_2_to_8_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits={bits}.*2 to 8"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize("group_size", [-128, -2, 0, 1, 16, 48, 100])
def test_group_sizes_that_no_kernel_could_run_are_refused(group_size):
    with pytest.raises(ValueError, match=rf"group_size={group_size}: .*multiple of 32"):
        QuantSpec(group_size=group_size)


@pytest.mark.parametrize(("bits", "levels", "middle"), [(2, 3, 2), (3, 7, 4), (4, 15, 8), (8, 255, 128)])
def test_levels_and_middle(bits, levels, middle):
    spec = QuantSpec(bits=bits)
    assert (spec.levels, spec.middle) == (levels, middle)


@pytest.mark.parametrize(
    ("group_size", "in_features", "group", "padding"),
    [
        (32, 96, 32, 0),
        (64, 96, 64, 32),
        (128, 576, 128, 64),
        (128, 1, 128, 127),
        (-1, 96, 96, 0),
        (-1, 100, 128, 28),
        (-1, 1, 32, 31),
    ],
)
def test_the_last_group_is_completed(group_size, in_features, group, padding):
    spec = QuantSpec(group_size=group_size)
    assert (spec.group(in_features), spec.padding(in_features)) == (group, padding)


def test_a_spec_is_a_value():
    assert QuantSpec() == QuantSpec(bits=4, group_size=128, symmetric=False)
    assert len({QuantSpec(), QuantSpec(), QuantSpec(bits=3), QuantSpec(symmetric=True)}) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 3


def test_a_rule_names_only_what_it_changes():
    assert Rule("down", bits=8, symmetric=False).changes == {"bits": 8, "symmetric": False}
    assert Rule("head", skip=True).changes == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "(", "skip": True}, r"rule '\(' is not a regular expression"),
        ({"pattern": "down"}, "rule 'down' changes nothing"),
        (
            {"pattern": "down", "skip": True, "bits": 3, "group_size": 64},
            r"both skips and changes \['bits', 'group_size'\]",
        ),
        ({"pattern": "down", "bits": 9}, "bits=9"),
        ({"pattern": "down", "group_size": 48}, "group_size=48"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rule(**arguments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scales", "fold", r"scales='fold': choose one of beside, folded, both, none \(did you mean folded\?\)"),
        ("scales", True, "scales=True: choose one of"),
        ("gram_block", 0, "gram_block=0"),
        ("unclipped", "(", "unclipped='\\(' is not a regular expression"),
        ("rules", ("mlp",), r"rules has 'mlp': give awq\.Rule\('mlp', skip=True\), say"),
        ("rules", (Rule("mlp", bits=8), Rule("mlp", skip=True)), "two rules contradict each other on 'mlp': keep one"),
        ("rules", (Rule("mlp", bits=8), Rule("down", skip=True)), None),
        ("scale", lambda: None, None),
        ("clip", 3, "Recipe.clip=3 is not a hashable function"),
        ("rounding", type("Unhashable", (), {"__call__": lambda self: None, "__hash__": None})(), "not a hashable"),
    ],
)
def test_a_recipe_is_checked_when_it_is_made(field, value, message):
    if message is None:
        assert getattr(Recipe(**{field: value}), field) is value
        return
    with pytest.raises(ValueError, match=message):
        Recipe(**{field: value})
