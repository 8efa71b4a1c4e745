"""The engine: runs single forwards of several requests on shared denoisers, over one rank or several.

Modules in reading order: denoiser_stand_in (what diffusers' pipeline calls), passes (both guidance passes at
once), seat, step_queue, choice and time_slices (which forwards run next), merge (several forwards become one),
blocks, cut and shard (consecutive blocks of the model), load (one rank's weights), constant_cache (sends an input
to other ranks only once), micro_batch (what each rank does), engine (rank 0, with everything connected).
"""
