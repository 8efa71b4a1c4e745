"""Plans a placement from a checkpoint's configs and a list of GPUs, before anything is loaded.

Read in this order: sizes (the data that plans use), describe (computes sizes from configs on the meta device, with
inputs and memory/working.py), place (processes to GPUs), rate (throughput, from a profile), advice, propose (a
config if none is given), report and picture; capacity (what an app that is about to start lacks).
Only describe, inputs, working and measure import torch.
"""
