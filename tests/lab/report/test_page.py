"""The page of a run as a browser, a reader without sight and a printer meet it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from fed_dpsat.cli import app
from fed_dpsat.errors import InputError, SettingError
from fed_dpsat.lab.report.canvas import draw
from fed_dpsat.lab.report.page import _with_code, write_report
from fed_dpsat.lab.report.sharpness import measure_run
from fed_dpsat.lab.report.words import statement
from fed_dpsat.run.reading import load_run
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate

VOID = {"meta", "br", "hr", "img", "input", "link"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements with what is in them; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.figures = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "figure":
            self.figures.append({"svg": [], "caption": "", "title": "", "desc": ""})

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "figure" not in self.open or not data.strip():
            return
        within = self.figures[-1]
        for tag, key in (("title", "title"), ("desc", "desc"), ("figcaption", "caption")):
            if tag in self.open:
                within[key] += data
        if self.open[-1] == "text":
            within["svg"].append(data)


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    return write_report(run_folder, tmp_path_factory.mktemp("page") / "report.html")


def test_it_parses_and_needs_nothing_from_anywhere(page):
    text = page.read_text()
    elements = Page(text).elements
    assert "http:" not in text
    assert "https:" not in text
    assert {"script", "link", "iframe", "object", "img"}.isdisjoint(tag for tag, _ in elements)
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_whatever_points_at_one_finds_it(page):
    text = page.read_text()
    elements = Page(text).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", text) + re.findall(r'href="#([^"]*)"', text)
    used += [part for _, a in elements for part in a.get("aria-labelledby", "").split()]
    assert set(used) <= set(ids)


def test_each_figure_has_title_axes_words_and_what_it_rests_on(page):
    figures = Page(page.read_text()).figures
    assert len(figures) == 14
    for figure in figures:
        assert figure["title"]
        assert len(figure["desc"]) > 20
        assert len(figure["svg"]) >= 4, "ticks and labels of the axes"
        assert len(figure["caption"]) > 40
    titles = {figure["title"]: figure["caption"] for figure in figures}
    for title in ("Test accuracy against round", "Calibration", "Accuracy by class"):
        for words in ("360 examples", "epsilon = 3.00", "delta = 0.0001"):
            assert words in titles[title], title
    for title in ("Accuracy by client", "Labels of each client"):
        assert "simulation only" in titles[title]
        assert "deployment does not" in titles[title]
    shown = {figure["title"]: figure["svg"] for figure in figures}
    for title in ("Labels of each client", "Examples of each client"):
        assert shown[title][:4] == ["0", "1", "2", "3"], "a client has a whole number"


def test_scores_are_above_the_bars_and_shares_of_labels_have_a_scale(page):
    shown = {figure["title"]: figure["svg"] for figure in Page(page.read_text()).figures}
    scores = next(text for text in shown["Calibration"] if text.startswith("ECE "))
    assert re.fullmatch(r"ECE [\d.]+, MCE [\d.]+, Brier [\d.]+, NLL [\d.]+", scores), "one line, not a box"
    assert "share of the client's examples (%)" in shown["Labels of each client"]
    svg = page.read_text().partition('id="reliability"')[2].partition("</figure>")[0]
    at = {text: float(y) for y, text in re.findall(r'y="([\d.]+)"[^>]*>([^<]*)</text>', svg)}
    assert at[scores] < at["1.0"] - 8, "above the end of the axis, so it hides no interval"


def test_bytes_have_a_unit_in_which_they_are_numbers_of_a_few_digits(page):
    shown = {figure["title"]: figure["svg"] for figure in Page(page.read_text()).figures}
    assert "kilobytes per round" in shown["Traffic"]
    assert max(map(len, shown["Traffic"][:8])) < 6, "no tick is like 0.000175"


def test_commands_are_code_and_markup_is_not(page):
    assert "`" not in page.read_text()
    assert "<code>fed-dpsat sharpness</code>" in page.read_text()
    assert _with_code("<b> `<i>`") == "&lt;b&gt; <code>&lt;i&gt;</code>"


def test_no_word_of_a_figure_keeps_its_distance_by_a_space_which_browsers_drop(page):
    words = [text for figure in Page(page.read_text()).figures for text in figure["svg"]]
    assert [text for text in words if text != text.strip()] == []


def test_a_long_title_has_two_lines_in_its_figure_and_one_on_the_page(tmp_path):
    title = "Test mean average precision of everything against epsilon"
    drawn = draw("x", lambda axes: None, title=title, caption="", alt="", folder=tmp_path)
    assert re.findall(r">(Test[^<]*|against[^<]*|of every[^<]*)</text>", drawn.svg) == [
        "Test mean average precision of everything",
        "against epsilon",
    ]
    assert f"{title}</title>" in drawn.svg


def test_colours_follow_the_paper_and_no_method_loses_its_own(page):
    text = page.read_text()
    svg = text[text.index("<svg") :]
    assert re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", svg) == []
    assert "prefers-color-scheme: dark" in text
    assert "var(--blue)" in svg


def test_the_statement_says_what_is_promised_and_what_not(page):
    text = page.read_text()
    for words in (
        "at delta 0.0001, by PLD", "one example of one client", "a server that sees every update",
        "is not private", "number of examples of each client", "no epsilon here covers",
        "did not release",
    ):  # fmt: skip
        assert words in text


def test_the_statement_says_why_a_figure_is_missing_and_that_delta_is_large(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    missing = {"epsilon_released": None, "epsilon_released_missing": "clients were away"}
    (folder / "summary.json").write_text(json.dumps({**summary, **missing, "delta_warning": "delta=1 is much"}))
    said = dict(statement(load_run(folder)))
    assert said["Against an observer of the released models"] == "epsilon is unknown: clients were away."
    assert said["Delta"] == "delta=1 is much."
    known = {"epsilon_released": 1.25, "epsilon_released_assumptions": "assumes coins"}
    (folder / "summary.json").write_text(json.dumps({**summary, **known}))
    said = dict(statement(load_run(folder)))
    assert said["Against an observer of the released models"] == "epsilon 1.250; assumes coins."
    assert "Delta" not in said


@pytest.mark.slow
def test_of_a_run_on_validation_examples_no_page_says_public_and_sharpness_is_on_the_test_split(tmp_path):
    config = RunConfig(num_clients=4, num_rounds=1, noise_multiplier=1.0, delta=1e-4, validation_share=0.5)
    simulate(config, tmp_path / "run")
    text = write_report(tmp_path / "run").read_text()
    assert "held out of the training split" in text
    assert "public test split" not in text
    assert "validation_share holds out of the private training data" in text
    with pytest.raises(SettingError, match=r"examples=400 is not in \[0, 360\]"):  # 718 are held out
        measure_run(tmp_path / "run", examples=400)


def test_figures_lie_beside_it_as_svg_and_png(page):
    names = {path.name for path in (page.parent / "figures").iterdir()}
    assert {"reliability.svg", "reliability.png", "signal-and-noise.svg", "accuracy-against-epsilon.png"} <= names
    assert len(names) == 2 * 14


def test_names_from_a_run_folder_do_not_become_markup(run_folder, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    for name in ("timing.jsonl", "ledger.sqlite", "rounds.jsonl", "simulation.json"):
        (folder / name).unlink()
    bad = "<script>alert(1)</script>"
    quality = json.loads((folder / "quality.json").read_text())
    quality["class_names"][0] = quality["measured_on"] = bad
    (folder / "quality.json").write_text(json.dumps(quality))
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps({**environment, "objects": [bad], "command": [bad]}))
    text = write_report(folder).read_text()
    assert all(tag != "script" for tag, _ in Page(text).elements)
    assert "&lt;script&gt;" in text
    assert "There is no rounds.jsonl" in text
    assert "came from Python" in text or "From Python" in text


def test_of_a_run_with_a_damaged_ledger_nothing_is_written(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "ledger.sqlite").write_bytes(b"no ledger")
    with pytest.raises(InputError, match="ledger"):
        write_report(tmp_path / "run", tmp_path / "out" / "report.html")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_pages_and_bad_input_is_one_line(run_folder, tmp_path):
    def invoke(*arguments):
        return CliRunner().invoke(app, ["report", *map(str, arguments)])

    failed = invoke(tmp_path / "nothing")
    assert failed.exit_code == 2
    assert "it does not exist" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    both = invoke(run_folder, run_folder, "--out", tmp_path / "x.html")
    assert both.exit_code == 2
    assert "each has its own page" in both.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: nothing to draw the page with")
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_chromium_draws_it_without_scrolling_sideways(page, tmp_path, width):
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe id="f" src="{page.as_uri()}" style="width:{width}px;height:900px;border:0"></iframe>'
        "<script>onload = () => { const d = document.getElementById('f').contentDocument.documentElement;"
        " document.title = [d.scrollWidth, d.clientWidth, d.querySelectorAll('figure svg').length,"
        " Math.min(...[...d.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))].join() }"
        "</script>"
    )
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
        "--window-size=1400,1000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>([\d.,]+)</title>", shown)
    assert found, shown[-500:]
    wide, seen, figures, smallest = map(float, found.group(1).split(","))
    assert wide == seen, "pixels: nothing to scroll to sideways"
    assert width - 20 <= seen <= width
    assert figures == 14
    assert smallest > 8, "pixels: the smallest text of a figure"


@pytest.mark.slow
def test_sharpness_is_shown_where_it_was_measured(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    assert "Sharpness: run <code>fed-dpsat sharpness</code>" in write_report(folder).read_text()
    found = measure_run(folder, examples=50, probes=2)
    page = write_report(folder).read_text()
    assert f"largest eigenvalue(s) {found['top_eigenvalues'][0]:.4g}" in page
    assert "Sharpness: run <code>fed-dpsat sharpness</code>" not in page
