"""What an installation knows of itself: metadata, version, and where an editable one is found."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastce

CLONE = Path(__file__).parent.parent
PYPROJECT = CLONE / "pyproject.toml"


def run(code, folder, *options):
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_clone(folder, *names):
    """Copy files, and the package without its contents: enough for its metadata."""
    if not PYPROJECT.exists():
        pytest.skip("an installed package has no pyproject.toml")
    pytest.importorskip("setuptools", "77")  # what pyproject.toml asks for
    (folder / "fastce").mkdir(parents=True)
    (folder / "fastce" / "__init__.py").touch()
    for name in names:
        shutil.copy(CLONE / name, folder)


def test_the_version():
    done = subprocess.run(
        [sys.executable, "-m", "fastce", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"fastce {fastce.__version__}\n"


def test_an_editable_install_is_found_from_the_clones_parent(tmp_path):
    """There the clone, a folder called fastce, must not be taken for a namespace package."""
    clone, site = tmp_path / "fastce", tmp_path / "site"
    copy_clone(clone, "pyproject.toml", "LICENSE")
    # The project's own setup.py would compile.
    (clone / "setup.py").write_text("from setuptools import setup\nsetup(long_description='')\n")
    run("from setuptools.build_meta import build_editable; build_editable('..')", clone)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import site; site.addsitedir({str(site)!r}); import fastce; print(fastce.__file__)"
    for folder in (tmp_path, clone, Path(os.sep)):
        assert run(code, folder, "-S").strip() == str(clone / "fastce" / "__init__.py")


def test_package_indexes_get_absolute_links(tmp_path):
    """They show README.md, but resolve no relative links."""
    pytest.importorskip("Cython")
    copy_clone(tmp_path / "clone", "pyproject.toml", "LICENSE", "README.md", "setup.py")
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare; prepare('..')"
    run(code, tmp_path / "clone")
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text(encoding="utf-8")
    url = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)#]+)", metadata)
    pictures = [link for bang, link in links if bang]
    assert pictures and len(links) > len(pictures)
    assert all(link.startswith(f"{url}/raw/main/") for link in pictures)
    assert all(link.startswith("https://") for _, link in links)
    assert "Description-Content-Type: text/markdown" in metadata
    assert f"Project-URL: Repository, {url}\n" in metadata
