"""A shard: consecutive blocks of a denoiser, run by the model class's own forward."""

import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from deployments.engine.blocks import block_names, build_skeleton
from deployments.engine.cut import Boundary, Cut, CutReached, Output
from deployments.engine.parallel import Parallel
from deployments.memory.gguf import find_gguf, load_gguf

_MAX_KEYS_SHOWN = 5


def load_shard(
    model_class: type[ModelMixin],
    checkpoint_dir: Path,
    subfolder: str,
    *,
    blocks: tuple[int, int] | None,
    dtype: torch.dtype,
    variant: str | None = None,
    parallel: Parallel | None = None,
    **loader_options: Any,
) -> "Shard":
    """Loads the blocks `start:end` of a checkpoint, with the class's own `from_pretrained`.

    Args:
        model_class: a diffusers model class.
        checkpoint_dir: the pipeline's folder on this machine; `subfolder` is the model's in it.
        blocks: range of `block_names`; None: the whole model, as an instance of `model_class` itself.
        variant: part of the weights' file names, such as `fp16`.
        parallel: how other ranks share each forward; None: this rank runs it alone.
        loader_options: further arguments of `from_pretrained`: `quantization_config`, `device_map`.

    Raises:
        ValueError: the model cannot be cut this way, or the checkpoint has too few keys or too many.
    """
    cut, foreign = None, tuple[str, ...]()
    if blocks is not None or parallel is not None:
        skeleton = build_skeleton(model_class, checkpoint_dir, subfolder)
    if blocks is not None:
        cut = _plan_cut(skeleton, blocks)
        foreign = cut.foreign_names(skeleton)
        model_class = _shard_class(type(skeleton), cut, foreign, catches_cut=parallel is None)
    if parallel is not None:
        model_class = parallel.narrowed(model_class, skeleton, foreign)
        loader_options["parallel_config"] = parallel.config
    gguf_file = find_gguf(checkpoint_dir / subfolder)
    if gguf_file is not None:
        return Shard(_load_gguf(model_class, gguf_file, dtype, parallel), cut, parallel)
    model, keys = model_class.from_pretrained(
        checkpoint_dir,
        subfolder=subfolder,
        dtype=dtype,
        variant=variant,
        local_files_only=True,
        output_loading_info=True,
        **loader_options,
    )
    _check_keys(keys, checkpoint_dir / subfolder, model_class)
    return Shard(model, cut, parallel)


def _load_gguf(
    model_class: type[ModelMixin], file: Path, dtype: torch.dtype, parallel: Parallel | None
) -> ModelMixin:
    """Loads a model from a GGUF file. Raises ValueError if the file lacks weights."""
    model = load_gguf(model_class, file, dtype)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    check_complete(missing, file.resolve(), model_class.__name__)
    if parallel is not None:
        shared: Any = model
        shared.enable_parallelism(config=parallel.config)
    return model


class Shard:
    """Consecutive blocks of one model, or the whole model. Only one thread may run it.

    Between two runs `model` may be quantised, cast, offloaded, compiled or given adapters.
    """

    def __init__(self, model: nn.Module, cut: Cut | None, parallel: Parallel | None = None) -> None:
        self.model = model
        self._cut, self._parallel = cut, parallel
        self.blocks = None if cut is None else (cut.start, cut.end)
        """The range of `block_names` that this shard holds; None for the whole model."""

    def foreign_names(self, skeleton: nn.Module) -> tuple[str, ...]:
        """Returns the modules of the whole model whose weights other shards have."""
        return () if self._cut is None else self._cut.foreign_names(skeleton)

    def run(self, inputs: Mapping[str, Any], boundary: Boundary | None = None) -> Boundary | tuple[Output, ...]:
        """Runs one forward through these blocks.

        Every shard gets the same `inputs`, the keyword arguments of the model's forward; on shards after the
        first, those named by `shape_only_inputs` may be zeros. `boundary` is what the shard before returned.
        The last shard returns what the model's forward does without `return_dict`: a tuple of predictions.
        """
        with torch.no_grad():
            arguments = {**inputs, "return_dict": False}
            run = partial(self._run, arguments, boundary)
            output = run() if self._parallel is None else self._parallel.run(run)
        # Kandinsky 5 returns the bare tensor
        result: Boundary | tuple[Output, ...] = (output,) if isinstance(output, torch.Tensor) else output
        return result

    def _run(self, arguments: Mapping[str, Any], boundary: Boundary | None) -> Any:
        if self._cut is None:
            return self.model(**arguments)
        with self._cut.open(self.model, boundary):
            try:
                return self.model(**arguments)
            except CutReached as reached:
                return reached.boundary


def _plan_cut(skeleton: nn.Module, blocks: tuple[int, int]) -> Cut:
    names, (start, end) = block_names(skeleton), blocks
    if not 0 <= start < end <= len(names):
        raise ValueError(
            f"blocks {start}:{end} of {type(skeleton).__name__} are not a shard: it has {len(names)} blocks, so "
            f"0 <= start < end <= {len(names)} must hold"
        )
    return Cut(names, start, end)


def _shard_class(model_class: Any, cut: Cut, foreign: Iterable[str], *, catches_cut: bool) -> type[ModelMixin]:
    """Returns a subclass that is built with stubs, and whose forward returns the boundary at the cut.

    It has the model class's name, because diffusers looks classes up by name.

    catches_cut: the class's forward catches CutReached, so hooks (offloading, device maps) see a normal return.
        False for context parallelism, whose hooks would take the boundary for an output.
    """

    def from_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        built = model_class.from_config.__func__(cls, *args, **kwargs)
        cut.stub_foreign(built[0] if isinstance(built, tuple) else built)
        return built

    @wraps(model_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return model_class.forward(self, *args, **kwargs)
        except CutReached as reached:
            return reached.boundary

    own: dict[str, Any] = {"from_config": classmethod(from_config)}
    if catches_cut:
        own["forward"] = forward
    foreign_keys = [rf"^{re.escape(name)}\." for name in foreign]
    return type(
        model_class.__name__,
        (model_class,),
        {
            **own,
            "_keys_to_ignore_on_load_unexpected": [
                *(model_class._keys_to_ignore_on_load_unexpected or ()),
                *foreign_keys,
            ],
        },
    )


def _check_keys(keys: Mapping[str, Any], folder: Path, model_class: Any) -> None:
    """Raises ValueError for missing and for unread weights, because either gives a wrong image."""
    class_name = model_class.__name__
    check_complete(keys["missing_keys"], folder, class_name)
    foreign = model_class._keys_to_ignore_on_load_unexpected or ()  # a tensor parallel load reports these too
    unread = [key for key in keys.get("unexpected_keys", ()) if not any(re.search(one, key) for one in foreign)]
    if unread:
        raise ValueError(
            f"{folder} has weights that no shard of {class_name} reads: {_shown(unread)}; "
            "config.json describes another model, or needs a newer diffusers"
        )


def check_complete(missing: Collection[str], folder: Path, class_name: str) -> None:
    """Raises ValueError if any names are `missing` in the checkpoint: from_pretrained fills those at random."""
    if missing:
        raise ValueError(
            f"{folder} lacks weights that {class_name} needs: {_shown(missing)}; the download is incomplete, or "
            "config.json describes another model: fetch the checkpoint again"
        )


def _shown(keys: Iterable[str]) -> str:
    names = sorted(keys)
    more = len(names) - _MAX_KEYS_SHOWN
    return ", ".join(names[:_MAX_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
