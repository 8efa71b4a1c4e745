"""Support code for stage replicas: lifecycle, executors, worker ranks, request events, autoscaling figures.

Torch-free.
"""
