"""The engine of a Transformer replica: many pipelines in, one denoiser, sharded, kept busy.

Read in this order:
    step_queue  who goes next
    merge       several forwards become one
    stand_in    what diffusers' pipeline calls
    shard       a block range of the model
    engine      wires them
"""
