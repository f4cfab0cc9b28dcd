import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest
from hypothesis import settings

settings.register_profile("awq_jax", deadline=None, max_examples=30, derandomize="CI" in os.environ)
settings.load_profile("awq_jax")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The .gguf of SmolLM2-135M in the user's cache, fetched on first use."""
    from awq_jax.demo import fetch_smollm2

    return fetch_smollm2()
