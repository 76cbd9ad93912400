"""Datatypes that the client and the endpoint exchange, by the names of the Open Inference Protocol v2."""

from typing import Literal

Datatype = Literal["UINT8", "FP16", "BF16", "FP32"]
V2_DATATYPES: dict[str, Datatype] = {"uint8": "UINT8", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
"""Protocol names by numpy's and torch's; numpy has bfloat16 from the package ml_dtypes."""
