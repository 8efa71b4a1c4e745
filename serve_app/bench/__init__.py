"""`relay bench …`: every claim of speed in the docs comes from here, against a baseline of the same run.

Read report first (how a result is shown and written); then one file per benchmark.
"""
