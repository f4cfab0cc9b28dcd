"""How good a model still is."""

from awq_jax.evaluate.score import Score as Score
from awq_jax.evaluate.score import check_same_tokens as check_same_tokens
from awq_jax.evaluate.score import score as score
from awq_jax.evaluate.score import windows as windows
