"""What a source distribution holds, and what the build refuses before it starts a compiler. `make package` builds and
installs both distributions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, so that nothing is written beside the sources."""
    copy = tmp_path_factory.mktemp("tree")
    for name in NEEDED:
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "fastnorm"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def setup(tree: Path, *arguments: str, stand_in: str | None = None) -> subprocess.CompletedProcess:
    """setup.py with FASTNORM_CUDA=0; `stand_in`: where another torch is found first."""
    environment = {**os.environ, "FASTNORM_CUDA": "0", "PYTHONPATH": stand_in or ""}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def test_a_source_distribution_holds_every_source(tree: Path) -> None:
    done = setup(tree, "-q", "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("fastnorm-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(path.relative_to(tree)) for folder in ("csrc", "fastnorm") for path in (tree / folder).rglob("*.*")}
    sources = {name for name in sources if not name.endswith((".so", ".pyc"))}
    assert {*sources, *NEEDED} <= held
    assert any(name.endswith(".cu") for name in sources) and "fastnorm/py.typed" in held
    assert not any(name.endswith((".so", ".o", ".pyc")) or name.startswith("tests") for name in held)


def test_an_old_torch_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    package = tmp_path / "torch"
    (package / "utils" / "cpp_extension").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.4.1+cpu'")
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "cpp_extension" / "__init__.py").touch()
    done = setup(tree, "--version", stand_in=str(tmp_path))
    assert done.returncode != 0
    assert "fastnorm: needs torch 2.11 or later, found 2.4.1+cpu" in done.stderr
