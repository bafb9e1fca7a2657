"""The house stands: who may import whom, what imports where, and what a wheel holds."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

from braze.kernels import table

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernels", "layouts", "lightning_ext", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

#: Room → the rooms that it must not import. The longest prefix of a module's name is its room.
FORBIDDEN = {
    "braze.kernels.triton": (
        "braze.kernels.ops",
        "braze.kernels.optim",
        "braze.kernels.fuse",
        "braze.lightning_ext",
        "braze.layouts",
    ),
    "braze.kernels.ops": ("braze.kernels.optim", "braze.kernels.fuse", "braze.lightning_ext", "braze.layouts"),
    "braze.kernels": ("braze.lightning_ext", "braze.layouts"),
    "braze.layouts": ("braze.kernels", "braze.lightning_ext"),
    "braze.lightning_ext": (),
    "braze.benchmarks": (),
}
IMPORTED_BY_NOTHING = ("braze.benchmarks", "tests")


def inside(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("braze", *parts)).removesuffix(".__init__")


def imports(source: str, module: str, is_package: bool, *, at_import_time: bool = False) -> Iterator[str]:
    """Every module that ``source`` imports, by absolute name; names imported from a package count as its modules."""
    nodes = _executed_on_import(ast.parse(source)) if at_import_time else ast.walk(ast.parse(source))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _executed_on_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _executed_on_import(child)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = max((room for room in FORBIDDEN if inside(module, room)), key=len)
    found = []
    for imported in imports(source, module, is_package):
        own = any(inside(module, hermit) and inside(imported, hermit) for hermit in IMPORTED_BY_NOTHING)
        if not own and any(inside(imported, barred) for barred in (*FORBIDDEN[room], *IMPORTED_BY_NOTHING)):
            found.append(f"{module} imports {imported}")
    if not inside(module, "braze.kernels.triton"):
        eager = imports(source, module, is_package, at_import_time=True)
        lazy = ("triton", "braze.kernels.triton")
        barred = lazy if inside(module, "braze.kernels") else ()
        found += [f"{module} imports {one} on import" for one in eager if any(inside(one, b) for b in barred)]
    return found


def test_the_operator_table_is_up_to_date() -> None:
    again = "python -m braze.kernels --table > docs/operators.md"
    assert (ROOT / "docs" / "operators.md").read_text() == table.markdown(), f"write it again: {again}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_arrows(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("braze.kernels.triton.norm", "from ..ops import rms_norm"),
        ("braze.kernels.triton.norm", "from .. import ops"),
        ("braze.kernels.ops.rms_norm", "from ..triton import norm"),  # not inside a function
        ("braze.kernels.ops.rms_norm", "import triton"),
        ("braze.kernels.dispatch", "if True:\n    import triton"),
        ("braze.layouts.packing", "def f():\n    import braze.kernels.op"),
        ("braze.lightning_ext.plugin", "from braze import benchmarks"),
        ("braze.kernels.op", "import tests.contract"),
        ("braze.benchmarks.ops", "from tests import contract"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str) -> None:
    assert violations(source, module)


def run_python(code: str, folder: Path, **environment: str) -> str:
    """Run ``code`` in a new interpreter that starts in another folder; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_from_another_folder(tmp_path: Path) -> None:
    code = "import braze.kernels, braze.layouts, braze.lightning_ext, braze.benchmarks; print('imported')"
    assert run_python(code, tmp_path) == "imported\n"


def test_the_folder_found_under_its_own_name_leaves_the_package_alone() -> None:
    """``import transformers`` imports whatever is called ``kernels``; from the project's root, that is this folder."""
    code = """
    import braze.kernels, torch
    registered = torch.ops.braze.linear_cross_entropy.default
    import kernels
    assert kernels.__file__ == braze.kernels.__file__
    hidden, weight, target = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True), torch.tensor([0, 1])
    loss = torch.compile(braze.kernels.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss(hidden, weight, target).backward()
    print(torch.ops.braze.linear_cross_entropy.default is registered)
    """
    assert run_python(code, ROOT) == "True\n"


BLOCK = """
    import sys
    for name in ("triton", "lightning", "pytorch_lightning", "rich", "transformers", "timm", "torchvision"):
        sys.modules[name] = None
"""


@pytest.mark.parametrize("compile_disabled", ["0", "1"], ids=["compiled", "compile disabled"])
def test_runs_on_the_cpu_without_triton_and_all_extras(tmp_path: Path, compile_disabled: str) -> None:
    code = (
        BLOCK
        + """
    import torch, braze.kernels
    x = torch.randn(64, 512, requires_grad=True)
    y = braze.kernels.rms_norm(x, eps=1e-6)
    y.sum().backward()
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (512,), None, 1e-6))
    assert x.grad is not None
    from braze.kernels import dispatch
    print(dispatch.choose(braze.kernels.RMS_NORM, (x,)).backend)
    """
    )
    environment = {"TORCHDYNAMO_DISABLE": compile_disabled, "TRITON_INTERPRET": "0"}
    assert run_python(code, tmp_path, **environment) == "compile\n"


def test_import_loads_no_triton(tmp_path: Path) -> None:
    code = """
    import sys, torch
    before = set(sys.modules)
    import braze.kernels
    print(sorted(m for m in set(sys.modules) - before if m.startswith(("triton", "braze.kernels.triton", "rich"))))
    """
    assert run_python(code, tmp_path) == "[]\n"


def test_prints_what_runs_here_without_rich(tmp_path: Path) -> None:
    code = BLOCK + "    import runpy; runpy.run_module('braze.kernels', run_name='__main__')"
    printed = run_python(code, tmp_path, TRITON_INTERPRET="0", BRAZE_BACKEND="")
    from braze.kernels import OPS

    lines = printed.splitlines()
    for op in OPS:
        for device in ("cpu", "cuda"):
            assert any(line.split()[:3] == [op.name, device, "bfloat16"] for line in lines)
    assert "Triton is not installed" in printed


@pytest.mark.skipif(
    int(setuptools.__version__.split(".")[0]) < 77, reason="building a wheel offline needs setuptools >= 77 installed"
)
def test_wheel_holds_every_package_and_its_types(tmp_path: Path) -> None:
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    source = tmp_path / "source"  # setuptools writes beside the sources: give it a copy
    for path in [*ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "LICENSE", *SOURCES, *ROOT.glob("*/py.typed")]:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    table = "kernels/triton/launches/a-device.json"
    (source / table).parent.mkdir(exist_ok=True)
    (source / table).write_text('{"device": "A Device", "entries": []}')
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"braze/" + str(path.relative_to(ROOT)) for path in SOURCES} <= held
    assert {f"braze/{package}/py.typed" for package in PACKAGES} <= held
    assert f"braze/{table}" in held
    assert "braze/__init__.py" not in held  # braze is a namespace
    assert not any(name.startswith(("tests/", "kernels/")) for name in held)


def test_version_is_written_once() -> None:
    version = importlib.metadata.version("braze")
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert not [path for path in SOURCES if "__version__ =" in path.read_text() or f'"{version}"' in path.read_text()]
