"""Config of a model and of each of its stages, as a YAML file sets it."""
