"""What README.md and docs/ show works: blocks run, commands parse, links lead somewhere, references are the code's."""

from __future__ import annotations

import dataclasses
import re
import sys
import tomllib
from pathlib import Path

import pytest

from fed_dpsat import RunConfig
from tools import blocks, links, notebook, reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md"))]


def name(path):
    return str(path.relative_to(ROOT))


def with_blocks():
    for path in PAGES:
        if path != notebook.PAGE and any(
            block.language in blocks.LANGUAGES and block.not_run is None for block in blocks.blocks_of(path)
        ):
            marks = [pytest.mark.slow] if blocks.SLOW in path.read_text() else []
            if lacking := blocks.missing(path):
                marks.append(pytest.mark.skip(reason=f"{', '.join(lacking)} are not installed"))
            yield pytest.param(path, id=name(path), marks=marks)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A folder like that of a reader, the current one and importable; what is imported from it is forgotten after."""
    blocks.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", None) or "").startswith(f"{tmp_path}/"):
            del sys.modules[module]


@pytest.mark.parametrize("path", list(with_blocks()))
def test_blocks_run_from_top_to_bottom(path, session):
    for block in blocks.blocks_of(path):
        blocks.run_block(block, session)


def test_the_notebook_shows_what_its_cells_give(session):
    """Numbers apart: they may differ between machines."""
    text = notebook.PAGE.read_text()
    found = notebook.executed(text)
    assert notebook.form(found) == notebook.form(text), "run python -m tools.notebook"


def test_a_cell_shows_what_it_prints_and_its_last_value(session):
    page = "```python\nx = 3\nprint(x)\nx + 1\n```\nwords\n\n```python\ny = x\n```\n"
    shown = "\n<!-- output -->\n```text\n3\n```\n```text\n4\n```\n<!-- end of output -->\n"
    expected = page.replace("x + 1\n```\n", f"x + 1\n```\n{shown}")
    assert notebook.executed(page) == expected == notebook.executed(expected)
    assert notebook.form(expected) == notebook.form(expected.replace("4", "12.5"))
    assert notebook.form(expected) != notebook.form(expected.replace("4", "four"))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_blocks_are_marked_as_they_should_be(path):
    assert [found for block in blocks.blocks_of(path) if (found := blocks.problem(block))] == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_have_verbs_options_and_settings_that_exist(path, session):
    found = blocks.blocks_of(path)
    for block in found:
        if block.file:
            (session / block.file).write_text(block.text)
    for block in found:
        for command in block.commands() if block.language == "bash" else ():
            blocks.check_command(command, session)


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_links_and_files_that_are_named_are_there(path):
    assert list(links.broken(path, ROOT)) == []


@pytest.mark.parametrize("page", reference.pages())
def test_the_reference_is_that_of_the_code(page):
    written = (ROOT / page).read_text()
    assert written == reference.pages()[page], f"run python -m tools.reference: {page} is not what the code says"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert text == reference.with_navigation(text, ROOT / "docs"), "run python -m tools.reference"


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    """Zensical's own judgement, and one page that must fail."""
    import shutil
    import subprocess

    pytest.importorskip("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "reference" / "cli.html").exists()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[nowhere](privacy.md#nowhere)\n")
    assert subprocess.run(build, cwd=tmp_path, capture_output=True, check=False).returncode != 0


def test_settings_in_the_tables_for_newcomers_exist():
    """A span such as `clip_norm` or `noise_source=system` in the last column."""
    rows = [line for line in (ROOT / "docs" / "coming_from.md").read_text().splitlines() if line.startswith("| ")]
    spans = [span for row in rows for span in re.findall(r"`([^`]+)`", row.rstrip(" |").rpartition(" | ")[2])]
    named = [found[1] for span in spans if (found := re.fullmatch(r"([a-z]\w*_\w+|\w+(?==))(=\S+)?", span))]
    assert len(named) > 30
    assert set(named) - {f.name for f in dataclasses.fields(RunConfig)} == set()


def write(path, text):
    path.write_text(text)
    return blocks.blocks_of(path)


def test_a_block_that_fails_fails_its_page(session):
    for language, text, error in (
        ("python", "assert 1 == 2", AssertionError),
        ("python", "# test_it.py\ndef test_it():\n    assert 1 == 2", AssertionError),
        ("bash", "true\nfalse", AssertionError),
        ("bash", "false | true", AssertionError),
        ("bash", "fed-dpsat run --set lrr=1", AssertionError),
        ("toml", "a = ", tomllib.TOMLDecodeError),
    ):
        (block,) = write(session / "page.md", f"text\n\n```{language}\n{text}\n```\n")
        with pytest.raises(error):
            blocks.run_block(block, session)


def test_files_are_written_and_a_session_goes_on(session):
    page = (
        "```python\n# mine.py\nx = 3\n```\n- a list\n\n  ```python\n  import mine\n  assert mine.x == 3\n  ```\n"
        "```toml\n# mine.toml\na = 1\n```\n```bash\ngrep -q 'a = 1' mine.toml && echo done \\\n  > out.txt\n```\n"
        "```bash\n# in a loop\nfor i in 1 2; do\n  echo $i\ndone > loop.txt\necho 'two\nlines' >> loop.txt\n```\n"
        "```text\nnothing(\n```\n```bash\n# Not run in tests: it needs the moon\nfly\n```\n"
    )
    for block in write(session / "page.md", page):
        blocks.run_block(block, session)
    assert (session / "out.txt").read_text() == "done\n"
    assert (session / "loop.txt").read_text() == "1\n2\ntwo\nlines\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```sh\nls\n```\n", "write bash and not sh"),
        ("```\nls\n```\n", "name a language"),
        ("```bash\n# Not run in tests:\nls\n```\n", "state the reason"),
        ("```bash\n# Not run in tests: it needs two hosts\nls\n```\n", None),
        ("```dockerfile\nFROM x\n```\n", None),
    ],
)
def test_how_a_block_must_be_marked(text, words, tmp_path):
    (block,) = write(tmp_path / "page.md", text)
    found = blocks.problem(block)
    assert found is None if words is None else words in found


def test_a_block_without_an_end_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not closed"):
        write(tmp_path / "page.md", "```bash\nls\n")


@pytest.mark.parametrize(
    "command",
    [
        "fed-dpsat fly",
        "fed-dpsat run --fast",
        "fed-dpsat run --set lrr=1",
        "fed-dpsat run nothing.toml",
        "fed-dpsat device dance policy.toml",
    ],
)
def test_a_command_that_does_not_exist(command, tmp_path):
    with pytest.raises(Exception, match=r"lrr|nothing\.toml|fly|fast|dance"):
        blocks.check_command(command, tmp_path)


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "other.md").write_text("# What `is` charged\n\n```text\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](other.md#what-is-charged) [b](#here) [c](https://x.org/y) `fed_dpsat/cli.py` ![d](no.png)\n"
        "[e](other.md#no-heading) [f](#there) [g](no.md#x) `docs/no/page.md`\n```text\n[h](in-code.md)\n```\n"
    )
    assert [line.split(": ")[1] for line in links.broken(page, ROOT)] == [
        "no.png", "other.md#no-heading", "#there", "no.md#x", "`docs/no/page.md` does not exist",
    ]  # fmt: skip
