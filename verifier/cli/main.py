"""The commands and their options. Modules that cost time are imported inside the commands that need them."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

import verifier
from verifier.cli import options
from verifier.cli.options import (
    DEVICES,
    FILE,
    BoundsOptions,
    CompetitionInstance,
    DataSet,
    QueryFiles,
    Repeat,
    Settings,
    VerifyFiles,
    WarmServerOptions,
)
from verifier.core.errors import InputError, PluginFailed, VerifierError
from verifier.core.plugins import blamed

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    except BrokenPipeError:
        return 1
    except Exception as raised:
        if isinstance(raised, OSError) and raised.errno in _FULL and raised.filename is None:
            click.echo(f"Error: cannot write to stdout: {raised.strerror}", err=True)
            return InputError.exit_code
        error = blamed(raised)
        known = isinstance(error, VerifierError)
        click.echo(f"Error: {error}" if known else f"Error: internal error: {type(error).__name__}: {error}", err=True)
        if any(a in ("-v", "--verbose") for a in args) and (isinstance(error, PluginFailed) or not known):
            traceback.print_exc()
        return error.exit_code if isinstance(error, VerifierError) else 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(verifier.__version__, prog_name="verifier")
def cli() -> None:
    """Prove properties of neural networks, or find counterexamples.

    Exit codes: 0 a verdict (also unknown and timeout), 2 bad usage, configuration or input, 3 an unsupported network or
    property, 1 an internal error, or one of a plug-in. inspect describes an unsupported network, and exits with 0.
    """


@cli.command()
@options.verify_files
@click.option("--timeout", callback=options.check_timeout, metavar="SECONDS", help="Limit, process start included.")
@options.settings
@click.option("--results-file", type=FILE, help="VNN-COMP result file to write (verdict and witness).")
@click.option("--json", "json_file", type=FILE, help="JSON record to write.")
@click.option(
    "--write",
    "more",
    type=(str, FILE),
    multiple=True,
    metavar="FORMAT FILE",
    help="File in another format; repeatable.",
)
@click.option("--proof", type=FILE, help="File for the proof of an unsat, for an independent checker.")
@click.option("-v", "--verbose", is_flag=True, help="Phases and notes on stderr, also in a pipe.")
def verify(
    files: VerifyFiles,
    timeout: float | None,
    settings: Settings,
    results_file: Path | None,
    json_file: Path | None,
    more: tuple[tuple[str, Path], ...],
    proof: Path | None,
    verbose: bool,
) -> int:
    """Answer one query; the verdict goes to stdout, and after a sat for QUERY (instead of --vnnlib) the counterexample.

    unsat: proved, no input violates the property. sat: a counterexample exists (see --results-file).
    """
    from verifier.cli.query import Outputs, run_query, write_last
    from verifier.runtime.clock import process_start
    from verifier.runtime.query import Query
    from verifier.runtime.rank import is_other_rank

    start = process_start()
    if is_other_rank():
        none = Path()  # rank 0 alone reads the files
        query = Query(none, none, settings.load(), timeout, start, verbose, quiet=not verbose)
        outcome = run_query(query, Outputs(), False, silent=True)
        if outcome.error is not None and outcome.error["kind"] != "RankFailed":
            click.echo(f"Error: {outcome.error['message']}", err=True)
        return outcome.exit_code  # rank 0 says all else
    outputs = Outputs(results_file, json_file, more)
    try:
        outputs.plugins()
        config = settings.load()
        onnx, networks, vnnlib = files.find()
    except VerifierError:
        for path, text in outputs.texts("error"):
            write_last(path, text)
        raise
    query = Query(onnx, vnnlib, config, timeout, start, verbose, networks=networks, proof=proof)
    outcome = run_query(query, outputs, verbose)
    if outcome.error is not None:
        click.echo(f"Error: {outcome.error['message']}", err=True)
    else:
        click.echo(outcome.verdict)
        if files.query is not None and outcome.witness_text:
            click.echo(outcome.witness_text, nl=False)
        if outcome.exit_code == 1:
            click.echo(f"Error: {outcome.reason}", err=True)
    return outcome.exit_code


@cli.command()
@click.argument("network", type=FILE)
@options.data_set
@click.option("--eps", "radii", required=True, metavar="LIST", help="Radii, separated by commas.")
@click.option("--norm", default="linf", show_default=True, help="Of the radii.")
@click.option("--out", type=FILE, help="File of JSON lines that keeps answers; an ended run goes on from it.")
@click.option("--csv", "csv_file", type=FILE, help="Every input at every radius.")
@click.option("--markdown", type=FILE, help="The table as Markdown.")
@click.option("--plot", type=FILE, help="Accuracy against radius, .png, .svg or .pdf (needs matplotlib).")
@click.option("--adversarial", type=FILE, help="Adversarial examples, .npz.")
@options.settings
def certify(
    network: Path,
    data: DataSet,
    radii: str,
    norm: str,
    settings: Settings,
    out: Path | None,
    csv_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
    adversarial: Path | None,
) -> None:
    """Accuracy that is certified on a data set: inputs certified, falsified and unknown at every radius.

    DATA is an .npz file with inputs and labels (without labels: what the network says itself).
    """
    from verifier.cli.certify import certify_files

    outputs = {"out": out, "csv": csv_file, "markdown": markdown, "plot": plot, "adversarial": adversarial}
    click.echo(certify_files(network, data, settings.load(), radii, norm, outputs))


@cli.command()
@click.argument("network", type=FILE)
@options.data_set
@click.option("--max-eps", required=True, type=click.FloatRange(min=0, min_open=True), help="Largest radius looked at.")
@click.option("--tolerance", type=click.FloatRange(min=0, min_open=True), help="Default: a hundredth of --max-eps.")
@click.option("--csv", "csv_file", type=FILE, help="The same lines in a file.")
@options.settings
def radius(
    network: Path,
    data: DataSet,
    max_eps: float,
    tolerance: float | None,
    settings: Settings,
    csv_file: Path | None,
) -> None:
    """The largest certified radius of every input of a data set, by bisection; CSV on stdout."""
    from verifier.cli.certify import radius_files

    click.echo(radius_files(network, data, settings.load(), max_eps, tolerance, csv_file))


@cli.command()
@options.query_files
@options.bounds_options
@options.settings
@click.option("--json", "json_file", type=FILE, help="File to write instead of stdout.")
def bounds(files: QueryFiles, wanted: BoundsOptions, settings: Settings, json_file: Path | None) -> None:
    """Lower and upper bounds of every output over the property's input box, as JSON that compares bit for bit."""
    from verifier.cli.bounds import bounds_json

    text = bounds_json(files, settings.load(), wanted)
    if text is None:
        return
    if json_file is None:
        click.echo(text)
    else:
        from verifier.report.files import write_atomic

        write_atomic(json_file, text + "\n")


@cli.command()
@options.verify_files
@click.option("--results-file", required=True, type=FILE, help="VNN-COMP result file with a witness.")
def check(files: VerifyFiles, results_file: Path) -> int:
    """Does this counterexample hold? Prints valid (exit 0), tolerance (4) or invalid: reason (5)."""
    from verifier.cli.check import check_witness

    onnx, networks, vnnlib = files.find()
    answer = check_witness(onnx, vnnlib, results_file, dict(networks))
    click.echo(answer.text)
    return answer.exit_code


@cli.command()
@click.option("--markdown", is_flag=True, help="As the page docs/operators.md.")
def ops(markdown: bool) -> int:
    """ONNX operators, ATen functions and relaxations that are supported; those of other packages are marked.

    A package whose ops cannot be used is named on stderr, and the exit code is 2.
    """
    from verifier.cli.ops import overview

    text, wrong = overview(markdown)
    click.echo(text, nl=False)
    for error in wrong:
        click.echo(f"Error: {error}", err=True)
    return InputError.exit_code if wrong else 0


@cli.command()
@click.argument("network", type=FILE)
def inspect(network: Path) -> None:
    """Nodes, shapes and parameters of an ONNX file, and what is not supported (exit 0 all the same)."""
    from verifier.cli.inspect import describe

    click.echo(describe(network))


@cli.command(hidden=True)
@click.option("--device", type=DEVICES, default="auto")
@click.argument("address")
@click.argument("rank", type=int)
@click.argument("size", type=int)
@click.argument("parent", type=int)
def rank(device: str, address: str, rank: int, size: int, parent: int) -> int:
    """One of several ranks; started by the others, not by hand."""
    from verifier.runtime.rank import serve

    return serve(address, rank, size, device, parent)


@cli.group()
def config() -> None:
    """Show the settings or their schema."""


@config.command("show")
@options.settings
def show_config(settings: Settings) -> None:
    """Every setting as YAML, after --config and --set."""
    from verifier.config import dump_config

    click.echo(dump_config(settings.load()), nl=False)


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
def doctor() -> int:
    """Versions, devices and a short self-test."""
    from verifier.cli.doctor import examine

    lines, healthy = examine()
    click.echo("\n".join(lines))
    return 0 if healthy else 1


@cli.command()
@click.argument("instances", type=FILE, nargs=-1, required=True)
@click.option("--out", required=True, type=FILE, help="File of JSON lines, one record per instance.")
@click.option("--timeout", callback=options.check_timeout, metavar="SECONDS", help="Cap on every instance's limit.")
@options.settings
@options.repeat
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Instances at a time.")
@click.option("--verdicts", type=FILE, help="CSV with columns onnx, vnnlib, verdict: count wrong answers.")
def run(
    instances: tuple[Path, ...],
    out: Path,
    timeout: float | None,
    settings: Settings,
    repeat: Repeat,
    jobs: int,
    verdicts: Path | None,
) -> int:
    """Answer every instance of one or more lists (CSV: onnx,vnnlib,timeout); a table at the end."""
    from verifier.cli.run import Session, run_lists

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("run starts the ranks of every instance itself: use --ranks instead of torchrun")
    return run_lists(instances, out, Session(settings.load(), timeout, jobs), repeat, verdicts)


@cli.group()
def vnncomp() -> None:
    """What the scripts of the competition call."""


@vnncomp.command("prepare")
@click.argument("category")
@click.argument("onnx", type=FILE)
@click.argument("vnnlib", type=FILE)
@options.warm_server
def vnncomp_prepare(category: str, onnx: Path, vnnlib: Path, server: WarmServerOptions) -> None:
    """Warm up what the next instance needs; looks at no network. Always succeeds."""
    from verifier.cli.vnncomp import prepare

    prepare(server.folder, server.idle)


@vnncomp.command("run")
@options.competition_instance
@click.option("--configs", type=FILE, help="Folder of category settings (CATEGORY.yaml).")
@click.option("--parent", type=int, help="Process id of the script: its start is the clock's, its end ours.")
@options.warm_server
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    envvar="VERIFIER_RESIDENT_PATIENCE",
    default=0.3,
    show_default=True,
    help="Seconds to wait for the resident worker's answer before going on without it.",
)
def vnncomp_run(
    instance: CompetitionInstance, configs: Path | None, parent: int | None, server: WarmServerOptions, patience: float
) -> int:
    """Answer one instance into RESULTS. Exits 0 whatever the verdict, unless RESULTS cannot be written."""
    from verifier.cli.vnncomp import run_instance

    folder = server.folder if server.idle > 0 else None
    return run_instance(instance, configs, parent, folder, patience)


@vnncomp.command("resident")
@options.warm_server
@click.option("--stop", is_flag=True, help="End it; a query that runs is finished.")
def vnncomp_resident(server: WarmServerOptions, stop: bool) -> None:
    """Be the resident worker that prepare starts, until it is idle for too long; a second one ends at once."""
    from verifier.runtime.warm_client import stop_server
    from verifier.runtime.warm_server import serve
    from verifier.runtime.warm_up import warm_up

    if stop:
        stop_server(server.folder)
    else:
        serve(server.folder, server.idle, warm_up)
