"""``python -m tools.release``: build sdist, wheel and documentation into dist/, and try the wheel on its own.

It uploads nothing. Before it builds: the tree is clean, CHANGELOG.md begins with the version of pyproject.toml, and
``python -m simulations.front_page --check`` passes. It installs the wheel into an empty virtual environment outside of
the checkout, runs ``TRIED`` there, and prints the SHA-256 of each file. With ``--reuse`` that environment takes the
dependencies of this one, and says so: it is quick, and shows nothing about the dependencies that the wheel declares.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
BUILDERS = ("build", "hatchling>=1.27")
HEADING = re.compile(r"^## \[(?P<version>[^]]+)\](?: - (?P<date>\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)
NEXT = re.compile(r"^## \[Unreleased\]\s+(?=## )", re.MULTILINE)
"""The heading of what comes next, while it is empty."""
TRIED = (
    ("fed-dpsat", "run", "{packages}/simulations/digits_dpsat.toml", "--set", "num_rounds=2", "--out", "run"),
    ("fed-dpsat", "ledger", "run"),
    ("fed-dpsat", "list"),
    ("fed-dpsat", "init", "project", "--kind", "strategy"),
    ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "project"),
)


class ReleaseError(Exception):
    """This checkout makes no release; the text says why."""


def version_of(root: Path) -> str:
    """The version in pyproject.toml, which is the only place that has it."""
    return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])


def check_changelog(text: str, version: str) -> None:
    """Raise ``ReleaseError`` unless CHANGELOG.md begins with ``version`` and a date; nothing may be unreleased."""
    first = HEADING.search(NEXT.sub("", text))
    if first is None or first["version"] != version or not first["date"]:
        found = first[0] if first else "no heading"
        raise ReleaseError(f"CHANGELOG.md begins with {found!r}, not with '## [{version}] - DATE'; write what changed")


def check_clean(root: Path) -> None:
    """Raise ``ReleaseError`` for a file that differs from the last commit."""
    if changed := _said(["git", "status", "--porcelain"], root):
        raise ReleaseError(f"the tree is not clean; commit or remove:\n{changed}")


def expected(root: Path) -> set[str]:
    """The files that the wheel has beside its metadata: those of the packages in git, without ``exclude``."""
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = _said(["git", "ls-files", *wheel["packages"]], root).splitlines()
    return set(files) - set(wheel["exclude"])


def check_wheel(wheel: Path, files: set[str]) -> None:
    """Raise ``ReleaseError`` unless ``wheel`` has exactly ``files`` beside its metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    found = {name for name in names if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    if differ := sorted(found ^ files):
        raise ReleaseError(f"{wheel.name} differs from the files of its packages in git: {', '.join(differ[:10])}")


def build(root: Path, into: Path, python: Path) -> tuple[Path, Path]:
    """The sdist of ``root``, and the wheel that is built from it, by ``python``, which has ``BUILDERS``."""
    _said([python, "-m", "build", "--no-isolation", "--outdir", into, root], root)
    (sdist,), (wheel,) = into.glob("*.tar.gz"), into.glob("*.whl")
    return sdist, wheel


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment in ``folder``."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def install(python: Path, wheel: Path, *, reuse: bool) -> None:
    """Install ``wheel`` and pytest, with dependencies from the index or, to ``reuse`` them, from this environment."""
    if not reuse:
        pins = ["--constraint", ROOT / "constraints.txt"]
        _said([python, "-m", "pip", "install", "--quiet", *pins, wheel, "pytest"], python.parent)
        return
    _said([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], python.parent)
    here = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (_packages(python) / "reused.pth").write_text("".join(f"{path}\n" for path in here))


def try_out(python: Path, version: str, folder: Path) -> None:
    """Run ``TRIED`` in ``folder`` with what is installed beside ``python``; raises ``ReleaseError``."""
    said = _said([python.parent / "fed-dpsat", "--version"], folder)
    if said != f"fed-dpsat {version}":
        raise ReleaseError(f"fed-dpsat --version says {said!r}, and pyproject.toml {version}")
    place = _said([python, "-c", "import fed_dpsat; print(fed_dpsat.__file__)"], folder)
    if not Path(place).is_relative_to(_packages(python)):
        raise ReleaseError(f"the wheel is not what is tried: fed_dpsat is at {place}")
    for command, *arguments in TRIED:
        print(f"  {' '.join((command, *arguments))}".format(packages="SITE-PACKAGES"), flush=True)
        _said([python.parent / command, *(one.format(packages=_packages(python)) for one in arguments)], folder)


def document(root: Path, into: Path, version: str) -> Path:
    """The documentation as a site, in an archive; raises ``ReleaseError`` if its generated pages are not up to date."""
    _said([sys.executable, "-m", "tools.reference"], root)
    check_clean(root)
    _said([sys.executable, "-m", "zensical", "build", "--strict"], root)
    archive = into / f"fed_dpsat-{version}-docs.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(root / "site", f"fed_dpsat-{version}-docs")
    return archive


def release(*, reuse: bool) -> list[Path]:
    """Make a release of this checkout in dist/, and check it; the files."""
    version, dist = version_of(ROOT), ROOT / "dist"
    check_clean(ROOT)
    check_changelog((ROOT / "CHANGELOG.md").read_text(), version)
    _step("measure the figures of the front page")
    _said([sys.executable, "-m", "simulations.front_page", "--check"], ROOT)
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    _step("build the documentation")
    archive = document(ROOT, dist, version)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _step("build sdist and wheel")
        builder = environment(folder / "builder")
        _said([builder, "-m", "pip", "install", "--quiet", *BUILDERS], folder)
        made = folder / "made"
        sdist, wheel = build(ROOT, made, builder)
        check_wheel(wheel, expected(ROOT))
        reused = ", which reuses the dependencies of this one: those of the wheel are not checked" if reuse else ""
        _step(f"try the wheel in an empty environment{reused}")
        python = environment(folder / "user")
        install(python, wheel, reuse=reuse)
        (folder / "work").mkdir()
        try_out(python, version, folder / "work")
        return [archive, *(Path(shutil.copy(one, dist)) for one in (sdist, wheel))]


def _packages(python: Path) -> Path:
    (found,) = python.parents[1].glob("lib/python*/site-packages")
    return found


def _step(text: str) -> None:
    print(f"- {text}", flush=True)


def _said(command: Sequence[str | Path], folder: Path) -> str:
    """What ``command`` prints in ``folder``; raises ``ReleaseError`` with its output if it fails."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }  # PYTHONPATH hides faults
    words = [str(one) for one in command]
    done = subprocess.run(words, cwd=folder, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def main() -> int:
    """Make the release, or print the reason that prevents it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reuse", action="store_true", help="try the wheel with the packages of this environment")
    try:
        made = release(reuse=parser.parse_args().reuse)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for one in sorted(made):
        print(f"{hashlib.sha256(one.read_bytes()).hexdigest()}  {one.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
