"""Sizes that tiny denoisers share: 128 features wide, their text 64 (`text.TEXT_WIDTH`)."""

HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}
ROPE_AXES = (8, 12, 12)
"""Features of one head for frame, row and column."""
LATENT_SIZE = 8
"""Latent height and width that a pipeline makes if no size is given: 64 px. FLUX, Qwen-Image and Wan ignore it."""
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
"""Config of a vision tower."""
