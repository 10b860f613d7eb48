"""The command line: parse, call the pipeline, print. Flags are made from the settings classes; no torch at start."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import typer
from pydantic import ByteSize

from specforge import __version__, config
from specforge.console import console, is_main_rank, show_error
from specforge.errors import SpecforgeError, first_line, is_out_of_memory, remedy

app = typer.Typer(
    help="Train EAGLE-3 draft models on the hidden states of the engine that will serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flag_type(annotation: Any) -> Any:
    """What typer can parse: `X | None` becomes X, a tuple of ints one string, of others a repeated flag."""
    inner = [argument for argument in get_args(annotation) if argument is not type(None)]
    if config.Auto in inner:  # a number or a word
        return str
    if type(None) in get_args(annotation):
        annotation = inner[0]
    if get_origin(annotation) is tuple:
        item = get_args(annotation)[0]
        return str if item is int else list[item]  # type: ignore[valid-type]
    return str if annotation is ByteSize else annotation


def _is_numbers(annotation: Any) -> bool:
    """Whether it is a tuple of ints, which is given as one string: "1 4 16" or 1,4,16."""
    return any(get_origin(one) is tuple and get_args(one)[0] is int for one in (annotation, *get_args(annotation)))


def _add_command(name: str, settings: Any) -> None:
    """A command whose flags are the fields of `settings`; `--config FILE` gives them as YAML, flags override. The
    fields in `config.POSITIONAL` are given without a flag. A name of two words is a command of a group."""

    def run(**given: Any) -> None:
        debug, file, _ = given.pop("debug"), given.pop("config"), given.pop("local_rank")
        flags = {key: value for key, value in given.items() if value not in (None, [])}
        for key, text in flags.items():
            if isinstance(text, str) and _is_numbers(settings.model_fields[key].annotation):
                flags[key] = tuple(text.replace(",", " ").split())
        raise typer.Exit(execute(name, settings, flags, file, debug))

    parameters = []
    for key, field in settings.model_fields.items():
        flag = "--" + key.replace("_", "-")
        declaration = f"{flag}/--no-{flag[2:]}" if field.annotation is bool else flag
        help_text = field.description or ""
        if field.is_required():
            help_text += " (required)"
        elif field.default not in (None, False):
            help_text += f" (default: {field.default})"
        option = typer.Option(declaration, help=help_text, show_default=False)
        if key in config.POSITIONAL:
            option = typer.Argument(metavar=key.upper(), help=help_text, show_default=False)
        parameters.append(_parameter(key, Annotated[_flag_type(field.annotation) | None, option]))
    parameters.append(_parameter("config", Annotated[Path | None, typer.Option(help="settings as YAML")]))
    local_rank = typer.Option("--local_rank", hidden=True)  # given by deepspeed's launcher, which sets LOCAL_RANK too
    parameters.append(_parameter("local_rank", Annotated[int | None, local_rank]))
    parameters.append(_parameter("debug", Annotated[bool, typer.Option("--debug", help="show tracebacks")], False))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    *group, own_name = name.split()
    (GROUPS[group[0]] if group else app).command(own_name, help=settings.__doc__)(run)


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def execute(
    command: str, settings: type[config.Settings], given: dict[str, Any], file: Path | None = None, debug: bool = False
) -> int:
    """Run one command; returns the exit code. Faults that the user can mend end with one message and code 2."""
    try:
        chosen = config.load(settings, given, file)
        from specforge.pipeline import run

        return int(run(command, chosen) or 0)
    except SpecforgeError as error:
        return _fail(str(error), 2, debug)
    except OSError as error:
        place = error.filename or "see --debug"
        fix = remedy(error) or "check the path, its permissions and the disk; finished work is kept"
        return _fail(f"{error.strerror or error}\n  where: {place}\n  fix:   {fix}", 2, debug)
    except KeyboardInterrupt:
        return _fail("stopped by hand; regenerate, prepare-hidden and train go on where they were", 130, debug=False)
    except Exception as error:
        if world_size() > 1 and _joined():
            from specforge import launch
            from specforge.watch import is_of_others

            if is_of_others(error):
                traceback.print_exc()
                return launch.lost_others(error)
        if is_out_of_memory(error):
            what = f"there is not enough memory: {first_line(error)}"
            return _fail(str(SpecforgeError(what, where=command, fix=remedy(error))), 2, debug)
        return _fail(f"{type(error).__name__}: {error}\n  this is a fault of specforge: see --debug", 1, debug)


def fail(error: SpecforgeError) -> int:
    """For entries that check something of their own: the one message, and its exit code."""
    return _fail(str(error), 2, debug=False)


def own_template(chat_template: str | None) -> str | None:
    """For the historical commands, where a short name such as llama3 stood for the target's own template."""
    return chat_template if chat_template and Path(chat_template).is_file() else None


def world_size() -> int:
    """Ranks of this run as torchrun or deepspeed started it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fail(message: str, code: int, debug: bool) -> int:
    if _speaks():
        show_error(message + _own_rank())
        if debug:
            console.print(traceback.format_exc(), markup=False)
    return code


def _speaks() -> bool:
    """Once the ranks are joined a fault may be that of one rank alone: then that one tells of it."""
    return sys.modules["specforge.launch"].speaks() if _joined() else is_main_rank()


def _own_rank() -> str:
    """A line that names this rank, where the fault may be its own."""
    return f"\n  rank:  {os.environ['RANK']} of {world_size()}" if world_size() > 1 and _joined() else ""


def _joined() -> bool:
    """Whether this process has joined others. That needs torch, which many commands do without."""
    launch = sys.modules.get("specforge.launch")
    return launch is not None and bool(launch.joined())


SETTINGS: dict[str, type[config.Settings]] = {
    "prepare-data": config.PrepareDataSettings,
    "regenerate": config.RegenerateSettings,
    "plan": config.PlanSettings,
    "prepare-hidden": config.PrepareHiddenSettings,
    "train": config.TrainSettings,
    "check": config.CheckSettings,
    "export": config.ExportSettings,
    "benchmark": config.BenchmarkSettings,
    "report": config.ReportSettings,
    "store verify": config.StoreVerifySettings,
    "store info": config.StoreInfoSettings,
    "store merge": config.StoreMergeSettings,
    "demo": config.DemoSettings,
    "doctor": config.DoctorSettings,
}
GROUPS = {"store": typer.Typer(help="Look after feature stores.", no_args_is_help=True)}
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)
for _name, _settings in SETTINGS.items():
    _add_command(_name, _settings)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def leave(code: int) -> NoReturn:
    """Ends the process. One of several ranks skips the interpreter's teardown, in which threads of the libraries abort
    the process now and then."""
    if world_size() > 1:
        for stream in (console.file, sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def main() -> None:
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(bool(end.code)))


if __name__ == "__main__":
    main()
