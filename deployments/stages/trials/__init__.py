"""Calls that compute nothing: they find sizes, memory needs and errors before an image is requested."""
