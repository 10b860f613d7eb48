"""`specforge report`: the page shows what stands in the files, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from specforge import cli
from specforge.report.charts import KEPT, chart, smoothed, thinned

SHARES = [0.61, 0.32, 0.11]
EPOCHS = {0: [0.0, 0.0, 0.0], 1: [0.4, 0.2, 0.05], 2: SHARES, 3: [0.6, 0.3, 0.1]}
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def measured(shares, **more):
    return {
        "acceptance_length": 1 + sum(shares),
        "walk_length": 1 + 0.8 * sum(shares),
        "acceptance_by_position": shares,
        "coverage": 0.9,
        "predictions": 4321,
        **more,
    }


def step(number, **more):
    return {
        "loss": 40.0 - number,
        "grad_norm": 3.0,
        "applied": True,
        "tokens": 1000,
        "tokens_per_second": 500.0,
        "time_share": {"target": 0.25, "data": 0.05, "draft": 0.7},
        "step": number,
        "epoch": 0,
        **more,
    }


STEPS = [step(n) for n in range(1, 31)]


def training(folder, settings=None, rows=None, epochs=None):
    folder.mkdir(parents=True)
    held_out = [{"epoch": e, "held_out": measured(shares)} for e, shares in (epochs or EPOCHS).items()]
    written = {"settings": {"model_path": "some/target", "epochs": 3, "lr": 0.001, **(settings or {})}, "identity": {}}
    (folder / "run.json").write_text(json.dumps(written))
    lines = [json.dumps(row) for row in [*(STEPS if rows is None else rows), *held_out]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def benchmark(path, draft="x/draft/best", shares=SHARES, **more):
    decode = {
        "engine": "sglang",
        "dtype": "bfloat16",
        "acceptance_length": 1.875,
        "greedy_lossless": True,
        "equal": 7,
        "apart_at_near_tie": 5,
        "apart_otherwise": 0,
        "tokens_per_second": 30.0,
        "plain_tokens_per_second": 20.0,
    }
    content = {"draft": draft, "target": "t", "steps": 3, "teacher_forced": measured(shares, **more), "decode": decode}
    path.write_text(json.dumps(content))
    return path


def run(*arguments):
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def refused(*arguments):
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    assert found.output.count("error ") == 1
    assert "where:" in found.output
    assert "fix:" in found.output
    return found.output


class Page(HTMLParser):
    """Charts by title, tables as rows of texts, everything that is text."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        figures = re.findall(r"<figcaption>(.*?)</figcaption>\s*(<svg.*?</svg>)", self.source, re.S)
        self.charts = {title: ElementTree.fromstring(svg) for title, svg in figures}
        self.tables, self.text, self._table, self._cell = {}, "", None, None
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self._table = self.tables[dict(attrs)["id"]] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self._table[-1][-1] += data

    def rows(self, table):
        return {row[0]: row[1:] for row in self.tables[table]}

    def lines(self, title):
        """(label, faint) -> the points of a chart's line, read off its axes as a person would."""
        svg = self.charts[title]
        x_of, y_of = (self._axis(svg, f"{name} tick", name) for name in "xy")
        found = {}
        for path in svg.findall("path"):
            if path.get("class").startswith("line"):
                ends = re.findall(r"(-?[\d.]+) (-?[\d.]+)", path.get("d"))
                points = [(x_of(float(x)), y_of(float(y))) for x, y in ends]
                found[path.get("data-label"), "faint" in path.get("class")] = points
        return found

    def _axis(self, svg, kind, name):
        ticks = [text for text in svg.findall("text") if text.get("class") == kind]
        at = [float(text.get("data-at") or text.get(name)) for text in ticks]
        values = [float(text.text.replace(",", "").replace(" %", "e-2")) for text in ticks]
        assert len(ticks) > 1
        scale = (values[-1] - values[0]) / (at[-1] - at[0])
        return lambda place: values[0] + (place - at[0]) * scale

    def titles(self, title, kind):
        return [path.find("title").text for path in self.charts[title].iter("path") if kind in path.get("class")]


def made(tmp_path, *runs):
    output = tmp_path / "out" / "report.html"
    found = run(*runs, "--output", output)
    assert found.exit_code == 0, found.output
    assert found.output.splitlines()[-1] == f"written: {output}"
    return Page(output)


def near(points, expected, within):
    assert [x for x, _ in points] == pytest.approx([x for x, _ in expected], abs=0.05)
    assert [y for _, y in points] == pytest.approx([y for _, y in expected], abs=within)


# What is shown is what is written


def test_the_best_epoch_is_the_one_with_the_longest_simulated_decoding(tmp_path):
    folder = training(tmp_path / "llama", epochs={0: [0.0], 1: [0.5], 2: [0.6]})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("held_out") and line["epoch"] == 1:
            line["held_out"]["walk_length"] = 1.9
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert made(tmp_path, folder).rows("overview")["best epoch"] == ["1"]


def test_acceptance_is_that_of_the_best_epoch(tmp_path):
    page = made(tmp_path, training(tmp_path / "llama"))
    near(page.lines("Acceptance by position")["llama", False], list(enumerate(SHARES, 1)), 0.002)
    lengths = [1.0, 1.61, 1.93, 2.04]
    near(page.lines("Acceptance length by draft steps")["llama", False], list(enumerate(lengths)), 0.005)
    assert page.titles("Acceptance by position", "mark") == [
        f"llama: draft position {at}, {share} %" for at, share in enumerate(("61", "32", "11"), 1)
    ]
    assert [row[1:] for row in page.tables["positions"][2:]] == [
        ["61 %", "1.610"],
        ["32 %", "1.930"],
        ["11 %", "2.040"],
    ]
    shown = page.rows("overview")
    assert shown["best epoch"] == ["2"]
    assert shown["held-out acceptance length, best epoch"] == ["2.040"]
    assert shown["held-out acceptance length, untrained"] == ["1.000"]
    assert shown["held-out predictions"] == ["4,321"]
    assert shown["target"] == ["some/target"]
    assert "Best after epoch 2 of 3" in page.text


def test_the_draft_that_training_began_with_is_never_the_best(tmp_path):
    """`best` is written after epochs only; with --init-from the start may have been better."""
    page = made(tmp_path, training(tmp_path / "tuned", epochs={0: [0.9, 0.8], 1: [0.5, 0.25], 2: [0.25, 0.125]}))
    assert page.rows("overview")["best epoch"] == ["1"]
    assert page.rows("overview")["held-out acceptance length, best epoch"] == ["1.750"]


def test_training_curves(tmp_path):
    page = made(tmp_path, training(tmp_path / "llama"))
    loss = [(float(row["step"]), row["loss"]) for row in STEPS]
    assert page.lines("Loss").keys() == {("llama", True), ("llama", False)}
    near(page.lines("Loss")["llama", True], loss, 0.1)
    near(page.lines("Loss")["llama", False], loss, 0.1)  # a straight line is its own running mean
    near(page.lines("Gradient norm")["llama", True], [(x, 3.0) for x, _ in loss], 0.01)
    near(page.lines("Speed")["llama", True], [(x, 500.0) for x, _ in loss], 5)
    lengths = [(epoch, 1 + sum(shares)) for epoch, shares in EPOCHS.items()]
    near(page.lines("Held-out acceptance")["llama", False], lengths, 0.01)


def test_time_is_shared_out_by_the_time_that_steps_take(tmp_path):
    slow = step(2, tokens_per_second=100.0, time_share={"target": 0.85, "data": 0.05, "draft": 0.1})
    page = made(tmp_path, training(tmp_path / "llama", rows=[step(1), slow]))  # 2 s and 10 s
    bars = page.charts["Where the time goes"].findall("rect")
    widths = [float(bar.get("width")) for bar in bars]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.75, 0.05, 0.2], abs=0.002)
    assert [bar.find("title").text for bar in bars] == [
        f"llama: {share} %" for share in ("target 75", "data 5", "draft 20")
    ]
    assert page.rows("overview")["training tokens per second, median"] == ["300"]


def test_skipped_steps_are_marked_and_break_nothing(tmp_path):
    rows = [*STEPS]
    rows[4] = step(5, loss=None, grad_norm=None, applied=False, loss_by_step=None)
    rows[9] = step(10, loss=float("nan"), grad_norm=float("inf"), applied=False)  # as other programs write them
    page = made(tmp_path, training(tmp_path / "llama", rows=rows))
    assert len(page.lines("Loss")["llama", True]) == 28
    for title in ("Loss", "Gradient norm"):
        assert page.titles(title, "cross") == ["llama: step 5 skipped", "llama: step 10 skipped"]
    assert page.rows("overview")["of them skipped"] == ["2"]
    assert not re.search(r"\b(nan|inf)\b", page.source, re.I)


def test_a_run_without_any_finite_loss_has_no_chart_of_it(tmp_path):
    page = made(tmp_path, training(tmp_path / "a", rows=[step(1, loss=None, grad_norm=None, applied=False)]))
    assert "Loss" not in page.charts
    assert "Speed" in page.charts
    assert "Real decoding" not in made(tmp_path, training(tmp_path / "b", rows=[])).text


def test_a_server_stands_beside_the_rest_and_a_server_alone_is_no_run(tmp_path):
    path = benchmark(tmp_path / "benchmark.json")
    served = {"levels": [{"concurrency": 1, "tokens_per_second": 50.2}, {"concurrency": 4, "tokens_per_second": 1234}]}
    content = json.loads(path.read_text()) | {"served": served | {"acceptance_length": 1.7}}
    path.write_text(json.dumps(content))
    shown = made(tmp_path, path).rows("overview")
    assert shown["server: acceptance length"] == ["1.700"]
    assert shown["server: tokens per second"] == ["50 at 1, 1,234 at 4"]
    path.write_text(json.dumps(content | {"served": served | {"acceptance_length": None}}))
    assert made(tmp_path, path).rows("overview")["server: acceptance length"] == ["not reported"]
    path.write_text(json.dumps({"served": served}))
    refused = run(path, "--output", tmp_path / "r.html")
    assert refused.exit_code == 2
    assert "measured a server alone" in refused.output


def test_a_demo_folder(tmp_path):
    training(tmp_path / "demo" / "draft")
    benchmark(tmp_path / "demo" / "benchmark.json", shares=[0.5, 0.25, 0.125])
    (tmp_path / "demo" / "summary.json").write_text(json.dumps({"mode": "offline", "seconds": {"total": 1234.4}}))
    page = made(tmp_path, tmp_path / "demo")
    shown = page.rows("overview")
    assert shown["whole demo"] == ["1,234 s"]
    assert shown["acceptance length, benchmark"] == ["1.875"]
    assert shown["decoding: tokens per second, plain"] == ["20"]
    assert shown["decoding: tokens per second, draft"] == ["30"]
    assert shown["decoding: lossless"] == ["yes"]
    near(page.lines("Acceptance by position")["demo", False], [(1, 0.5), (2, 0.25), (3, 0.125)], 0.002)
    plain, draft = (float(bar.get("width")) for bar in page.charts["Tokens per second"].findall("rect"))
    assert draft / plain == pytest.approx(1.5, abs=0.01)
    assert "50 % faster than plain decoding" in page.text


def test_a_benchmark_of_drawn_text_is_compared_with_nothing(tmp_path):
    path = benchmark(tmp_path / "drawn.json")
    content = json.loads(path.read_text())
    for key in ("greedy_lossless", "equal", "apart_at_near_tie", "apart_otherwise"):
        del content["decode"][key]
    path.write_text(json.dumps(content))
    page = made(tmp_path, path)
    assert page.rows("overview")["decoding: lossless"] == ["the text was drawn, so not compared"]
    assert "decoding: equal, near-tie, otherwise apart" not in page.rows("overview")
    assert "In process. A server" in page.text
    assert "greedy" not in page.text


def test_which_benchmark_belongs_to_a_run(tmp_path):
    """Its own before the one above, and that one only where it is of this run's best draft."""
    folder = training(tmp_path / "runs" / "llama")
    benchmark(tmp_path / "runs" / "benchmark.json", draft="runs/other/best", shares=[0.5])
    assert "acceptance length, benchmark" not in made(tmp_path, folder).rows("overview")
    benchmark(tmp_path / "runs" / "benchmark.json", draft="runs/llama/best", shares=[0.25])
    assert made(tmp_path, folder).rows("overview")["acceptance length, benchmark"] == ["1.250"]
    benchmark(folder / "benchmark.json", draft="elsewhere", shares=[0.75])
    assert made(tmp_path, folder).rows("overview")["acceptance length, benchmark"] == ["1.750"]


def test_a_benchmark_alone(tmp_path):
    page = made(tmp_path, benchmark(tmp_path / "result.json"))
    near(page.lines("Acceptance by position")["result.json", False], list(enumerate(SHARES, 1)), 0.002)
    assert "Loss" not in page.charts
    assert "settings" not in page.tables


def test_optional_measurements(tmp_path):
    more = {
        "intervals": [[1.5, 1.7], [1.8, 2.0], [1.9, 2.2]],
        "by_domain": {"code": measured([0.7, 0.5, 0.2]), "chat": measured([0.5, 0.2, 0.1])},
        "calibration": [
            {"confidence": 0.75, "accepted": 0.5, "rows": 1200},
            {"confidence": 0.25, "accepted": 0.2, "rows": 3},
        ],
    }
    page = made(tmp_path, benchmark(tmp_path / "result.json", **more))
    by_domain = page.lines("Acceptance by position, by domain")
    near(by_domain["code", False], [(1, 0.7), (2, 0.5), (3, 0.2)], 0.003)
    near(by_domain["chat", False], [(1, 0.5), (2, 0.2), (3, 0.1)], 0.003)
    near(page.lines("Calibration")["result.json", False], [(0.25, 0.2), (0.75, 0.5)], 0.004)
    assert page.titles("Calibration", "mark")[1] == "result.json: 75 % sure, 50 % right, 1,200 rows"
    assert page.rows("overview")["acceptance length, benchmark"] == ["2.040 (1.900 to 2.200)"]
    bands = [
        path for path in page.charts["Acceptance length by draft steps"].iter("path") if "band" in path.get("class")
    ]
    assert len(bands) == 1


@pytest.mark.parametrize("absent", [{}, {"intervals": None, "by_domain": {}, "calibration": []}])
def test_what_was_not_measured_is_left_out(tmp_path, absent):
    page = made(tmp_path, benchmark(tmp_path / "result.json", **absent))
    assert not [title for title in page.charts if "domain" in title or "Calibration" in title]
    assert "confidence" not in page.text
    assert 'class="band' not in page.source


def test_runs_side_by_side(tmp_path):
    one = training(tmp_path / "a" / "draft", {"lr": 0.001, "seed": 0})
    two = training(tmp_path / "b" / "draft", {"lr": 0.002, "seed": 0, "new": None}, epochs={0: [0.0], 1: [0.3]})
    page = made(tmp_path, one, two)
    assert page.tables["overview"][0] == ["", "a/draft", "b/draft"]
    assert page.rows("overview")["held-out acceptance length, best epoch"] == ["2.040", "1.300"]
    settings = page.rows("settings")
    assert settings["≠ lr"] == ["0.001", "0.002"]
    assert settings["≠ new"] == ["–", "null"]
    assert settings["seed"] == ["0", "0"]
    assert page.source.count('class="differs"') == 2
    assert set(page.lines("Acceptance by position")) == {("a/draft", False), ("b/draft", False)}
    assert page.rows("positions")["3"] == ["11 %", "2.040", "–", "–"]
    assert "1 of 3 epochs are finished, the best so far is epoch 1." in page.text


def test_everything_out_of_files_is_escaped(tmp_path):
    evil = "<script>alert('1')</script>\"&<img src=x onerror=y>"
    folder = training(tmp_path / '<b>run & "one"\'', {"model_path": evil, evil: evil})
    benchmark(folder / "benchmark.json", by_domain={evil: measured([0.5, 0.25])})
    page = made(tmp_path, folder, training(tmp_path / "two"))
    assert not re.search(r"<(script|img|b)\b", page.source)
    assert evil in page.text
    assert page.rows("settings")[f"≠ {evil}"] == [evil, "–"]
    assert '<b>run & "one"\'' in page.tables["overview"][0]
    assert [
        label for label, _ in page.lines("Acceptance by position, by domain, &lt;b&gt;run &amp; &#34;one&#34;&#39;")
    ]


def test_names_that_are_long_or_hold_half_a_character(tmp_path):
    long = "x" * 90 + "-end"
    page = made(tmp_path, training(tmp_path / long, {"odd": "a\ud800b"}), training(tmp_path / "b\udcff"))
    assert page.rows("settings")["≠ odd"] == ["a?b", "–"]
    assert [
        text.text for text in page.charts["Where the time goes"].findall("text") if "label" in text.get("class")
    ] == [
        "…" + long[-39:],
        "b?",
    ]


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = made(tmp_path, training(tmp_path / "llama"))
    assert not re.search(r"https?:|@import|url\(|<script|src=|href=(?!\"data:,\")", page.source)
    assert "prefers-color-scheme: dark" in page.source


def test_long_runs_make_no_large_page(tmp_path):
    rows = [step(n, loss=50.0 if n == 7777 else 10 + n % 7) for n in range(1, 20_001)]
    page = made(tmp_path, training(tmp_path / "llama", rows=rows))
    assert len(page.source) < 200_000
    points = page.lines("Loss")["llama", True]
    assert max(y for _, y in points) == pytest.approx(50, abs=0.5)
    assert points[-1][0] == pytest.approx(20_000, rel=0.01)


def test_lines_are_thinned_and_smoothed_without_loss_of_extremes_or_lag():
    points = [(float(n), float((n * 37) % 101)) for n in range(5000)]
    few = thinned(points)
    assert len(few) <= KEPT + 4
    assert {points[0], points[-1]} <= set(few) <= set(points)
    assert max(y for _, y in few) == 100
    assert min(y for _, y in few) == 0
    straight = [(float(n), 3.0 * n) for n in range(500)]
    assert smoothed(straight) == straight
    assert smoothed([]) == []


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0, 0.0], [1e-9, 2e-9], [1.0, 1e9], [0.0, 900.0], [-3.0, 2.0]])
def test_axes_of_odd_ranges(values):
    from specforge.report.charts import Series

    points = list(enumerate(values))
    drawn = chart("t", "x", "y", [Series(label="a", style=0, points=points)], may_be_log=True)
    assert 1 < len(drawn.y_ticks) < 14
    assert len({text for _, text in drawn.y_ticks}) == len(drawn.y_ticks)
    numbers = re.findall(r"-?[\d.]+", drawn.drawn[0].path)
    assert all(0 <= float(number) <= 440 for number in numbers)


# Bad input


def test_a_last_line_that_is_cut_is_left_out(tmp_path):
    folder = training(tmp_path / "llama")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "step": 31, "ep')
    assert made(tmp_path, folder).rows("overview")["optimizer steps"] == ["30"]


@pytest.mark.parametrize(
    "line", ["", "{", "\x00\x00", "[1]", '{"loss": 1.0}', '{"step": 2, "loss": "much"}', "[" * 9999]
)
def test_another_damaged_line_is_named(tmp_path, line):
    folder = training(tmp_path / "llama")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = line
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "metrics.jsonl, line 3" in refused(folder, "--output", tmp_path / "report.html")
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("run.json", "{", "run.json"),
        ("run.json", '{"settings": 3}', "'settings'"),
        ("benchmark.json", "\x00", "benchmark.json"),
        ("benchmark.json", '{"draft": "d"}', "'teacher_forced'"),
        ("benchmark.json", '{"teacher_forced": {"acceptance_length": NaN, "acceptance_by_position": []}}', "length'"),
        ("metrics.jsonl", '{"epoch": 1, "held_out": {"acceptance_length": 2}}\n', "acceptance_by_position'"),
        ("benchmark.json", '{"teacher_forced": {"acceptance_length": 1, "acceptance_by_position": []}}', "position'"),
        ("metrics.jsonl", "", "no epoch of the run is finished"),
        (
            "metrics.jsonl",
            json.dumps({"epoch": 0, "held_out": measured([0.0])}) + "\n",
            "no epoch of the run is finished",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, named):
    folder = training(tmp_path / "llama")
    (folder / file).write_text(content)
    kept = tmp_path / "report.html"
    kept.write_text("an earlier report")
    assert named in refused(folder, "--output", kept)
    assert kept.read_text() == "an earlier report"
    assert {entry.name for entry in tmp_path.iterdir()} == {"llama", "report.html"}


def test_what_is_no_run(tmp_path):
    output = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    assert "this is no run" in refused(tmp_path / "empty", "--output", output)
    assert "this is no run" in refused(tmp_path / "none", "--output", output)
    folder = training(tmp_path / "llama")
    (tmp_path / "link").symlink_to(folder)
    assert "given twice" in refused(folder, tmp_path / "link", "--output", output)
    assert "--output" in refused(folder, "--output", folder / "run.json")
    (folder / "metrics.jsonl").unlink()
    assert "no metrics" in refused(folder, "--output", output)
    assert not output.exists()


# In a browser


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("window", ["1240,2000", "390,2000"])
def test_a_browser_shows_it_without_a_complaint(tmp_path, window):
    more = {"by_domain": {"code": measured([0.7, 0.5])}, "intervals": [[1.5, 1.7], [1.8, 2.0], [1.9, 2.2]]}
    folder = training(tmp_path / "llama", rows=[*STEPS, step(31, loss=None, grad_norm=None, applied=False)])
    benchmark(folder / "benchmark.json", **more)
    made(tmp_path, folder)
    page = tmp_path / "out" / "report.html"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--window-size={window}", "--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "CONSOLE" not in found.stderr, found.stderr
    shown = tmp_path / "dom.html"
    shown.write_text(found.stdout, encoding="utf-8")
    dom, source = Page(shown), Page(page)
    assert dom.charts.keys() == source.charts.keys()
    assert {"Acceptance by position", "Loss", "Held-out acceptance", "Tokens per second"} <= dom.charts.keys()
    assert dom.tables == source.tables
    picture = Path(tmp_path / "page.png")
    shot = [*command[:-2], f"--screenshot={picture}", page.as_uri()]
    assert subprocess.run(shot, capture_output=True, timeout=120).returncode == 0
    assert picture.stat().st_size > 20_000  # not blank
