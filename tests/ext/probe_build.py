"""Compile a small Cython module that tests or measures the C level, out of tree, into build/ext.

It is compiled against the `lapse` package that Python imports (its .pxd files) and rebuilt when a source, a .pxd or the
recipe has changed. The package's own modules must have been built before.
"""
import fcntl
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

from lapse._build import kind

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "ext"
DIRECTIVES = {"language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True, "initializedcheck": False}
SANITIZERS = {"asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}      # as the package: it inlines latches
FLAGS = ["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-cast-function-type"]


def _stamp(source, flags):
    h = hashlib.sha256(repr((sys.version, DIRECTIVES, flags)).encode())
    for path in [source, *sorted((ROOT / "lapse").glob("*.pxd"))]:
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def load_extension(source, name=None):
    """Build `source` (.pyx) if needed and import it; extra flags come from LAPSE_PROBE_CFLAGS."""
    source = Path(source).resolve()
    name = name or source.stem
    flags = FLAGS + SANITIZERS.get(kind, []) + os.environ.get("LAPSE_PROBE_CFLAGS", "").split()
    folder = BUILT / _stamp(source, flags)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # several processes of tests at once: the second one finds it done
        found = list(folder.glob(f"{name}.*.so")) or _build(source, name, folder, flags)
    spec = importlib.util.spec_from_file_location(name, found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(source, name, folder, flags):
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    extension = Extension(name, [str(source)], extra_compile_args=flags, extra_link_args=flags)
    modules = cythonize([extension], include_path=[str(ROOT)], compiler_directives=DIRECTIVES, build_dir=str(folder / "c"), quiet=True)
    distribution = Distribution({"name": name, "ext_modules": modules})
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder / "o")
    command.ensure_finalized()
    command.run()
    return list(folder.glob(f"{name}.*.so"))
