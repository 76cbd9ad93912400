"""docs/example-comparison.html: a page of `ray-app compare` with its pictures as JPEG, a tenth of their size.

    ray-app compare runs/conv runs/lowrank … --store stores/scenes --out reports/comparison
    python -m benchmarks.adapters.example_comparison reports/comparison/comparison.html

Nothing else of the page is changed.
"""

import argparse
import base64
import io
import re
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).parents[2] / "docs" / "example-comparison.html"
QUALITY = 80


def smaller(page: str) -> str:
    """The page with every PNG as JPEG."""
    return re.sub(r"data:image/png;base64,([A-Za-z0-9+/=]+)", as_jpeg, page)


def as_jpeg(found: re.Match[str]) -> str:
    """The address of one picture."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="comparison.html")
    PAGE.write_text(smaller(parser.parse_args().page.read_text()))
    print(f"{PAGE}: {PAGE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
