"""Checkpoints: tiny random ones written here, local folders, and those of the Hugging Face hub.

Start with `source`, which finds a checkpoint's family and fetches its files to this machine, without torch. Other
modules without torch: `layout` (explains paths that are not checkpoints), `modular` (checkpoints whose components
lie in several places), `byte_order_mark`, `parts` (weights in files of their own), `together` (folders of links),
`components` (which belong to which stage), `geometry` (the sizes that a checkpoint makes), `integrity`, `weights`
and `packages` (whether its files are complete and can be read). With torch: `convert`, `processors`, and `tiny`,
which writes random checkpoints.
"""
