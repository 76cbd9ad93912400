"""One promotion at a time, wherever it runs: a queue of tickets in the registry itself.

MLflow has no compare-and-set. What it has on every database is that version numbers of a model are unique, grow,
and are never given twice, even after a version was deleted. So a version of the model `NAME.lock` is a ticket:
the lowest one that is left has its turn, and a turn ends when its ticket is deleted. A ticket is deleted by its
number, so nobody can delete another's by mistake, however late a request arrives.
"""

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ray_app.errors import RegistryError
from ray_app.tracking.mlflow_logger import TRACKING_ERRORS

WAIT_S = 120.0
"""A process gives up its place in the queue after waiting so long."""
STALE_S = 300.0
"""A ticket as old as this is of a process that was killed: nobody waits longer than WAIT_S, a turn takes seconds."""
POLL_S = 0.3
"""Between two looks at the queue."""


@dataclass(frozen=True, slots=True)
class RegistryLock:
    """The right to write to one model's versions, alias and log."""

    client: MlflowClient
    """Where the queue is."""
    queue: str
    """Name of the model whose versions are tickets."""
    ticket: str
    """Number of this process's ticket."""

    def require(self) -> None:
        """RegistryError if the turn has been taken away because it lasted too long."""
        try:
            self.client.get_model_version(self.queue, self.ticket)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise RegistryError(
                f"this promotion took longer than {STALE_S:.0f} s at the registry and lost its turn; the alias has "
                "not been moved. Run it again."
            ) from error


@contextmanager
def turn(
    client: MlflowClient, model: str, run_id: str, *, wait_s: float = WAIT_S, stale_s: float = STALE_S
) -> Iterator[RegistryLock]:
    """Waits for this process's turn with `model`. RegistryError after `wait_s`, naming who has it.

    `run_id` is of any run: a version must come from one. Waiting and taking over are told on standard error.
    """
    queue = f"{model}.lock"
    ensure_model(client, queue, f"Queue of promotions to {model}; its versions come and go.")
    mark = uuid.uuid4().hex
    about = {"host": socket.gethostname(), "pid": os.getpid(), "mark": mark}
    try:
        made = client.create_model_version(
            queue, f"runs:/{run_id}/turn", run_id, description=json.dumps(about), await_creation_for=0
        )
        wait_for(client, made, mark, wait_s, stale_s)
        yield RegistryLock(client, queue, str(made.version))
    finally:
        give_back(client, queue, mark)


def wait_for(client: MlflowClient, made: ModelVersion, mark: str, wait_s: float, stale_s: float) -> None:
    """Until no older ticket is left. Ages are differences of the server's own times, so clocks do not matter."""
    begun, told = time.monotonic(), False
    while True:
        first = next(iter(tickets(client, made.name)), made)
        waited = time.monotonic() - begun
        if int(first.version) >= int(made.version) or mark in (first.description or ""):
            return
        holder = named(first)
        if (made.creation_timestamp - first.creation_timestamp) / 1000 + waited >= stale_s:
            say(f"{holder} began a promotion to {made.name.removesuffix('.lock')} and did not end it; taking over")
            discard(client, first)
        elif waited >= wait_s:
            raise RegistryError(
                f"{holder} is promoting to the same model; waited {waited:.0f} s. Run it again; a process that was "
                f"killed is passed over {stale_s:.0f} s after it began."
            )
        else:
            if not told:
                told = True
                say(f"waiting: {holder} is promoting to the same model")
            time.sleep(POLL_S)


def tickets(client: MlflowClient, queue: str) -> list[ModelVersion]:
    """All tickets, the lowest number first."""
    return sorted(client.search_model_versions(f"name='{queue}'"), key=lambda ticket: int(ticket.version))


def discard(client: MlflowClient, ticket: ModelVersion) -> None:
    """Deletes a ticket; another process may have done so already."""
    try:
        client.delete_model_version(ticket.name, str(ticket.version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def give_back(client: MlflowClient, queue: str, mark: str) -> None:
    """Deletes this process's tickets: two, where an answer was lost and the request repeated."""
    try:
        for ticket in tickets(client, queue):
            if mark in (ticket.description or ""):
                discard(client, ticket)
    except TRACKING_ERRORS as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        say(f"the place in the queue could not be given back ({first_line}); it lapses after {STALE_S:.0f} s")


def ensure_model(client: MlflowClient, name: str, description: str | None = None) -> None:
    """A registered model of this name, made where there is none."""
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def named(ticket: ModelVersion) -> str:
    """Who holds a ticket, in words."""
    about = json.loads(ticket.description or "{}")
    return f"process {about.get('pid', '?')} on {about.get('host', '?')}"


def say(text: str) -> None:
    """To standard error: standard output may be one JSON object."""
    print(f"promote: {text}", file=sys.stderr)
