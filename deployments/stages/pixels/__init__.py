"""Pixels to latents and back: input images and their posteriors, decodes and their tiles."""
