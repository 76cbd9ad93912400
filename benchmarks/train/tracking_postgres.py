"""MLflow before a real PostgreSQL: runs, registry, promotion and rollback, and the database going away under a run.

    python -m benchmarks.train.tracking_postgres --folder /tmp/postgres

Starts PostgreSQL on loopback (`initdb` and `postgres` of the machine, with a password; as the user `postgres` where
this runs as root) and `mlflow server` with the very arguments of deploy/kuberay/base/mlflow.yaml, its addresses
apart. Then, as users do: `train`, `promote`, a second run, `promote --force`, `--list`, `--rollback`, `evaluate` of
the champion; the database is killed while a run trains and started again after it; `sync`. Last, what a server over
SQLite and this one take for the same 60 calls from 4 threads. Writes benchmarks/results/tracking_postgres.json.
"""

import argparse
import json
import os
import pwd
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow_process import MlflowServer, free_port, missing_and_extra
from numpy_source import NumpySource, build_store

from benchmarks.provenance import require_commit, save
from ray_app.runs.event_log import EVENT_LOG, entries

RAY_APP = Path(sys.executable).with_name("ray-app")
ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "deploy" / "kuberay" / "base" / "mlflow.yaml"
PASSWORD = "only-for-this-run"
TRAIN = "--strategy lightweight --hidden-dim 16 --batch-size 8 --num-epochs 3"
LONG = "--strategy lightweight --hidden-dim 16 --batch-size 8 --num-epochs 200 --early-stop-patience 200"
THREADS, CALLS, POINTS = 4, 15, 50


class Postgres:
    """A cluster of databases in a folder, on a loopback port."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("postgres")
        self.bin = Path(found).resolve().parent if found else sys.exit("postgres is not on this machine")
        self.data, self.port = folder / "postgres", free_port()
        self.user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        self.uri = f"postgresql+pg8000://mlflow:{PASSWORD}@127.0.0.1:{self.port}/mlflow"
        self.process: subprocess.Popen[bytes] | None = None
        self.data.mkdir()
        (password := folder / "password").write_text(PASSWORD)
        shutil.chown(self.data, self.user)
        shutil.chown(password, self.user)
        self.run(
            "initdb", "-D", self.data, "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={password}", "-E", "UTF8"
        )
        self.start()
        self.run("createdb", "-h", "127.0.0.1", "-p", self.port, "-U", "mlflow", "mlflow")

    def run(self, program: str, *words: Any) -> str:
        """One of PostgreSQL's programs, to its end."""
        done = subprocess.run(
            [str(self.bin / program), *map(str, words)],
            check=True,
            user=self.user,
            cwd="/",
            env={**os.environ, "PGPASSWORD": PASSWORD},
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout

    def start(self) -> None:
        """Wait until it takes connections."""
        words = ["-D", str(self.data), "-p", str(self.port), "-h", "127.0.0.1", "-k", ""]
        with (self.data.parent / "postgres.log").open("a") as log:
            self.process = subprocess.Popen(
                [str(self.bin / "postgres"), *words], user=self.user, cwd="/", stdout=log, stderr=log
            )
        ready = [str(self.bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        until = time.monotonic() + 60
        while subprocess.run(ready, check=False).returncode:
            assert time.monotonic() < until, "PostgreSQL did not start"
            time.sleep(0.1)

    def end(self) -> None:
        """At once, as a machine that goes away would, but without its shared memory staying behind."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait()

    def rows(self, statement: str) -> str:
        """Return the rows of a statement."""
        where = ("-h", "127.0.0.1", "-p", self.port, "-U", "mlflow", "-d", "mlflow")
        return self.run("psql", *where, "-At", "-c", statement).strip()


class DeployedServer(MlflowServer):
    """`mlflow server` as the manifest starts it."""

    def __init__(self, folder: Path, database: str) -> None:
        super().__init__(folder)
        (container,) = (
            container
            for part in yaml.safe_load_all(MANIFEST.read_text())
            if part["kind"] == "Deployment"
            for container in part["spec"]["template"]["spec"]["containers"]
        )
        own = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--allowed-hosts": f"127.0.0.1:{self.port}",
            "--backend-store-uri": database,
            "--artifacts-destination": str(folder / "artifacts"),
        }
        self.given: list[str] = container["args"]
        given = dict(word.split("=", 1) for word in self.given)
        assert own.keys() <= given.keys(), "the manifest has other arguments"
        assert given["--backend-store-uri"].partition("://")[0] == database.partition("://")[0]
        self.words = [f"{name}={value}" for name, value in (given | own).items()]
        self.environment = {one["name"]: one["value"] for one in container["env"] if "value" in one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder; every user must be able to enter it")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    folder = args.folder.resolve()
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", MLFLOW_DISABLE_TELEMETRY="true")
    store = build_store(NumpySource(), folder / "store")
    plain = MlflowServer(folder)
    plain.start()
    try:
        sqlite = calls(plain.uri)
    finally:
        plain.kill()
    database = Postgres(folder)
    server = DeployedServer(folder, database.uri)
    try:
        began = time.monotonic()
        server.start()
        first_start = round(time.monotonic() - began, 1)
        postgres = calls(server.uri)
        result = {
            "postgres": database.rows("show server_version"),
            "server_arguments": server.given,
            "seconds_of_the_first_start_with_migrations": first_start,
            "path": path(folder, store, server.uri, database),
            "calls": f"{THREADS} threads, {CALLS} log_batch of {POINTS} points each",
            "calls_sqlite": sqlite,
            "calls_postgres": postgres,
        }
    finally:
        server.kill()
        database.end()
    save("tracking_postgres", result)


def path(folder: Path, store: Path, uri: str, database: Postgres) -> dict[str, Any]:
    """Do what users do, and return what came of it."""

    def run_command(words: str) -> dict[str, Any]:
        done = subprocess.run(
            [str(RAY_APP), *words.split(), "--tracking-uri", uri, "--json"], check=True, stdout=subprocess.PIPE
        )
        print(words, file=sys.stderr, flush=True)
        return json.loads(done.stdout)

    runs = [folder / name for name in ("first", "second", "away")]
    for seed, run in enumerate(runs[:2]):
        run_command(f"train --store {store} --out {run} {TRAIN} --seed {seed}")
    promoted = [run_command(f"promote {run}{force}") for run, force in ((runs[0], ""), (runs[1], " --force"))]
    rolled = run_command("promote --rollback")
    listed = run_command("promote --list")
    champion = "models:/alignment-adapter@champion"
    judged = run_command(f"evaluate --store {store} --checkpoint {champion} --out {folder / 'report'}")
    killer = threading.Thread(target=gone_while, args=(database, runs[2]))
    killer.start()
    away = run_command(f"train --store {store} --out {runs[2]} {LONG}")
    killer.join()
    database.start()
    synced = [run_command(f"sync {run}") for run in (*runs, runs[2])]
    tracked = [(run, one["runs"][0]["mlflow_run_id"]) for run, one in zip(runs, synced, strict=False)]
    compared = [missing_and_extra(run, uri, run_id) for run, run_id in tracked]
    return {
        "tracked_without_the_database": away["tracked"],
        "verdicts": [one["verdict_code"] for one in promoted],
        "champion_after_force_and_rollback": [promoted[1]["champion"], rolled["champion"]],
        "listed": {key: listed[key] for key in ("champion", "champion_before", "code", "warnings")},
        "pairs_judged_through_the_alias": judged["pairs"],
        "points_in_logs": [one["points_in_log"] for one in synced[:3]],
        "sent_by_sync": [one["points_sent"] for one in synced],
        "missing_after_sync": sum(missing for missing, _ in compared),
        "extra_after_sync": sum(extra for _, extra in compared),
        "rows_of_runs_in_the_database": int(database.rows("select count(*) from runs")),
        "rows_of_metrics": int(database.rows("select count(*) from metrics")),
        "versions": database.rows("select version from model_versions order by version").split(),
        "aliases": database.rows("select alias, version from registered_model_aliases").split(),
    }


def gone_while(database: Postgres, run: Path) -> None:
    """End the database once a run trains."""
    while not (run / EVENT_LOG).is_file() or not any(line["kind"] == "epoch" for line in entries(run)):
        time.sleep(0.05)
    database.end()


def calls(uri: str) -> dict[str, float]:
    """Milliseconds of `log_batch`, and points a second in all."""
    client = MlflowClient(uri)
    experiment = client.create_experiment("calls")
    runs = [client.create_run(experiment).info.run_id for _ in range(THREADS)]

    def work(run: str) -> list[float]:
        took = []
        for call in range(CALLS):
            points = [Metric("loss", 0.5, 0, call * POINTS + n) for n in range(POINTS)]
            began = time.perf_counter()
            client.log_batch(run, metrics=points)
            took.append(1e3 * (time.perf_counter() - began))
        return took

    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        took = [ms for each in pool.map(work, runs) for ms in each]
    seconds = time.perf_counter() - began
    return {
        "median_ms": round(statistics.median(took), 1),
        "worst_ms": round(max(took), 1),
        "points_per_s": round(THREADS * CALLS * POINTS / seconds),
    }


if __name__ == "__main__":
    require_commit()
    main()
