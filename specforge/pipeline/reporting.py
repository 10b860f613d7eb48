"""What runs have reached, as one page."""

from __future__ import annotations

from rich.markup import escape

from specforge.config import ReportSettings
from specforge.console import say
from specforge.errors import ConfigError
from specforge.files import replacing
from specforge.report.page import page, verdict
from specforge.report.runs import read


def report(settings: ReportSettings) -> None:
    if settings.output.suffix not in (".html", ".htm"):
        fix = "end its name in .html"
        raise ConfigError("the report is an HTML page", where=f"--output {settings.output}", fix=fix)
    runs = read(settings.runs)
    content = page(runs)
    with replacing(settings.output) as file:
        file.write(content)
    for run in runs:
        say(escape(f"{run.name}: acceptance length {run.measured.acceptance_length:.2f}. {verdict(run)}"))
    say(escape(f"written: {settings.output}"))
