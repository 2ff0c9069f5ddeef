"""The wheel, built and installed where neither the checkout nor what is installed of it is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT

PACKED = ("pruners", "search", "cluster", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An environment that has the wheel."""

    wheel: Path
    bin: Path
    packages: Path

    def call(
        self, *command: str, cwd: Path, variables: Mapping[str, str] | None = None, limit: int = 100
    ) -> subprocess.CompletedProcess[str]:
        """Call a program of the environment, from another directory."""
        own = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RAY_", "MLFLOW"))
        }
        return subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=cwd,
            env={**own, "HOME": str(cwd), **(variables or {})},
            capture_output=True,
            text=True,
            timeout=limit,
        )


def pip(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True
    )


def install(folder: Path) -> Installed:
    """Build the wheel and install it in an environment that borrows this one's other packages.

    A folder named in a .pth file is put on the path, and the .pth files in it are not read: so what
    leads to the checkout here leads nowhere there.
    """
    source = folder / "source"
    source.mkdir()
    for name in PACKED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            shutil.copyfile(ROOT / name, source / name)
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir")
    pip(*build, str(folder), str(source))
    (wheel,) = folder.glob("prunefront-*.whl")
    shutil.rmtree(source)
    venv.create(folder / "environment", with_pip=False, symlinks=True)
    python = folder / "environment" / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    packages = Path(answer.stdout.strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip("--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    return Installed(wheel=wheel, bin=python.parent, packages=packages)
