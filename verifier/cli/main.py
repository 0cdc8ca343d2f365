"""The commands and their options. Modules that cost time are imported inside the commands that need them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import click

import verifier
from verifier.core.errors import InputError, VerifierError

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEVICES = click.Choice(["auto", "cpu", "cuda"])


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and leave at once: nothing that tears down threads, devices or memory is waited for."""
    _open_streams()
    code = invoke(argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _open_streams() -> None:
    """Streams that the caller has closed lead nowhere; otherwise the next pipe or file would take their numbers."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def invoke(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Every error is one sentence on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = cli.main(args, prog_name="verifier", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("Error: interrupted", err=True)
        return 130
    except VerifierError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            click.echo(f"Error: cannot write to stdout: {error.strerror}", err=True)
            return InputError.exit_code
        click.echo(f"Error: internal error: {type(error).__name__}: {error}", err=True)
        if any(a in ("-v", "--verbose") for a in args):
            traceback.print_exc()
        return 1


def query_options(command: F) -> F:
    """Network and property."""
    command = click.option("--vnnlib", required=True, type=_FILE, help="Property (VNN-LIB, perhaps .gz).")(command)
    return click.option("--onnx", required=True, type=_FILE, help="Network (ONNX, perhaps .gz).")(command)


def config_options(command: F) -> F:
    """Settings: files, single keys, and short forms of common keys."""
    for option in (
        click.option("--ranks", type=click.IntRange(min=1), help="Same as --set parallel.ranks=N."),
        click.option("--seed", type=click.IntRange(min=0), help="Same as --set seed=N."),
        click.option("--device", type=_DEVICES, help="Same as --set device=NAME."),
        click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set one key; repeatable."),
        click.option("--config", "config_file", type=_FILE, help="Settings (YAML) on top of the defaults."),
    ):
        command = option(command)
    return command


def build_config(
    files: Sequence[Path], assignments: Sequence[str], device: str | None, seed: int | None, ranks: int | None = None
) -> Any:
    """The configuration that the options ask for."""
    from verifier.config import load_config

    named = (("device", device), ("seed", seed), ("parallel.ranks", ranks))
    short = {key: value for key, value in named if value is not None}
    return load_config(files, assignments, short)


def check_timeout(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A time limit in seconds."""
    from verifier.cli.instances import parse_timeout

    if value is None:
        return None
    try:
        return parse_timeout(value, f"--{parameter.name}")
    except InputError as error:
        raise click.BadParameter(str(error).partition(": ")[2], context, parameter) from None


def check_retry(context: click.Context, parameter: click.Parameter, value: str | None) -> frozenset[str]:
    """Verdicts that leave a question open, separated by commas."""
    from verifier.cli.ledger import UNDECIDED

    words = frozenset(word.strip() for word in (value or "").split(",") if word.strip())
    if words - set(UNDECIDED) or (value is not None and not words):
        raise click.BadParameter(f"'{value}' is not a list of some of {','.join(UNDECIDED)}", context, parameter)
    return words


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(verifier.__version__, prog_name="verifier")
def cli() -> None:
    """Prove properties of neural networks, or find counterexamples.

    Exit codes: 0 a verdict (also unknown and timeout), 2 bad usage, configuration or input, 3 an unsupported network or
    property, 1 an internal error.
    """


@cli.command()
@query_options
@click.option("--timeout", callback=check_timeout, metavar="SECONDS", help="Limit, process start included.")
@config_options
@click.option("--results-file", type=_FILE, help="VNN-COMP result file to write (verdict and witness).")
@click.option("--json", "json_file", type=_FILE, help="JSON record to write.")
@click.option(
    "--write",
    "more",
    type=(str, _FILE),
    multiple=True,
    metavar="FORMAT FILE",
    help="File in another format; repeatable.",
)
@click.option("-v", "--verbose", is_flag=True, help="Phases and notes on stderr, also in a pipe.")
@click.pass_context
def verify(
    context: click.Context,
    onnx: Path,
    vnnlib: Path,
    timeout: float | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    device: str | None,
    seed: int | None,
    ranks: int | None,
    results_file: Path | None,
    json_file: Path | None,
    more: tuple[tuple[str, Path], ...],
    verbose: bool,
) -> None:
    """Answer one query; the verdict alone goes to stdout.

    unsat: proved, no input violates the property. sat: a counterexample exists (see --results-file).
    """
    from verifier.cli.clock import process_start
    from verifier.cli.instances import existing
    from verifier.cli.query import Outputs, run_query, write_last
    from verifier.cli.rank import follows
    from verifier.cli.worker import Job

    start = process_start()
    if follows():
        config = build_config([config_file] if config_file else [], assignments, device, seed, ranks)
        job = Job(onnx, vnnlib, config, timeout, start, verbose, quiet=not verbose)
        outcome = run_query(job, Outputs(), False, silent=True)
        if outcome.error is not None and outcome.error["kind"] != "RankFailed":
            click.echo(f"Error: {outcome.error['message']}", err=True)
        context.exit(outcome.exit_code)  # rank 0 says all else
    outputs = Outputs(results_file, json_file, more)
    try:
        outputs.plugins()
        config = build_config([config_file] if config_file else [], assignments, device, seed, ranks)
        job = Job(existing(onnx, "network"), existing(vnnlib, "property"), config, timeout, start, verbose)
    except VerifierError:
        for path, text in outputs.texts("error"):
            write_last(path, text)
        raise
    outcome = run_query(job, outputs, verbose)
    if outcome.error is not None:
        click.echo(f"Error: {outcome.error['message']}", err=True)
    else:
        click.echo(outcome.verdict)
        if outcome.exit_code == 1:
            click.echo(f"Error: {outcome.reason}", err=True)
    context.exit(outcome.exit_code)


@cli.command()
@query_options
@click.option("--method", type=click.Choice(["ibp", "crown", "alpha-crown"]), default="crown", show_default=True)
@click.option("--intermediate", is_flag=True, help="Bounds of every pre-activation too.")
@click.option("--slopes", is_flag=True, help="Shape and hash of every optimised slope.")
@click.option("--case", type=click.IntRange(min=0), default=0, show_default=True, help="Which input box.")
@config_options
@click.option("--json", "json_file", type=_FILE, help="File to write instead of stdout.")
def bounds(
    onnx: Path,
    vnnlib: Path,
    method: Literal["ibp", "crown", "alpha-crown"],
    intermediate: bool,
    slopes: bool,
    case: int,
    config_file: Path | None,
    assignments: tuple[str, ...],
    device: str | None,
    seed: int | None,
    ranks: int | None,
    json_file: Path | None,
) -> None:
    """Lower and upper bounds of every output over the property's input box, as JSON that compares bit for bit."""
    from verifier.cli.bounds import bounds_json

    config = build_config([config_file] if config_file else [], assignments, device, seed, ranks)
    text = bounds_json(onnx, vnnlib, config, method, intermediate, slopes, case)
    if text is None:
        return
    if json_file is None:
        click.echo(text)
    else:
        from verifier.report.files import write_atomic

        write_atomic(json_file, text + "\n")


@cli.command()
@query_options
@click.option("--results-file", required=True, type=_FILE, help="VNN-COMP result file with a witness.")
@click.pass_context
def check(context: click.Context, onnx: Path, vnnlib: Path, results_file: Path) -> None:
    """Does this counterexample hold? Prints valid (exit 0), tolerance (4) or invalid: reason (5)."""
    from verifier.cli.check import check_witness

    answer = check_witness(onnx, vnnlib, results_file)
    click.echo(answer.text)
    context.exit(answer.exit_code)


@cli.command()
@click.option("--markdown", is_flag=True, help="As the page docs/operators.md.")
def ops(markdown: bool) -> None:
    """ONNX operators, ATen functions and relaxations that are supported; those of other packages are marked."""
    from verifier.cli.ops import overview

    click.echo(overview(markdown), nl=False)


@cli.command()
@click.argument("network", type=_FILE)
def inspect(network: Path) -> None:
    """Nodes, shapes and parameters of an ONNX file, and what is not supported."""
    from verifier.cli.inspect import describe

    click.echo(describe(network))


@cli.command(hidden=True)
@click.option("--device", type=_DEVICES, default="auto")
@click.argument("address")
@click.argument("rank", type=int)
@click.argument("size", type=int)
@click.argument("parent", type=int)
@click.pass_context
def rank(context: click.Context, device: str, address: str, rank: int, size: int, parent: int) -> None:
    """One of several ranks; started by the others, not by hand."""
    from verifier.cli.rank import serve

    context.exit(serve(address, rank, size, device, parent))


@cli.group()
def config() -> None:
    """Show the settings or their schema."""


@config.command("show")
@config_options
def show_config(
    config_file: Path | None,
    assignments: tuple[str, ...],
    device: str | None,
    seed: int | None,
    ranks: int | None,
) -> None:
    """Every setting as YAML, after --config and --set."""
    from verifier.config import dump_config

    settings = build_config([config_file] if config_file else [], assignments, device, seed, ranks)
    click.echo(dump_config(settings), nl=False)


@config.command("schema")
@click.option("--of", "name", type=click.Choice(["config", "verify", "bounds"]), default="config", show_default=True)
def show_schema(name: str) -> None:
    """JSON Schema of the settings, or of the records that verify (and run) and bounds write."""
    import json

    if name == "config":
        from verifier.config import Config

        click.echo(json.dumps(Config.model_json_schema(), indent=2))
    else:
        from verifier.report.record import schema

        click.echo(json.dumps(schema(name), indent=2))


@cli.command()
@click.pass_context
def doctor(context: click.Context) -> None:
    """Versions, devices and a short self-test."""
    from verifier.cli.doctor import examine

    lines, healthy = examine()
    click.echo("\n".join(lines))
    context.exit(0 if healthy else 1)


@cli.command()
@click.argument("instances", type=_FILE, nargs=-1, required=True)
@click.option("--out", required=True, type=_FILE, help="File of JSON lines, one record per instance.")
@click.option("--timeout", callback=check_timeout, metavar="SECONDS", help="Cap on every instance's limit.")
@config_options
@click.option("--resume", is_flag=True, help="Go on with an --out file: keep what it holds and still counts.")
@click.option("--fresh", is_flag=True, help="Go on with an --out file, but repeat every instance of the lists.")
@click.option(
    "--retry",
    callback=check_retry,
    metavar="VERDICTS",
    help="Like --resume, and repeat these too: some of unknown,error,timeout.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Instances at a time.")
@click.option("--verdicts", type=_FILE, help="CSV with columns onnx, vnnlib, verdict: count wrong answers.")
@click.pass_context
def run(
    context: click.Context,
    instances: tuple[Path, ...],
    out: Path,
    timeout: float | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    device: str | None,
    seed: int | None,
    ranks: int | None,
    resume: bool,
    fresh: bool,
    retry: frozenset[str],
    jobs: int,
    verdicts: Path | None,
) -> None:
    """Answer every instance of one or more lists (CSV: onnx,vnnlib,timeout); a table at the end."""
    from verifier.cli.run import Repeat, run_lists

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("run starts the ranks of every instance itself: use --ranks instead of torchrun")
    config = build_config([config_file] if config_file else [], assignments, device, seed, ranks)
    repeat = Repeat(resume, fresh, retry)
    context.exit(run_lists(instances, out, timeout, config, repeat, jobs, verdicts))


@cli.group()
def vnncomp() -> None:
    """What the scripts of the competition call."""


def resident_options(command: F) -> F:
    """Where the resident worker is."""
    return click.option(
        "--resident-folder",
        type=_FILE,
        envvar="VERIFIER_RESIDENT_FOLDER",
        help="Folder of the resident worker, open to this user alone.  [default: verifier-UID in $TMPDIR or /tmp]",
    )(command)


def idle_option(command: F) -> F:
    """How long the resident worker stays."""
    return click.option(
        "--idle",
        type=click.FloatRange(min=0),
        envvar="VERIFIER_RESIDENT_SECONDS",
        default=600.0,
        show_default=True,
        help="Seconds without work after which the resident worker ends; 0: none is started or used.",
    )(command)


@vnncomp.command("prepare")
@click.argument("category")
@click.argument("onnx", type=_FILE)
@click.argument("vnnlib", type=_FILE)
@resident_options
@idle_option
def vnncomp_prepare(category: str, onnx: Path, vnnlib: Path, resident_folder: Path | None, idle: float) -> None:
    """Warm up what the next instance needs; looks at no network. Always succeeds."""
    from verifier.cli.resident_link import default_folder
    from verifier.cli.vnncomp import prepare

    prepare(resident_folder or default_folder(), idle)


@vnncomp.command("run")
@click.argument("category")
@click.argument("onnx", type=_FILE)
@click.argument("vnnlib", type=_FILE)
@click.argument("results", type=_FILE)
@click.argument("timeout")
@click.option("--configs", type=_FILE, help="Folder of category settings (CATEGORY.yaml).")
@click.option("--parent", type=int, help="Process id of the script: its start is the clock's, its end ours.")
@resident_options
@idle_option
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    envvar="VERIFIER_RESIDENT_PATIENCE",
    default=0.3,
    show_default=True,
    help="Seconds to wait for the resident worker's answer before going on without it.",
)
@click.pass_context
def vnncomp_run(
    context: click.Context,
    category: str,
    onnx: Path,
    vnnlib: Path,
    results: Path,
    timeout: str,
    configs: Path | None,
    parent: int | None,
    resident_folder: Path | None,
    idle: float,
    patience: float,
) -> None:
    """Answer one instance into RESULTS. Exits 0 whatever the verdict, unless RESULTS cannot be written."""
    from verifier.cli.resident_link import default_folder
    from verifier.cli.vnncomp import run_instance

    folder = (resident_folder or default_folder()) if idle > 0 else None
    context.exit(run_instance(category, onnx, vnnlib, results, timeout, configs, parent, folder, patience))


@vnncomp.command("resident")
@resident_options
@idle_option
@click.option("--stop", is_flag=True, help="End it; a query that runs is finished.")
def vnncomp_resident(resident_folder: Path | None, idle: float, stop: bool) -> None:
    """Be the resident worker that prepare starts, until it is idle for too long; a second one ends at once."""
    from verifier.cli.resident import stop_resident
    from verifier.cli.resident_link import default_folder
    from verifier.cli.resident_server import serve
    from verifier.cli.vnncomp import warm_up

    folder = resident_folder or default_folder()
    if stop:
        stop_resident(folder)
    else:
        serve(folder, idle, warm_up)
