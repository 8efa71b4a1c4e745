"""Validation of a request's inputs: its size, cost, adapters, images and video."""
