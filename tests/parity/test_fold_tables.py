"""The folds that tracing finds beside the tables that other projects wrote by hand, family by family.

Transcribed, in this zoo's names, from AutoAWQ 0.2.9 (`get_layers_for_scaling` of awq/models/*.py) and llm-compressor
(modifiers/awq/mappings.py): "op before > matmuls that read it".
"""

import pytest
from zoo import ZOO, short

from awq_jax.tracing.sites import sites

LLAMA = ("attn_norm > q k v", "v > o", "mlp_norm > gate up", "up > down")
AUTOAWQ = {
    "llama": LLAMA,
    "gemma": ("pre_attn > q k v", "v > o", "pre_mlp > gate up", "up > down"),
    "opt": ("ln_1/scale > q k v", "v > o", "ln_2/scale > fc1", "fc1 > fc2"),
    "gptj": ("ln/scale > q k v fc_in", "v > o", "gelu > fc_out"),
    "gpt2": ("ln_1/scale > qkv", "ln_2/scale > fc_in", "gelu > fc_out"),
    "moe": LLAMA,
}
LLM_COMPRESSOR = {"llama": LLAMA, "gemma": AUTOAWQ["gemma"], "moe": LLAMA}

IMPOSSIBLE = {"gelu > fc_out"}
"""AutoAWQ adds a division after the activation here: gelu does not commute with a scale."""
MORE = {("moe", "mlp_norm"): {"router"}}
"""Consumers that the tables forget: scaled like this, Mixtral's router would see other inputs than before."""
ONLY_OURS = {
    "gpt2": {"qkv > proj"},
    "llama": {"norm > head"},
    "opt": {"norm > head"},
    "gptj": {"norm > head"},
    "moe": {"norm > head"},
    "gemma": set(),
}
"""Folds that the tables lack: the value third of a fused matmul, and the head, which they leave dense."""


def found(name):
    """Op before -> matmuls, of the first layer and what is around the layers."""
    model = ZOO[name]()
    out = {}
    for fold in sites(model.fn, model.params, *model.inputs).folds:
        if not fold.sites[0].startswith("layers/1/"):
            for member in fold.members:
                if member.inverse and not short(member.param).endswith(("/b", "/bias")):
                    out[short(member.param)] = {short(site) for site in fold.sites}
    return out


def parsed(rows):
    return {before: set(after.split()) for before, after in (row.split(" > ") for row in rows if row not in IMPOSSIBLE)}


TABLES = [(table, name) for table in (AUTOAWQ, LLM_COMPRESSOR) for name in table]


@pytest.mark.parametrize(("table", "name"), TABLES)
def test_tracing_finds_what_the_tables_have_and_what_they_lack(table, name):
    expected = {before: after | MORE.get((name, before), set()) for before, after in parsed(table[name]).items()}
    assert found(name) == expected | parsed(ONLY_OURS[name])
