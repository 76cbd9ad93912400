"""Errors that the user can fix. One base class, one message; exit code 2 and no traceback on the command line.

A message gives the number found, the limit, and the way out. Every class takes the message alone, or passes on all
that it takes, so that an error keeps its text when Ray pickles it from a worker to the driver.
"""


class RayAppError(Exception):
    """Base of every error that the user can fix."""

    exit_code = 2


class ConfigError(RayAppError):
    """A setting that cannot be used: an unknown key, a value out of range, two that do not fit together."""


class InputError(RayAppError):
    """A recording, image or video that cannot be read as what it claims to be."""


class StoreError(RayAppError):
    """A pair store, checkpoint folder or report folder that is damaged, incomplete or in the way."""


class CheckpointError(RayAppError):
    """A checkpoint that does not verify, or does not fit the data or the adapter."""


class ResourceError(RayAppError):
    """The cluster has less than what is asked: CPUs, GPUs, memory or disk."""


class TrainingError(RayAppError):
    """Training cannot continue, for instance because a loss is not finite."""


class RunStopped(RayAppError):
    """Work was asked to stop, has saved, and can be resumed."""

    exit_code = 143
    """Exit code of a process that SIGTERM ended."""


class RunInterrupted(RunStopped):
    """The same, by Ctrl-C."""

    exit_code = 130
    """Exit code of a process that SIGINT ended."""


class RegistryError(RayAppError):
    """The tracking server or the model registry lacks what was asked for."""


class EndpointError(RayAppError):
    """The served endpoint refuses a request, in its own words."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message, status, code)  # all of it, so that pickle brings all of it back
        self.status, self.code = status, code

    def __str__(self) -> str:
        return str(self.args[0])


class EndpointBusy(EndpointError):
    """The endpoint had no room for a request within its time limit."""


class EndpointUnreachable(EndpointError):
    """Nothing answers at the endpoint's address, or not in time."""
