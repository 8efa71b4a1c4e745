"""`relay bench …`: the source of every claim about speed in the docs, each against a baseline of the same run.

Start with `report`, which prints and writes results; then there is one file per benchmark.
"""
