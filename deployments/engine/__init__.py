"""Several requests in one denoiser, or in each of several, one forward at a time, over one rank or several.

Read in this order: stand_in (what diffusers' pipeline calls), passes (both of guidance under way at once), seat,
step_queue and model_turns (who goes next), merge (several forwards become one), blocks, cut and shard (consecutive
blocks of the model), load (one rank's weights), outline (what of the inputs must cross to other ranks), work (what
each rank does), engine (rank 0, all wired).
"""
