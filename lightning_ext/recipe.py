"""What the plugins do to a model, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import fp8

FUSE = ("auto", "off")
MEMORY_FORMATS = (None, "channels_last")
COMPILE = ("off", "regional", "full")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The arguments that all plugins share.

    Attributes:
        owner: the name of the plugin, for messages.
        fuse: "auto" swaps every module whose fused form passes its check; "off" swaps none.
        skip: what to leave alone, as ``braze.kernels.fuse`` takes it.
        memory_format: "channels_last" for the convolutions, or None.
        compile: "off"; "regional" for the blocks that repeat; "full" for each part that a training step calls.
        compile_kwargs: arguments of ``torch.compile``; with "regional" also ``budget`` and ``dynamic_batch`` of
            ``compile_regions``.
        fp8: "tensorwise", "rowwise" or "rowwise_with_gw_hp", torchao's recipes for linear layers in float8, or None.

    Raises:
        ValueError: if an argument is none of these.
        RuntimeError: if fp8 is asked for where the hardware has none.
        ModuleNotFoundError: if it is asked for without torchao.
    """

    owner: str
    fuse: str = "auto"
    skip: tuple[str, ...] = ()
    memory_format: str | None = None
    compile: str = "off"
    compile_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fp8: fp8.RecipeName | None = None

    def __post_init__(self) -> None:
        for name, known in (("fuse", FUSE), ("memory_format", MEMORY_FORMATS), ("compile", COMPILE)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{self.owner}: {name} must be {' or '.join(map(repr, known))}, got {value!r}")
        if self.compile_kwargs and self.compile == "off":
            raise ValueError(
                f"{self.owner}: compile_kwargs must be empty where nothing is compiled, got "
                f"{dict(self.compile_kwargs)}; give it compile='regional' or compile='full', too"
            )
        fp8.check(self.owner, self.fp8)
