"""Machines, processes and bytes: what a stage needs, where it is put, how its ranks talk. No HTTP, no diffusers.

Read in this order: config (the base of every config class), resources (what one replica of a stage takes),
serve_options (resources as Ray Serve options), partition (blocks into shards), place (where ranks lie and
meet), termination (what SIGTERM does), preload, forked_worker and fork_server (workers that share
what they import), shard_group (a replica's child actors), replica_port (who reaches a
replica), message, transport and
object_store_transport (from one rank to the next), ring (one rank's threads), metrics (all of them), machine,
launch (files that start and watch a cluster).
"""
