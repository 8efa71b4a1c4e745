"""Tiny, random, complete checkpoints, so that tests and a first look at the cluster need no download.

`names` lists them, without torch; `write` writes one. The pipelines are built in `families` (the six that most
tests use), `flux` and `flux3` (double, then single blocks), `controlnets`, `images`, `earlier_images`,
`qwen_edit`, `wan`, `ltx`, `kandinsky6` and `videos`, from `text` and `language` (tokenizers, text encoders),
`vision` (image encoders and processors), `vaes`, `sizes`.
"""
