"""The vectors in files: in the word2vec formats, and as a checkpoint.

A checkpoint is a folder with input.npy and output.npy (a row per word), and vocabulary.txt, whose lines name the words of the rows.
"""
import os
import shutil
from pathlib import Path

import numpy as np

from apps.common.files import InputError, whole_file
from apps.w2v.text import read_vocabulary, write_vocabulary

__all__ = ["read_checkpoint", "write_checkpoint", "write_vectors"]

BLOCK = 1024                    # words at a time


def write_vectors(path, vocabulary, pull, dim, binary):
    """Write the input vectors as the C program does, completely or not at all: a line with the number of words and numbers per vector,
    then each word with its vector, as float32 (little-endian) or in decimal. pull(begin, end) returns these words' vectors."""
    words = len(vocabulary)
    with whole_file(path) as file:
        file.write(b"%d %d\n" % (words, dim))
        for begin in range(0, words, BLOCK):
            end = min(begin + BLOCK, words)
            values = pull(begin, end).astype("<f4")
            if binary:
                rows = [vocabulary.word(begin + i) + b" " + row.tobytes() + b"\n" for i, row in enumerate(values)]
            else:
                rows = [vocabulary.word(begin + i) + b" " + b" ".join([b"%.9g" % x for x in row]) + b"\n"
                        for i, row in enumerate(values.tolist())]
            file.write(b"".join(rows))


def _write_npy(path, pull, words, dim, dtype):
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                                                    "shape": (words, dim)})
        for begin in range(0, words, BLOCK):
            file.write(pull(begin, min(begin + BLOCK, words)).tobytes())


def write_checkpoint(folder, epoch, vocabulary, pull, dim, dtype):
    """Write FOLDER/epoch-N, completely or not at all. pull(which, begin, end): 0 the input vectors of these words, 1 the output vectors."""
    folder = Path(folder) / f"epoch-{epoch}"
    part, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for which, name in enumerate(("input.npy", "output.npy")):
            _write_npy(part / name, lambda begin, end, which=which: pull(which, begin, end), len(vocabulary), dim, dtype)
        write_vocabulary(part / "vocabulary.txt", vocabulary)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(part, folder)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(folder)            # a full disk does not say where, and what it says of `part` is of no use: it goes
            if error.filename2 is not None:
                del error.filename2
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _newest(folder):
    """The folder of the last epoch in a folder of checkpoints, or the folder itself."""
    epochs = [(int(path.name[6:]), path) for path in folder.glob("epoch-*") if path.name[6:].isdigit()]
    return max(epochs)[1] if epochs else folder


def read_checkpoint(path, vocabulary, dim):
    """Return (input vectors, output vectors), mapped, of a checkpoint or of the last one in a folder. InputError when it is not of
    this vocabulary and dimension."""
    folder = _newest(Path(path))
    if not folder.is_dir():
        raise InputError(f"--init_model {path}: there is no such folder")
    theirs = read_vocabulary(folder / "vocabulary.txt", 1)
    if len(theirs) != len(vocabulary):
        raise InputError(f"{folder} is a checkpoint of {len(theirs)} words, but the vocabulary has {len(vocabulary)} here")
    for i in range(len(vocabulary)):
        if theirs.word(i) != vocabulary.word(i):
            raise InputError(f"{folder}/vocabulary.txt:{i + 1}: the word is {theirs.word(i).decode(errors='replace')}, but "
                             f"{vocabulary.word(i).decode(errors='replace')} in the vocabulary here")
    found = []
    for name in "input.npy", "output.npy":
        file = folder / name
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise InputError(f"{file}: {error.strerror or error}") from None
        except (ValueError, EOFError):
            raise InputError(f"{file} is not a whole .npy file of numbers") from None
        if array.ndim != 2 or array.dtype.kind != "f" or len(array) != len(vocabulary):
            raise InputError(f"{file} does not have a row of numbers for each of {len(vocabulary)} words")
        if array.shape[1] != dim:
            raise InputError(f"{file} has vectors of {array.shape[1]} numbers, but --embed_dim is {dim}")
        found.append(array)
    return found
