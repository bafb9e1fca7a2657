"""What another library of kernels is to the ``ops`` benchmark."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """A library, and adapters to those of its functions that compute what an operator does in its default variant.

    An adapter takes the arguments of the operator's public function, and imports the library when it is called.
    """

    name: str
    #: What is imported, and what is installed.
    module: str
    distribution: str
    #: By operator.
    functions: Mapping[str, Callable[..., Any]]
    #: Device types that the library runs on.
    devices: tuple[str, ...] = ("cuda",)

    def missing(self, device: str) -> str | None:
        """Why the library cannot run on such a device here; None if it can."""
        if device not in self.devices:
            return f"{self.distribution} runs on {' and '.join(self.devices)}, this is {device}"
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return f"{self.distribution} is not installed"
        return None

    def version(self) -> str:
        """The name and version of what is installed."""
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:
            return self.distribution
