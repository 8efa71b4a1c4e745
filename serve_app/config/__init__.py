"""The keys of a YAML config, and the checks of its values before anything starts."""
