"""What is published: the wheel holds the package and no more, its files agree with each other, and it runs where it is installed."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mapet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(file):
    """Name -> version of a file of constraints."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def required(*extras):
    """Requirements of the package and of extras, without those of mapet itself."""
    args = [*PROJECT["dependencies"], *(arg for extra in extras for arg in EXTRAS[extra])]
    return [requirement for requirement in map(Requirement, args) if requirement.name != "mapet"]


def lowest(requirement):
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    return bound.version


def test_the_lowest_versions_are_those_promised():
    """`make test-minimum` tests what pyproject.toml says; the tools of dev and docs are no part of the promise."""
    promised = {canonicalize_name(r.name): lowest(r) for r in required(*(EXTRAS.keys() - {"dev", "docs"}))}
    tested = pins("constraints-minimum.txt")
    assert promised.keys() == tested.keys()
    for name, version in promised.items():
        assert re.fullmatch(rf"{re.escape(version)}(\.0)*", tested[name]), name


def test_every_dependency_has_a_lower_bound_that_the_pins_keep():
    tested = pins("constraints.txt")
    for requirement in required(*EXTRAS):
        assert lowest(requirement)
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_pins_are_versions_and_no_addresses():
    for file in ("constraints.txt", "constraints-minimum.txt"):
        for line in (ROOT / file).read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def test_docs_show_every_extra():
    install = (ROOT / "docs" / "index.md").read_text().partition("## Install")[2].partition("\n## ")[0]
    for extra in EXTRAS:
        assert extra in install, extra


# ---- as it is published


def call(*args, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(args, capture_output=True, text=True, cwd=cwd, env=clean | environment, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), made of a copy: setuptools leaves files where it builds."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools is not installed: pip install '.[dev]'")
    place = tmp_path_factory.mktemp("build")
    names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\n")
    for name in filter(None, names):
        (place / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "copy" / name).write_bytes((ROOT / name).read_bytes())
    hooks = f"from setuptools.build_meta import *; build_sdist({str(place / 'dist')!r}); build_wheel({str(place / 'dist')!r})"
    call(sys.executable, "-c", hooks, cwd=place / "copy")
    (wheel,), (sdist,) = (place / "dist").glob("*.whl"), (place / "dist").glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_no_more(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        about = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(about).decode())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == {
        str(p.relative_to(ROOT / "src"))
        for p in (ROOT / "src").rglob("*")
        if p.suffix in (".py", ".typed", ".html", ".css", ".js") or p.parent.name in ("vendor", "web")
    }
    assert "mapet/py.typed" in package
    for license in ("LICENSE", "src/mapet/reports/vendor/LICENSE"):
        assert any(name.endswith(f".dist-info/licenses/{license}") for name in names)
    assert metadata["Version"] == mapet.__version__ and metadata["License-Expression"] == "Apache-2.0 AND MIT"
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    assert metadata["Description-Content-Type"] == "text/markdown" and "mapet" in metadata.get_payload()


@pytest.mark.slow
def test_the_wheel_runs_where_it_is_installed(built, tmp_path):
    """In an environment of its own, which finds the dependencies in this one's."""
    call(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"), cwd=tmp_path)
    python = str(tmp_path / "env" / "bin" / "python")
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    call(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(built[0]), cwd=tmp_path
    )  # fmt: skip
    ours = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("\n".join(ours))
    where = call(python, "-c", "import mapet; print(mapet.__file__, mapet.__version__)", cwd=tmp_path).split()
    assert where == [str(site / "mapet" / "__init__.py"), mapet.__version__]
    command = str(tmp_path / "env" / "bin" / "mapet")
    assert call(command, "--version", cwd=tmp_path).split() == ["mapet", mapet.__version__]
    assert call(command, "--help", cwd=tmp_path) == call(python, "-m", "mapet", "--help", cwd=tmp_path)
    assert "complete -o bashdefault -F _shtab_mapet mapet" in call(command, "completion", "bash", cwd=tmp_path)
    assert "--track" in call(command, "pretrain", "--help-all", cwd=tmp_path)
