"""Where weights come from: tiny random ones written here, a local folder, or the Hugging Face hub.

Read `source` first: it names a checkpoint's family and brings its files to this machine, without torch; `layout`
(what is no checkpoint, and what it is instead), `modular` (one whose components lie in several places),
`byte_order_mark`, `parts` (weights in files of their own), `convert` and `together` (folders of links),
`components` (which belong to which stage), `geometry` (what sizes it makes), `integrity`, `weights` and `packages`
(whether its files are whole and can be read). Then `processors`, with torch, and `tiny`, which writes random
checkpoints.
"""
