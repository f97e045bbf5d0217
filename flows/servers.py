"""`segflow prefect`: what a Prefect server cannot know by itself."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from segcore.errors import PlanError, one_line
from segcore.spec import parse_seconds

servers = typer.Typer(no_args_is_help=True, help="Flow runs on a Prefect server.")

#: Tags of a flow run that say which process it is; they are set when it begins.
HOST, PROCESS = "segflow-host:", "segflow-pid:"


@servers.callback()
def _group() -> None:
    """Flow runs on a Prefect server."""


@servers.command("close-dead")
def close_dead(
    flow: Annotated[str, typer.Option(help="Name of the flow.")] = "segflow",
    silent_for: Annotated[
        str, typer.Option(help="Runs of other hosts count as dead after so long without a change.")
    ] = "1d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Name them, and leave them as they are.")] = False,
) -> None:
    """Set runs to Crashed that a server still shows as running though their process is gone.

    A run of this host is dead when its process is. One of another host is when the server heard nothing of it for
    long. A run that is dead keeps its place in a concurrency limit until it is closed.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState
    from prefect.client.schemas.filters import FlowRunFilterStateType as OfType
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    until = datetime.now(UTC) - timedelta(seconds=parse_seconds("--silent-for", silent_for))
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=OfType(any_=[StateType.RUNNING, StateType.CANCELLING, StateType.PENDING]))
    )
    closed = 0
    try:
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])), flow_run_filter=wanted
            )
            for run in runs:
                why = _why_dead(run.tags, run.updated, until)
                if why is None:
                    continue
                if not dry_run:
                    client.set_flow_run_state(run.id, Crashed(message=why), force=True)
                closed += 1
                print(f"{'dead' if dry_run else 'closed'}        {run.name} ({run.id}): {why}")
    except Exception as error:  # whatever a client raises whose server is away
        raise PlanError(f"no Prefect server answers ({one_line(error)}); set PREFECT_API_URL") from error
    print(f"{closed} dead flow runs")


def _why_dead(tags: list[str], changed: datetime | None, until: datetime) -> str | None:
    """Why a run is dead, or None where it may live."""
    host = next((tag.removeprefix(HOST) for tag in tags if tag.startswith(HOST)), None)
    pid = next((tag.removeprefix(PROCESS) for tag in tags if tag.startswith(PROCESS)), "")
    if host == platform.node() and pid.isdecimal():
        return None if _is_there(int(pid)) else f"its process {pid} on {host} is gone"
    if changed is not None and changed < until:
        return f"nothing was heard of it since {changed:%Y-%m-%d %H:%M} UTC"
    return None


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
