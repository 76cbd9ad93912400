"""A checkpoint as an MLflow model, in MLflow's models-from-code form: no pickle is written or read.

    model/  MLmodel  alignment_model.py  requirements.txt  input_example.json  …
    model/checkpoint/  config.json  model.safetensors  …  MANIFEST.sha256

The weights are the checkpoint's own files, with their checksums; `alignment_model.py` loads them by `ray_app.load`.
"""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types.schema import Schema, TensorSpec
from numpy.typing import NDArray

from ray_app.store.manifest import CheckpointDocument, FeatureSpec

CHECKPOINT_FOLDER = "checkpoint"
"""Folder of the model with the checkpoint."""
CODE = Path(__file__).with_name("alignment_model.py")
REQUIREMENTS = ("ray-app", "torch", "numpy")
"""Packages that the model's environment needs, in the versions of this one."""


def write_mlflow_model(checkpoint: Path, folder: Path, run_id: str) -> Model:
    """Write the files of an MLflow model but the checkpoint's own into the new `folder`."""
    features = CheckpointDocument.model_validate_json((checkpoint / "config.json").read_bytes()).features
    model = Model(run_id=run_id, artifact_path="model")
    pyfunc.save_model(
        folder,
        python_model=CODE,
        mlflow_model=model,
        signature=ModelSignature(Schema([tensor_spec(features.event)]), Schema([output_spec(features.target)])),
        input_example=example(features.event),
        pip_requirements=[f"{name}=={installed}" for name in REQUIREMENTS if (installed := installed_version(name))],
    )
    saved = Model.load(str(folder))
    saved.flavors[pyfunc.FLAVOR_NAME] |= {
        "artifacts": {"checkpoint": {"path": CHECKPOINT_FOLDER, "uri": CHECKPOINT_FOLDER}},  # the weights: not copied
        "model_code_path": CODE.name,
    }
    saved.model_size_bytes = (saved.model_size_bytes or 0) + sum(file.stat().st_size for file in checkpoint.iterdir())
    saved.save(str(folder / "MLmodel"))
    return saved


def tensor_spec(spec: FeatureSpec) -> TensorSpec:
    """Flat rows (B, E) in the type that the endpoint takes: uint8 pixels, or float32 features."""
    return TensorSpec(np.dtype("uint8" if spec.dtype == "uint8" else "float32"), (-1, spec.width))


def output_spec(spec: FeatureSpec) -> TensorSpec:
    """Flat rows (B, D) of aligned features."""
    return TensorSpec(np.dtype("float32"), (-1, spec.width))


def example(spec: FeatureSpec) -> NDArray[Any]:
    """One row of the right type: a white picture without events, or numbers from −1 to 1."""
    if spec.dtype == "uint8":
        return np.full((1, spec.width), 255, np.uint8)
    return np.linspace(-1, 1, spec.width, dtype=np.float32).round(2)[None]


def installed_version(package: str) -> str | None:
    """Return a package's version without a local part such as +cpu; None if it is not installed."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None


def history_tag(model: Model) -> dict[str, str]:
    """Return the tag of a run by which MLflow's page shows its artifact folder as a model."""
    return {"mlflow.log-model.history": json.dumps([model.get_tags_dict()])}
