"""``make release``: what it refuses, and what the wheel has; a slow test runs the wheel in an empty environment."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tools import release
from tools.release import HEADING, ROOT, ReleaseError, check_changelog, check_clean, check_wheel, expected, version_of

FILES = {"fed_dpsat/__init__.py", "fed_dpsat/py.typed"}


@pytest.fixture
def checkout(tmp_path) -> Path:
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "Begin"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *command], cwd=tmp_path, check=True)
    return tmp_path


def wheel_of(folder: Path, names: set[str]) -> Path:
    path = folder / "fed_dpsat-0.2.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in (*names, "fed_dpsat-0.2.0.dist-info/METADATA"):
            file.writestr(name, "")
    return path


def test_the_last_release_in_the_changelog_is_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    check_changelog(text[text.index(f"## [{version_of(ROOT)}]") :], version_of(ROOT))
    assert [found["version"] for found in HEADING.finditer(text)][:2] == ["Unreleased", version_of(ROOT)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# Changelog\n\n## [Unreleased]\n\n- A line\n\n## [0.2.0] - 2026-11-30\n", r"\[Unreleased\]"),
        ("## [0.1.0] - 2026-11-30\n", r"\[0.1.0\]"),
        ("## [0.2.0]\n", r"\[0.2.0\]"),
        ("nothing", "no heading"),
    ],
)
def test_another_first_heading_is_refused(text, found):
    with pytest.raises(ReleaseError, match=found):
        check_changelog(text, "0.2.0")


def test_an_empty_heading_of_what_comes_next_may_stay():
    check_changelog("# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-30\n", "0.2.0")


def test_a_tree_with_a_change_is_refused(checkout):
    check_clean(checkout)
    (checkout / "new.py").write_text("")
    with pytest.raises(ReleaseError, match=r"new\.py"):
        check_clean(checkout)


@pytest.mark.parametrize("names", [FILES - {"fed_dpsat/py.typed"}, FILES | {"tests/test_cli.py"}])
def test_a_wheel_with_a_file_more_or_less_is_refused(tmp_path, names):
    check_wheel(wheel_of(tmp_path, FILES), FILES)
    with pytest.raises(ReleaseError, match="py.typed" if len(names) == 1 else "test_cli.py"):
        check_wheel(wheel_of(tmp_path, names), FILES)


def test_the_wheel_has_what_users_need_and_no_more():
    files = expected(ROOT)
    assert {"fed_dpsat/py.typed", "strategies/kalman.py", "simulations/digits_dpsat.toml"} <= files
    assert "presets/fashion-mnist-1-client-epsilon-2.toml" in files
    assert "fed_dpsat/lab/starter/device/policy.toml.tmpl" in files
    assert "fed_dpsat/lab/report/templates/style.css" in files
    assert "simulations/front_page.py" not in files
    assert {name.partition("/")[0] for name in files} == {"fed_dpsat", "strategies", "simulations", "presets"}


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    """With the dependencies of this environment; the builders come from the index."""
    builder = release.environment(tmp_path / "builder")
    fetched = subprocess.run([builder, "-m", "pip", "install", "--quiet", *release.BUILDERS], check=False)
    if fetched.returncode:
        pytest.skip("no index of packages to fetch the builders from")
    _, wheel = release.build(ROOT, tmp_path / "made", builder)
    check_wheel(wheel, expected(ROOT))
    user = release.environment(tmp_path / "user")
    release.install(user, wheel, reuse=True)
    (tmp_path / "work").mkdir()
    release.try_out(user, version_of(ROOT), tmp_path / "work")
