"""Contact sheet: pairs of a store in one picture."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ray_app.commands.inspect.scan import is_picture
from ray_app.errors import ConfigError
from ray_app.reports.html import write_output
from ray_app.store.pair_store import PairStore

SHEET_COLUMNS, SHEET_ROWS = 4, 6
GAP, CAPTION = 6, 14


def write_contact_sheet(store: PairStore, path: Path) -> None:
    """Write pairs spread evenly over the store, each event picture to the left of its target."""
    event, target = store.feature("event"), store.feature("target")
    if not (is_picture(event) and is_picture(target)):
        raise ConfigError(f"--picture: the features of {store.folder} are not pictures; leave it out.")
    rows = np.unique(np.linspace(0, len(store.index) - 1, SHEET_COLUMNS * SHEET_ROWS).astype(np.int64))
    event_ND, target_ND = store.read_rows(rows)
    width = event.shape[2] + target.shape[2] + GAP
    height = max(event.shape[1], target.shape[1]) + CAPTION
    columns = min(SHEET_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, lines * (height + GAP) + GAP), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        for spec, picture_D, left in (
            (event, event_ND[i], x),
            (target, target_ND[i], x + width - target.shape[2]),
        ):
            picture_HWC = np.ascontiguousarray(picture_D.reshape(spec.shape).transpose(1, 2, 0))
            sheet.paste(Image.fromarray(picture_HWC), (left, y))
        caption = f"{store.index.sequence[row]}  {store.index.t_start_us[row] / 1e6:.2f} s"
        draw.text((x, y + height - CAPTION), caption, fill=(60, 60, 60))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    write_output("--picture", path, buffer.getvalue())
