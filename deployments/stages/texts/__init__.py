"""Texts to embeddings: what runs a pipeline's text encoders, which forwards are merged, what is cut off."""
