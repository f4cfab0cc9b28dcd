"""The table's entries against torch's schemas."""

import inspect

import torch
import transformers.integrations.moe as moe

from awq_jax.torch_bridge import operations as operations
from awq_jax.torch_bridge.graph import NOWHERE
from awq_jax.torch_bridge.operations.table import TABLE, find

del moe  # imported for the operation that it registers


def schemas(name):
    """By overload those that an entry is for, of what torch.export traces."""
    namespace, _, full = name.rpartition("::")
    called, _, overload = full.partition(".")
    packet = getattr(getattr(torch.ops, namespace or "aten"), called)
    for o in [overload] if overload else packet.overloads():
        schema = getattr(packet, o)._schema
        of_tensors = any("Tensor" in str(r.type) for r in schema.returns) and not any(
            a.is_out or str(a.type) == "Dict" for a in schema.arguments
        )
        if of_tensors and find(f"{name.removesuffix(f'.{overload}')}.{o}") is TABLE[name]:
            yield o, schema


def taken(annotation):
    both = any(word in annotation for word in ("ArrayLike", "Any"))
    return {"tensor", "number"} if both else {"tensor"} if "Array" in annotation else {"number"}


def misfits(run, schema):
    """What of a schema a function does not take in its place.

    What it takes by place only may have another name; so may tensors, which come by place.
    """
    params = inspect.signature(run).parameters
    places = [p for p in params.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = any(p.kind == p.VAR_POSITIONAL for p in params.values())
    for k, arg in enumerate(schema.arguments):
        p, tensor = places[k] if k < len(places) else None, "Tensor" in str(arg.type)
        if arg.kwarg_only:
            if arg.name not in NOWHERE | set(params):
                yield f"{arg.name} by name"
        elif p is None:
            if not rest:
                yield f"{arg.name} in place {k}"
        elif not tensor and p.name != arg.name and (arg.has_default_value() or p.kind != p.POSITIONAL_ONLY):
            yield f"{arg.name} in place {k}, which is {p.name}"
        elif p.annotation is not p.empty and ("tensor" if tensor else "number") not in taken(str(p.annotation)):
            yield f"{arg.name} of {arg.type} in place {k}, which is of {p.annotation}"


def test_entries_take_what_all_overloads_have_that_they_are_for():
    found = {name: dict(schemas(name)) for name in TABLE}
    assert [name for name, overloads in found.items() if not overloads] == []
    wrong = {(name, o): list(misfits(TABLE[name].run, s)) for name, of in found.items() for o, s in of.items()}
    assert {where: what for where, what in wrong.items() if what} == {}
