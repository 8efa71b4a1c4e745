"""Where weights come from: tiny random ones written here, a local folder, or the Hugging Face hub.

Read `source` first: it names a checkpoint's family and brings its files to this machine, without torch; then
`geometry`, which reads what sizes it makes.
Then `tiny` (writes a random checkpoint of a family), `tiny_pipelines` (their shapes), `tiny_text` (tokenizers
and text encoders).
"""
