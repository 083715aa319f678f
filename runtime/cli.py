"""The command ``wavecast``. Imports ray and torch only where a command needs them."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar, get_args

import click

from wavecast.runtime.errors import WavecastError
from wavecast.runtime.model import DEFAULT_PRESET, resolve_model
from wavecast.runtime.plan_job import make_plan, plan_as_json, plan_as_table
from wavecast.runtime.presets import PRESETS
from wavecast.scheduler import STRATEGIES, FanOut, SchedulerError
from wavecast.scheduler import explain as explain_schedule

__all__ = ("main",)

F = TypeVar("F", bound=Callable[..., None])

_FAILED = 1
_REFUSED = 2
_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wavecast")
def cli() -> None:
    """Move fresh weights from trainers to inference engines, in coloured waves."""


def _model_options(command: F) -> F:
    """Add what both commands ask about the model and the two sides."""
    options = (
        click.option(
            "--preset",
            "preset_name",
            metavar="NAME",
            help=f"Model shapes [default: {DEFAULT_PRESET}]: {', '.join(PRESETS)}.",
        ),
        click.option("--checkpoint", metavar="DIR", help="A Hugging Face checkpoint directory instead of a preset."),
        click.option("--layers", type=int, help="Scale the preset down to so many layers."),
        click.option("--src", default="tp=2,pp=2", show_default=True, help="The trainers' mesh."),
        click.option("--dst", default="tp=3", show_default=True, help="The mesh of one inference replica."),
        click.option("--replicas", default=2, show_default=True, help="How many inference replicas."),
        click.option("--dtype", default="bfloat16", show_default=True, help="Of the weights, on both sides."),
        click.option("--strategy", default="auto", show_default=True, help=f"Colouring: {', '.join(STRATEGIES)}."),
        click.option("--ports", type=click.Choice(["half", "full"]), default="half", show_default=True),
        click.option(
            "--fan-out",
            type=click.Choice(get_args(FanOut)),
            default="auto",
            show_default=True,
            help="How a task reaches several receivers.",
        ),
        click.option("--chunk-bytes", type=int, help="The most bytes of a task [default: by the busiest actor]."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table."),
    )
    for option in reversed(options):
        command = option(command)

    return command


@cli.command()
@_model_options
@click.option(
    "--explain", is_flag=True, help="Tell of each wave: tasks, bytes, longest task, busiest port, idle share."
)
def plan(
    preset_name: str | None,
    checkpoint: str | None,
    layers: int | None,
    src: str,
    dst: str,
    replicas: int,
    dtype: str,
    strategy: str,
    ports: Literal["half", "full"],
    fan_out: FanOut,
    chunk_bytes: int | None,
    as_json: bool,
    explain: bool,
) -> None:
    """Plan a sync without moving anything: no Ray, no tensors."""
    config = resolve_model(preset_name=preset_name, checkpoint=checkpoint, layers=layers)
    outcome = make_plan(
        config,
        src=src,
        dst=dst,
        replicas=replicas,
        dtype=dtype,
        strategy=strategy,
        ports=ports,
        fan_out=fan_out,
        chunk_bytes=chunk_bytes,
    )
    if as_json:
        click.echo(json.dumps(plan_as_json(outcome, with_waves=explain)))
        return

    click.echo(plan_as_table(outcome, f"{checkpoint or preset_name or DEFAULT_PRESET}: {src} -> {replicas} x {dst}"))
    if explain:
        click.echo("\n".join(explain_schedule(outcome.schedule).lines()))


@cli.command()
@_model_options
@click.option("--repeat", default=3, show_default=True, help="How many syncs, with new weights before each.")
@click.option("--transport", type=click.Choice(["auto", "nccl", "ipc", "gloo"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
@click.option("--address", help="A running Ray cluster's address [default: start one here].")
@click.option("--budget-bytes", default=1 << 30, show_default=True, help="Extra memory an actor may use for staging.")
@click.option("--in-flight", type=int, help="Tasks an actor may have been given at a time [default: 2, all if pulled].")
@click.option("--lookahead", type=int, help="Waves a task may run ahead [default: any]; 0 is a barrier after each.")
@click.option("--deadline", default=300.0, show_default=True, help="Seconds for each sync.")
@click.option("--checksum/--no-checksum", default=True, show_default=True, help="Compare checksums of both ends.")
def sync(
    preset_name: str | None,
    checkpoint: str | None,
    layers: int | None,
    src: str,
    dst: str,
    replicas: int,
    dtype: str,
    strategy: str,
    ports: Literal["half", "full"],
    fan_out: FanOut,
    chunk_bytes: int | None,
    as_json: bool,
    repeat: int,
    transport: Literal["auto", "nccl", "ipc", "gloo"],
    device: str,
    seed: int,
    address: str | None,
    budget_bytes: int,
    in_flight: int | None,
    lookahead: int | None,
    deadline: float,
    checksum: bool,
) -> None:
    """Start actors, bring replicas to the trainers' weights a few times, and compare every element."""
    # torch says so when numpy is not there; nothing here needs it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    from wavecast.runtime.options import SyncOptions
    from wavecast.runtime.sync_job import SyncJob, run, sync_as_json, sync_as_table

    options = SyncOptions(
        transport=transport,
        budget_bytes=budget_bytes,
        chunk_bytes=chunk_bytes,
        strategy=strategy,
        ports=ports,
        fan_out=fan_out,
        lookahead=lookahead,
        in_flight=in_flight,
        deadline_seconds=deadline,
        checksum=checksum,
    )
    job = SyncJob(
        config=resolve_model(preset_name=preset_name, checkpoint=checkpoint, layers=layers),
        checkpoint=checkpoint,
        src=src,
        dst=dst,
        replicas=replicas,
        dtype=dtype,
        seed=seed,
        repeat=repeat,
        device=device,
        address=address,
        options=options,
    )
    # Ray prints warnings to stdout; that is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        outcome = run(job)

    if as_json:
        click.echo(json.dumps(sync_as_json(outcome)))
    else:
        click.echo(
            sync_as_table(outcome, f"{checkpoint or preset_name or DEFAULT_PRESET}: {src} -> {replicas} x {dst}")
        )

    if not outcome.verified:
        raise click.exceptions.Exit(_FAILED)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a refusal is one line on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = cli.main(args=args or ["--help"], prog_name="wavecast", standalone_mode=False)
    except (WavecastError, SchedulerError) as error:
        click.echo(f"wavecast: {error}".replace("\n", " "), err=True)
        sys.exit(_REFUSED)
    except click.ClickException as error:
        click.echo(f"wavecast: {error.format_message()}".replace("\n", " "), err=True)
        sys.exit(_REFUSED)
    except click.Abort:
        click.echo("wavecast: interrupted", err=True)
        sys.exit(_INTERRUPTED)

    sys.exit(code if isinstance(code, int) else 0)
