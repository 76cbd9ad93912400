"""What can be refused is refused before Ray, torch and MLflow are imported, in the words of the command itself."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_adapters import save_image_tokens
from small_runs import make_run

from ray_app.data.array_store import write_store
from ray_app.store.pair_store import PairStore

SLOW = ("ray", "torch", "mlflow", "matplotlib")


@pytest.fixture(scope="module")
def folder(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the small store, a store of vectors, and a folder with a file of somebody's."""
    here = tmp_path_factory.mktemp("preflight")
    (here / "store").symlink_to(small_store)
    make_run(small_store, here / "run")
    rows = [{"event": [1.0, float(n)], "target": [2.0, 1.0, float(n)], "sequence": n} for n in range(9)]
    write_store(here / "vectors", rows)
    save_image_tokens(here / "tokens")
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("notes")
    (here / "sweep.yaml").write_text("store: nowhere\nout: new\nspace: {hidden_dim: [8]}\n")
    space = "space: {learning_rate: [0.001, 0.002]}"
    (here / "lost.yaml").write_text(f"store: nowhere\nout: new\n{space}\n")
    (here / "taken.yaml").write_text(f"store: store\nout: mine\n{space}\n")
    return here


CASES = [
    ("train --store nowhere --out new", "nowhere does not exist; `ray-app prepare` makes one"),
    ("train --store store --out mine", "already holds something"),
    ("train --store store --out run", "continue it with: ray-app train --resume run"),
    ("train --resume run", "was trained on pairs of fingerprint"),
    ("train --resume mine", "is not the folder of a run"),
    ("tune lost.yaml", "nowhere does not exist"),
    ("tune taken.yaml", "already holds something; name a new folder for the sweep"),
    ("evaluate --store nowhere --checkpoint run --out new", "nowhere does not exist"),
    ("evaluate --store store --checkpoint run --out mine", "already holds another file (notes.txt)"),
    ("evaluate --store vectors --checkpoint run --out new", "was trained on event features of width 768"),
    ("benchmark --store vectors --checkpoint run --out new", "the store has width 2"),
    ("evaluate --store vectors --checkpoint tokens --out new", "tokens makes image tokens for a language model"),
    ("compare run tokens --store store --out new", "tokens makes image tokens"),
    ("promote tokens --store vectors", "`ray-app demo evaluate TARGET`"),
    ("serve --checkpoint tokens", "tokens makes image tokens"),
    ("compare run run --store vectors --out new", "was trained on event features"),
    ("compare run --store store --out mine", "already holds another file"),
    ("promote nowhere", "nowhere is not a folder; name a checkpoint, or the folder of a run"),
    ("promote mine", "is not a checkpoint: it has no MANIFEST.sha256"),
    ("inspect nowhere", "nowhere does not exist"),
    ("inspect store --against nowhere", "nowhere does not exist"),
    ("prepare scenes --out store", "already holds a complete pair store"),
    ("prepare scenes --out mine", "already holds something else"),
    ("prepare video nothing.mp4 --out new", "nothing.mp4 does not exist"),
    ("prepare dsec nothing --out new", "nothing does not exist"),
    ("prepare arrays nothing.npz --out new", "nothing.npz does not exist"),
    ("prepare arrays --event a.npy --target b.npy --out store", "already holds a complete pair store"),
    ("prepare capture nothing --out new", "nothing does not exist"),
    ("prepare capture mine --out store", "already holds a complete pair store"),
    ("serve --checkpoint nowhere", "nowhere is not a folder"),
    ("import-checkpoint nothing.pt --out new", "nothing.pt does not exist"),
    ("tune sweep.yaml", "nowhere does not exist"),
    ("tune --resume mine", "mine is not the folder of a sweep"),
    ("tune --watch nothing", "nothing is not the folder of a sweep"),
]


def test_mistakes_are_refused_before_anything_slow_is_imported(folder: Path) -> None:
    """All in one process, which would keep what one of them imports."""
    lines = "\n".join(line for line, _ in CASES)
    code = (
        "import sys\nfrom ray_app import cli\n"
        f"for line in {lines!r}.splitlines():\n"
        "    print(line, cli.run(line.split()), sep=' -> ', flush=True)\n"
        f"    print('imported', sorted(sys.modules.keys() & {set(SLOW)!r}), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = done.stdout.replace("\n", " ")
    for line, _ in CASES:
        answer = said.partition(f"{line} -> ")
        assert answer[1], said
        assert answer[2].startswith("2 imported []"), f"{line}: {answer[2][:200]}"
    for _, words in CASES:
        assert words in said


def test_what_may_be_done_is_not_refused(folder: Path) -> None:
    from ray_app.cli_settings import parse
    from ray_app.command_table import COMMANDS
    from ray_app.preflight import refuse_early

    for line in (
        f"train --store {folder}/store --out {folder}/new",
        f"evaluate --store {folder}/store --checkpoint {folder}/run --out {folder}/report",
        f"evaluate --store {folder}/store --checkpoint models:/alignment-adapter@champion --out {folder}/report",
        f"promote {folder}/run",
        f"prepare scenes --out {folder}/new-store",
        f"inspect {folder}/store",
    ):
        name, *argv = line.split() if not line.startswith("prepare") else ["prepare scenes", *line.split()[2:]]
        refuse_early(parse(name, COMMANDS[name], None, argv))
    assert PairStore.open(folder / "store").fingerprint
