"""awq_jax: activation-aware weight quantization as JAX function transformations."""
