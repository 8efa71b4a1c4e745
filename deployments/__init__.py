"""The three stages of a diffusion request, as Ray Serve deployments: encode, denoise, decode.

Read in this order: request (what travels between the stages), families (what is particular to an
architecture), checkpoints (weights on disk), config (what one stage may be told), stages (the torch side of
each stage), engine (several requests in one denoiser), lane (a stage's thread), replica (what ends one), then
encoder, transformer and vae (the Serve side, which never imports torch itself, so that a replica may do everything
of Ray first).
"""
