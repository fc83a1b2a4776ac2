"""The model in files: a folder epoch-<n> with what is needed to use it, and to go on training.

entities.npy is [entities, dim]; relations.npy [relations, dim], for RESCAL [relations, dim, dim]. ComplEx: the real half of a vector
first, then the imaginary half. entity_sums.npy and relation_sums.npy are AdaGrad's sums of squared gradients, of the same shapes;
entity_ids.del and relation_ids.del name what the lines stand for; checkpoint.json says what model it is. The folder gets its name when
all is in it.
"""
import json
import os
import shutil
from pathlib import Path

import numpy as np

from apps.common.files import InputError

__all__ = ["Checkpoint", "write_checkpoint"]

KINDS = ("entities", "relations")
SUMS = ("entity_sums", "relation_sums")
IDS = ("entity_ids.del", "relation_ids.del")
VERSION = 1


def describe(layout):
    """What a checkpoint has to be the same in, to be of use for this model."""
    return {"algorithm": "RESCAL" if layout.rescal else "ComplEx", "embed_dim": layout.dim, "num_entities": layout.entities,
            "num_relations": layout.relations}


def _shape(layout, kind):
    return layout.relation_shape if kind else (layout.entities, layout.dim)


def _write_arrays(folder, layout, dtype, pull):
    files = {}
    try:
        for kind in (0, 1):
            for name in KINDS[kind], SUMS[kind]:
                files[name] = (folder / f"{name}.npy").open("wb")
                np.lib.format.write_array_header_1_0(files[name], {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                                                                   "fortran_order": False, "shape": _shape(layout, kind)})
        for block in layout.blocks():
            for name, values in zip((KINDS[block[0]], SUMS[block[0]]), pull(*block)):
                files[name].write(values.tobytes())
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()


def _write_ids(path, source, count):
    if source.exists():
        shutil.copyfile(source, path)
    else:
        path.write_text("".join([f"{number}\t{number}\n" for number in range(count)]))


def write_checkpoint(folder, epoch, layout, dtype, data, pull):
    """Write the folder epoch-<epoch> in `folder`, in the place of what has that name, completely or not at all.

    data: the folder of the data, for the ids. pull(kind, begin, end) returns the numbers of a block and the sums beside them. OSError,
    with a file name, when it cannot be written.
    """
    final = Path(folder) / f"epoch-{epoch}"
    part, old = final.with_name(f"{final.name}.part"), final.with_name(f"{final.name}.old")
    try:
        for left in part, old:
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        _write_arrays(part, layout, dtype, pull)
        for name, count in zip(IDS, (layout.entities, layout.relations)):
            _write_ids(part / name, Path(data) / name, count)
        meta = {"version": VERSION, **describe(layout), "epoch": epoch, "dtype": str(np.dtype(dtype))}
        (part / "checkpoint.json").write_text(json.dumps(meta, indent=1) + "\n")
        if final.exists():
            final.rename(old)
        part.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(final)         # a full disk does not say where
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not final.exists():
            old.rename(final)
        raise


class Checkpoint:
    """A folder that write_checkpoint has written. InputError for anything else, and for another model than the layout's."""

    def __init__(self, folder, layout):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "checkpoint.json").read_text())
            epoch = self.meta["epoch"]
        except OSError as error:
            raise InputError(f"--init_model {folder}: no checkpoint, checkpoint.json: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"--init_model {folder}: its checkpoint.json is none of this program") from None
        if self.meta.get("version") != VERSION or not isinstance(epoch, int) or epoch < 0:
            raise InputError(f"--init_model {folder}: its checkpoint.json is none of this version of the program")
        for name, here in describe(layout).items():
            if self.meta.get(name) != here:
                raise InputError(f"--init_model {folder}: its {name} is {self.meta.get(name)}, but here it is {here}")
        self.epoch, self.arrays = epoch, []
        for kind in (0, 1):
            pair = []
            for name in KINDS[kind], SUMS[kind]:
                path = self.folder / f"{name}.npy"
                try:
                    array = np.load(path, mmap_mode="r")
                except OSError as error:
                    raise InputError(f"{path}: {error.strerror or error}") from None
                except (ValueError, EOFError):
                    raise InputError(f"{path} is no complete array") from None
                if array.shape != _shape(layout, kind) or array.dtype not in (np.float32, np.float64):
                    raise InputError(f"{path} is of {array.shape} {array.dtype}, but {_shape(layout, kind)} floats are needed")
                pair.append(array)
            self.arrays.append(pair)

    def read(self, kind, begin, end, dtype):
        """Return the numbers of a block and the sums beside them: [rows, numbers] twice."""
        return tuple(np.ascontiguousarray(array[begin:end].reshape(end - begin, -1), dtype=dtype) for array in self.arrays[kind])
