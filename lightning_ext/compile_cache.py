"""What torch.compile made, in a file, so that the next run does not make it again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch


def save_compile_cache(path: str | os.PathLike[str]) -> bool:
    """Write what Inductor and autograd compiled in this process to a file; whether there was anything to write.

    Call it after the first steps: what was only read from the cache belongs to it as well. A reader never sees half a
    file. With several processes, rank zero's is enough if all run the same model.

    Args:
        path: the file, whose folder must exist.

    Raises:
        FileNotFoundError: if the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_compile_cache: the folder of path must exist, got {path}; make it first")
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        return False
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(saved[0])
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return True


def load_compile_cache(path: str | os.PathLike[str]) -> bool:
    """Fill torch's caches from a file of :func:`save_compile_cache`; whether there was one.

    Call it before the first step. Entries are found by what is compiled, with which versions and for which device: a
    file of another machine is of no use, and does no harm. It holds pickled code: load only what you wrote yourself.

    Args:
        path: the file; False is returned if it does not exist, as in a first run.
    """
    path = Path(path)
    return path.is_file() and torch.compiler.load_cache_artifacts(path.read_bytes()) is not None
