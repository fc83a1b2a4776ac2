"""The factors in files: W.npy (rows x rank) and H.npy (rank x columns), and both as Matrix Market arrays; W @ H approximates the matrix."""
from pathlib import Path

import numpy as np

from apps.common.files import InputError, whole_file
from apps.mf.data import read_array

__all__ = ["OUTPUTS", "read_factors", "write_factors"]

OUTPUTS = ("W.npy", "H.npy", "W.mma", "H.mma")

BLOCK = 1024                    # parameters at a time


def read_factors(folder, layout, rank):
    """Return the matrices rows x rank and columns x rank out of W.mma and H.mma (rank x columns) of a folder."""
    found = []
    for name, shape in ("W.mma", (layout.rows, rank)), ("H.mma", (rank, layout.cols)):
        path = Path(folder) / name
        matrix = read_array(path)
        if matrix.shape != shape:
            raise InputError(f"{path} is a matrix of {matrix.shape[0]} x {matrix.shape[1]}, but here it has to be {shape[0]} x {shape[1]}")
        found.append(matrix)
    return found[0], found[1].T


def _write_npy(path, pull, begin, end, rank, dtype, transposed):
    shape = (rank, end - begin) if transposed else (end - begin, rank)
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": transposed,
                                                    "shape": shape})
        for at in range(begin, end, BLOCK):
            file.write(pull(at, min(at + BLOCK, end)).tobytes())


def _write_mma(path, npy):
    matrix = np.load(npy, mmap_mode="r")
    with whole_file(path) as file:
        file.write(f"%%MatrixMarket matrix array real general\n{matrix.shape[0]} {matrix.shape[1]}\n".encode())
        for column in matrix.T:         # Matrix Market goes by columns
            file.write("".join([f"{value!s}\n" for value in column.tolist()]).encode())


def write_factors(folder, pull, layout, rank, dtype):
    """Write the four files, each completely or not at all. pull(begin, end) returns the parameters of these keys as a matrix."""
    folder = Path(folder)
    _write_npy(folder / "W.npy", pull, 0, layout.rows, rank, dtype, False)
    _write_npy(folder / "H.npy", pull, layout.column_key, layout.column_key + layout.cols, rank, dtype, True)
    for name in "W", "H":
        _write_mma(folder / f"{name}.mma", folder / f"{name}.npy")
