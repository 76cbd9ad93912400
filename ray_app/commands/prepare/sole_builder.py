"""One process at a time builds a store: by a lock of its folder on a disk, by a lease at a URI."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from ray_app.errors import StoreError
from ray_app.runs.succession import Lease, run_in_background
from ray_app.store.filesystem import LocalDir, RemoteDir, Where, open_storage
from ray_app.store.manifest import SCRATCH
from ray_app.store.scratch import locked

PATIENCE_S = 10.0
"""Longest outage that a request of a lease waits for; what it guards waits longer."""


@contextmanager
def sole_builder(where: Where) -> Iterator[None]:
    """Keep others out of a folder until the store in it is whole. StoreError: another `prepare` is at work in it."""
    folder = open_storage(where)
    with ExitStack() as stack:
        if isinstance(folder, RemoteDir):
            stack.enter_context(_leased(folder))
        else:
            stack.enter_context(_locked(folder))
        yield


@contextmanager
def _locked(folder: LocalDir) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            with suppress(FileNotFoundError):  # the other one has just finished
                stack.enter_context(locked(folder.path / SCRATCH))
        except BlockingIOError as error:
            raise StoreError(
                f"another `prepare` is at work in {folder}; wait for its end, or name another folder for --out."
            ) from error
        yield


@contextmanager
def _leased(folder: RemoteDir) -> Iterator[None]:
    remote = RemoteDir(folder.uri_of(SCRATCH), min(folder.timeout_s, PATIENCE_S))
    lease = Lease(remote.with_logger(lambda _: None), "builder")  # the builder itself says that a bucket is away
    lease.take()
    try:
        with run_in_background(lease.renew):
            yield
    except BaseException:
        lease.release()
        raise
    folder.delete(SCRATCH)  # again: the lease may have been renewed after it was deleted with the store's end
