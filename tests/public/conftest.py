import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def _as_its_authors_wrote_it():
    """Other people's models promote dtypes and ranks, which the tests forbid this project's own code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
