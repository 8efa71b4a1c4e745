"""Memory techniques, set in each stage's config: quantise, cast, offload, stream, compile."""
