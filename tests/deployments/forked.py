"""Processes that tests start, forked from one that has imported the stages' modules, as replicas are."""

import importlib
from multiprocessing import get_context
from multiprocessing.context import BaseContext

import torch

from deployments.stages import STAGES


def forking() -> BaseContext:
    """Returns the context that starts processes: with a GPU they are spawned, because an opened GPU does not
    survive a fork."""
    if torch.cuda.is_available():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


for path in STAGES.values():
    importlib.import_module(path.partition(":")[0])
