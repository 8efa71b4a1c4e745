"""Tiny, random, complete checkpoints: tests and a first look at the cluster need no download.

`names` says which there are, without torch; `write` writes one. The pipelines themselves are built in `families`
(the six that the most tests rest on), `flux` (double, then single blocks), `images`, `earlier_images`,
`qwen_edit`, `wan`, `ltx` and `videos`, out of `text` and `language` (tokenizers, text encoders),
`vision` (what looks at pictures), `vaes`, `sizes`.
"""
