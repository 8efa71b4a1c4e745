"""`shapes`: a small FLUX that is to draw coloured shapes on request, trained on two cores without a download.

In order: `scene` (what can be drawn, and its picture), `wording` (sentences for a scene), `text` (tokenizers and
text encoders), `models` (autoencoder and transformer), `plan` (how much training), `autoencoder` and `flow`
(their trainings), `sheet` (pictures to look at), `train` (all of it, resumable, into a checkpoint). What came of
it is in `deployments/checkpoints/embedded/shapes`.
"""
