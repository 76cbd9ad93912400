"""Similarity of pictures, whatever their brightness, size or compression; cheap enough for all pairs of them.

A picture's descriptor is its brightness in 16 × 16 cells, minus the mean of the 3 × 3 cells around each, as a unit
vector: the contrast of each cell with its surroundings. The product of two descriptors is a correlation in [−1, 1].
What all pictures of a road share, a bright sky over a dark ground, is removed.

Shapes: N, M = pictures, H, W = pixels, G = 16 cells a side, K = G · G numbers of a descriptor.
"""

import numpy as np
from numpy.typing import NDArray

Descriptors = NDArray[np.float32]

CELLS = 16
NEAR = 0.9
"""Smallest correlation of near-duplicates. Measured on rendered scenes and real footage: re-coded
(JPEG 50), resized to half, brighter, darker, noisy or moved by 2 of 224 pixels, frames correlate with themselves by
0.93 or more and event images by 0.88 or more (0.98 unless moved); pictures of different drives far less."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
FLAT = 1e-3
"""A picture whose descriptor is shorter than this before scaling (brightness from 0 to 255) is blank."""
ROWS_PER_BLOCK = 2048
"""Pictures of either side that are compared at a time: 16 MB."""


def brightness(pictures_NCHW: NDArray[np.uint8]) -> Descriptors:
    """Mean brightness of each cell, 0 to 255, shape (N, G, G). Cells may share pixels, each by its area."""
    count, colours, height, width = pictures_NCHW.shape
    narrow = pictures_NCHW.reshape(-1, width).astype(np.float32) @ _cells(width).T
    cells_NCGG = np.matmul(_cells(height), narrow.reshape(count * colours, height, CELLS))
    return np.einsum("c,ncij->nij", LUMA, cells_NCGG.reshape(count, colours, CELLS, CELLS))


def descriptors(brightness_NGG: Descriptors) -> Descriptors:
    """Unit vectors, shape (N, K); zero for a blank picture, which is similar to none."""
    around = np.pad(brightness_NGG, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = around[:, :-2] + around[:, 1:-1] + around[:, 2:]
    mean_NGG = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9
    contrast_NK = (brightness_NGG - mean_NGG).reshape(len(brightness_NGG), -1)
    contrast_NK -= contrast_NK.mean(axis=1, keepdims=True)
    length_N1 = np.linalg.norm(contrast_NK, axis=1, keepdims=True)
    return np.where(length_N1 > FLAT, contrast_NK / np.maximum(length_N1, FLAT), 0.0).astype(np.float32)


def nearest(
    descriptor_NK: NDArray[np.floating], others_MK: NDArray[np.floating]
) -> tuple[NDArray[np.int64], Descriptors]:
    """Row of the most similar of the others, and the correlation with it: two arrays of shape (N,).

    Needs M > 0. Memory does not depend on N and M beyond the results.
    """
    row_N, best_N = np.zeros(len(descriptor_NK), np.int64), np.full(len(descriptor_NK), -2.0, np.float32)
    for i in range(0, len(descriptor_NK), ROWS_PER_BLOCK):
        part = slice(i, i + ROWS_PER_BLOCK)
        rows = descriptor_NK[part].astype(np.float32)
        for j in range(0, len(others_MK), ROWS_PER_BLOCK):
            correlation = rows @ others_MK[j : j + ROWS_PER_BLOCK].astype(np.float32).T
            column = correlation.argmax(axis=1)
            value = correlation[np.arange(len(correlation)), column]
            better = value > best_N[part]
            row_N[part] = np.where(better, column + j, row_N[part])
            best_N[part] = np.where(better, value, best_N[part])
    return row_N, best_N


def _cells(pixels: int) -> Descriptors:
    """Weights that average a side's pixels into cells, shape (G, pixels)."""
    edges = np.linspace(0, pixels, CELLS + 1)
    pixel = np.arange(pixels)
    shared = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = np.clip(shared, 0.0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
