"""A checkout made importable as ``braze`` with nothing installed: a folder of links, to be put first on ``PYTHONPATH``.

``braze`` is a namespace whose packages lie in the checkout's own folders (``[tool.setuptools] package-dir``), so
``FOLDER/braze/kernels`` and its neighbours, linked to them, are all that an import needs.
"""

from __future__ import annotations

from pathlib import Path

PACKAGES = ("kernels", "layouts", "lightning_ext", "benchmarks")


def namespace(root: Path, folder: Path) -> Path:
    """Make ``folder/braze``, with a link for each package that ``root`` has; return ``folder``."""
    (folder / "braze").mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        link = folder / "braze" / package
        link.unlink(missing_ok=True)
        if (root / package).is_dir():
            link.symlink_to((root / package).resolve(), target_is_directory=True)
    return folder
