"""Code of the MLflow model: MLflow runs it, from the model's own copy, when a model is saved or loaded."""

import warnings
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

import ray_app

# MLflow asks for types of `predict`, which would replace the signature; it shows this whatever the filters say.
with warnings.catch_warnings(record=True):

    class AlignmentPythonModel(PythonModel):
        """Event features in, aligned features out: rows (B, E) to (B, D), as the endpoint answers."""

        def load_context(self, context: PythonModelContext) -> None:
            """Load the checkpoint, verified against its checksums."""
            self.model = ray_app.load(context.artifacts["checkpoint"])

        def predict(self, context, model_input, params=None) -> Any:  # type: ignore[no-untyped-def]  # noqa: ARG002
            """Return aligned features, float32. InputError: `ray_app.AlignmentModel.align` refuses the events."""
            return self.model.align(model_input)


set_model(AlignmentPythonModel())
