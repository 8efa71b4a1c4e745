"""Options of config and requests: adapters, schedulers, step caches, priority, resuming. Imports no torch."""
