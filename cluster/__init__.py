"""Machines, processes and bytes: the resources of a stage, its placement, and how its ranks communicate. This
package contains no HTTP and no diffusers code.

The top level holds what every process uses: config (the base of every config class), preload, forked_worker and
fork_server (workers that share their imports), termination (handling of SIGTERM), processes, metrics, counted and
periodic. The folders, each of which imports only those before it: machines (nodes and accelerators), replicas (the
Serve options of a stage's replicas), scaling (the number of replicas), ranks (communication between the processes
of one replica), launch (files that start and monitor a cluster).
"""
