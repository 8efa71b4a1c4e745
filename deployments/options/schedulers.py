"""Config of the schedulers that a request may choose besides the checkpoint's own."""

import difflib
import re
from functools import cache
from typing import Self

from pydantic import Field, model_validator

from deployments.families.sources import diffusers_folder
from deployments.memory.config import Technique

_CLASS = re.compile(r"^class (\w+)\((?:\w+, )*SchedulerMixin\b", re.MULTILINE)


class SchedulerConfig(Technique):
    """A diffusers scheduler, made from the checkpoint's own: `class_name.from_config(own.config, **options)`."""

    main_key = "class_name"

    class_name: str = Field(description="class of diffusers, such as UniPCMultistepScheduler")
    options: dict[str, bool | int | float | str] = Field(
        {}, description="options that override those of the checkpoint's own scheduler: {use_karras_sigmas: true}"
    )
    name: str = Field("", description="name in requests; left out: class_name")

    @property
    def asked_as(self) -> str:
        return self.name or self.class_name

    @model_validator(mode="after")
    def _check_class(self) -> Self:
        known = scheduler_classes()
        if self.class_name not in known:
            near = difflib.get_close_matches(self.class_name, sorted(known), n=1)
            hint = f" (did you mean {near[0]}?)" if near else f"; it has {', '.join(sorted(known))}"
            raise ValueError(f"the installed diffusers has no scheduler {self.class_name!r}{hint}")
        return self


@cache
def scheduler_classes() -> frozenset[str]:
    """Returns the installed diffusers' scheduler classes, read from source, because importing it imports torch."""
    files = (diffusers_folder() / "schedulers").glob("scheduling_*.py")
    return frozenset(name for file in files for name in _CLASS.findall(file.read_text(encoding="utf-8")))
