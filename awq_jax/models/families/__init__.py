"""Families as data, one file for those that are near each other."""

from awq_jax.models.families import deepseek, gemma, gpt, llama, olmo, others, phi, qwen
from awq_jax.models.family import Family

FAMILIES: tuple[Family, ...] = tuple(
    family for file in (llama, qwen, gemma, phi, olmo, gpt, others, deepseek) for family in file.FAMILIES
)
