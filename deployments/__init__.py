"""The three stages of a diffusion request, as Ray Serve deployments: encode, denoise, decode.

The modules of this folder are the path of a request: request and answers (what travels between the stages),
encoder, transformer and vae (the Serve side, which never imports torch itself, so that a replica may do everything
of Ray first), errors. The packages, each of which may import those before it: memory (where weights are), families
(what is particular to an architecture), media (files), checkpoints (weights on disk), engine (several requests in
one denoiser), stages (the torch side of each stage), replica (support code of the Serve side), plan (placement,
before anything is loaded). config and options define what a config and a request may say; training made the
checkpoint that is embedded here.
"""
