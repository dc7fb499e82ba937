"""The wheel holds both packages whole and works where the checkout is not."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("qjax", "pallas_kernels")

# Stands in for an environment without extras: a None in sys.modules makes the import fail.
IMPORT_WITHOUT_EXTRAS = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))
import pallas_kernels, qjax
print(qjax.__file__, pallas_kernels.__file__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out)
    run(*build, ROOT, cwd=out)
    (built,) = out.glob("qjax-*.whl")
    return built


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel: Path):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == sources
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_the_metadata_says_what_pyproject_says(wheel: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    archive = zipfile.ZipFile(wheel)
    info = f"qjax-{project['version']}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"Version: {project['version']}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "qjax = qjax.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_imports_outside_the_checkout_and_without_extras(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    extras = ["tokenizers", "gguf", "safetensors", "chex", "pytest"]
    files = run(
        sys.executable, "-I", "-c", IMPORT_WITHOUT_EXTRAS, tmp_path, *extras, cwd=tmp_path
    ).splitlines()
    assert files == [str(tmp_path / package / "__init__.py") for package in PACKAGES]
