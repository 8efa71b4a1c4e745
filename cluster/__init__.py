"""Machines, processes and bytes: what a stage needs and where it is put. Knows nothing of HTTP or diffusers.

Read in this order: config (the base of every config class), resources (what one replica of a stage takes),
serve_options (resources as Ray Serve options), partition (blocks into shards).
"""
