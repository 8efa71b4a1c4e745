"""From a checkpoint's configs and a list of GPUs to a placement, before anything is loaded.

Read in this order: sizes (what is planned with), describe (configs to sizes, on the meta device, with inputs and
working), place (processes to GPUs), rate (what it can serve, from a profile), advice, propose (a config where
none is given), report and picture; room (what an app that is about to start lacks).
Only describe, inputs, working and measure import torch.
"""
