"""`shapes`: a small FLUX that draws coloured shapes on request, trained here in about an hour on two cores.

In order: `scene` (what can be drawn, and its picture), `wording` (sentences for a scene), `text` (tokenizers and
text encoders), `models` (autoencoder and transformer), `plan` (how much training), `autoencoder` and `flow`
(their trainings), `sheet` (pictures to look at), `train` (all of it, resumable, into a checkpoint). The trained
weights lie in `deployments/checkpoints/embedded/shapes`.
"""
