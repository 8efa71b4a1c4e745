"""The ranks of a shard group: where they run, how they connect, and how messages get from each rank to the next.

Reading order: partition (which blocks go to which shard), place, store_address and shard_group (the actors),
message and transport (over torch.distributed; object_store_transport uses Ray's object store, open_transport
chooses), ring (one rank's threads), then parallel_group (ranks that share a forward).
"""
