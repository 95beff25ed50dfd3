"""docker/install.py in a stand-in for NVIDIA's images, made on the spot.

A Python of its own: marked as externally managed, with distributions that have no RECORD, as Debian's packages have,
and a torch of a version that no index has. The packages to install are wheels in a folder; nothing is downloaded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lacking import lacking

INSTALL = Path(__file__).parents[2] / "docker/install.py"
THEIRS = "2.9.0a0+145a3a7bda.nv25.10"
METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"
VERSION = "python{}.{}".format(*sys.version_info)


class Image:
    """A Python beside this one, with the same standard library and site-packages of its own."""

    def __init__(self, folder: Path) -> None:
        self.python, library = folder / "bin" / VERSION, Path(sysconfig.get_path("stdlib"))
        self.site, self.wheels = folder / "lib" / VERSION / "site-packages", folder / "wheels"
        for made in (self.python.parent, self.site, self.wheels):
            made.mkdir(parents=True)
        base = Path(sys.base_prefix) / "bin" / VERSION
        pip = [*library.glob("site-packages/pip"), *library.glob("site-packages/pip-*.dist-info")]
        if not (base.is_file() and len(pip) == 2):
            lacking("this Python has no program or no pip of its own")
        shutil.copy(base, self.python)
        for entry in library.iterdir():
            if entry.name != "site-packages":
                (self.site.parent / entry.name).symlink_to(entry)
        (self.site.parent / "EXTERNALLY-MANAGED").write_text("[externally-managed]\nError=no\n")
        for entry in pip:
            (self.site / entry.name).symlink_to(entry)
        self.add("packaging", "24.0")
        self.add("torch", THEIRS)

    def add(self, name: str, version: str) -> None:
        """A package of the distribution: no RECORD says which files are its own."""
        (self.site / f"{name}.py").write_text(f"__version__ = {version!r}\n")
        metadata = self.site / f"{name}-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(METADATA.format(name, version))

    def wheel(self, name: str, version: str, *needs: str) -> None:
        required = "".join(f"Requires-Dist: {need}\n" for need in needs)
        files = {
            f"{name}.py": f"__version__ = {version!r}\n",
            f"{name}-{version}.dist-info/METADATA": METADATA.format(name, version) + required,
            f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        files[f"{name}-{version}.dist-info/RECORD"] = "".join(f"{file},,\n" for file in files)
        with zipfile.ZipFile(self.wheels / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            for file, text in files.items():
                archive.writestr(file, text)

    def run(self, *words: object, python: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = [str(python or self.python), *map(str, words)]
        environment = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    made = Image(tmp_path / "image")
    made.wheel("packaging", "25.0")
    made.wheel("torch", "2.13.0")
    made.wheel("ours", "1.0", "packaging>=25", "torch>=2.4")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\npackaging==25.0\n")
    return made


def test_what_the_image_has_stays(image: Image, tmp_path: Path) -> None:
    """In the image's own Python the same line fails, twice over."""
    assert "externally-managed-environment" in image.run("-m", "pip", "install", "ours").stderr
    broken = image.run("-m", "pip", "install", "ours", PIP_BREAK_SYSTEM_PACKAGES="1")
    assert broken.returncode == 1
    assert "packaging 24.0" in broken.stderr
    assert "RECORD" in broken.stderr
    before = {path: path.stat().st_mtime_ns for path in image.site.glob("*.*")}
    line = ("pip", "install", "-c", tmp_path / "constraints.txt", "ours")
    theirs = tmp_path / "theirs.txt"  # constraints of the image, for its own Python
    theirs.write_text("packaging==24.0\n")
    kept = ("--keep", "torch", "--keep", "tensorrt")
    done = image.run(INSTALL, *kept, tmp_path / "new", *line, PIP_CONSTRAINT=str(theirs))
    assert done.returncode == 0, done.stderr
    shown = "import ours, packaging, torch; print(packaging.__version__, torch.__version__)"
    assert image.run("-c", shown, python=tmp_path / "new/bin/python").stdout == f"25.0 {THEIRS}\n"
    assert {path: path.stat().st_mtime_ns for path in image.site.glob("*.*")} == before


def test_what_would_replace_the_images_is_refused(image: Image, tmp_path: Path) -> None:
    image.wheel("newer", "1.0", "torch>=2.10")
    done = image.run(INSTALL, "--keep", "torch", tmp_path / "new", "pip", "install", "newer")
    assert done.returncode == 1
    assert "newer 1.0 depends on torch>=2.10" in done.stdout
    assert "Cannot install newer==1.0 because these package versions have conflicting" in done.stderr
    assert not list((tmp_path / "new").rglob("torch.py"))
    assert image.run(INSTALL, "--keep", "torch", tmp_path / "other", "ours").returncode == 2
