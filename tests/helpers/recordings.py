"""Events of a recording's file, as the sources read them."""

from pathlib import Path

from ray_app.events.recording import Events
from ray_app.sources.npy import events_of, read_npy


def read_events(path: Path, width: int = 640, height: int = 480) -> Events:
    """Return the events of a file on a sensor of this size; 640 x 480 is DSEC's."""
    return events_of(read_npy(path), width, height, str(path))
