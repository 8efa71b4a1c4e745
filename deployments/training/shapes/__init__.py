"""Trains `shapes`: a small FLUX that draws coloured shapes on request, on two cores and without a download.

Read in this order: `scene` (what can be drawn, and its true image), `wording` (sentences for a scene), `text`
(tokenizers and text encoders), `models` (autoencoder and transformer), `plan` (amount of training), `autoencoder`,
`reading`, `flow` and `decoder` (the training phases), `sheet` (sample images), `train` (the whole training,
resumable, which writes a checkpoint), `grader` (judges images). The result is in
`deployments/checkpoints/embedded/shapes`.
"""
