"""The compiled modules: every .pyx below lapse/ and apps/. All that is not about compiling stands in pyproject.toml.

A wheel has the applications in lapse/_bundled/apps, whole, and no package `apps`: see lapse/programs.py.

Environment: LAPSE_BUILD  release (default), debug, asan, tsan or fuzz (by tools/fuzz.py)
             LAPSE_ROOTS  which folders to build, default "lapse apps"; `make` names those that it needs here, in place
             LAPSE_WERROR warnings of the C compiler are errors (set by `make`, not for users)
"""
import contextlib
import fcntl
import os
import shutil
import sys
from pathlib import Path

import Cython
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

COMMON = ["-fno-strict-aliasing", "-fvisibility=hidden", "-pthread"]
KINDS = {
    "release": ["-O3", "-g1"],
    "debug": ["-O0", "-g3"],
    "asan": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
             "-fno-sanitize=nonnull-attribute"],        # copying no bytes to or from NULL is no error (C2y says so too)
    # By clang; what the runtimes are in comes with the program (tools/fuzz.py).
    "fuzz": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=undefined",
             "-fno-sanitize=nonnull-attribute,function"],
    # It does not see fences; ours order atomics only, which it never reports.
    "tsan": ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=thread", "-Wno-tsan"],
}
KIND = os.environ.get("LAPSE_BUILD") or "release"
if KIND not in KINDS:
    sys.exit(f"LAPSE_BUILD={KIND}: must be one of {', '.join(KINDS)}")
FLAGS = COMMON + KINDS[KIND]
DEBUG = KIND != "release"
# Warnings do not change the code, so they are no part of the recipe. The exceptions are what Cython's own code trips over.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-unused-function",
            "-Wno-cast-function-type"] + ["-Werror"] * bool(os.environ.get("LAPSE_WERROR"))
MACROS = {"LAPSE_DEBUG": str(int(DEBUG)), "LAPSE_BUILD_KIND": f'"{KIND}"', "LAPSE_BUILD_FLAGS": f'"{" ".join(FLAGS)}"',
          "NPY_NO_DEPRECATED_API": "NPY_1_7_API_VERSION"}
DIRECTIVES = {"language_level": 3, "boundscheck": DEBUG, "wraparound": False, "cdivision": True, "initializedcheck": DEBUG,
              "embedsignature": True, "embedsignature.format": "python", "show_performance_hints": not DEBUG}


BUNDLE = "lapse/_bundled"
BUNDLED = ("apps/**/*.py", "apps/data/*/*")


def extensions():
    found = [path for root in os.environ.get("LAPSE_ROOTS", "lapse apps").split() for path in sorted(Path(root).rglob("*.pyx"))]
    return [Extension(".".join(path.with_suffix("").parts), [str(path)], define_macros=list(MACROS.items()),
                      extra_compile_args=FLAGS + WARNINGS,
                      extra_link_args=["-pthread"] + [flag for flag in FLAGS if flag.startswith("-fsanitize")])
            for path in found]


class Build(build_ext):
    """Runs Cython first; one recipe file per place that is built in, newer than whatever another recipe has made there."""

    def finalize_options(self):
        super().finalize_options()
        self.in_tree = self.inplace     # (setuptools' run() resets the latter for a while)
        if self.in_tree:
            self.build_lib = "build/inplace"
        self.build_temp = f"{self.build_lib}.work"
        self.parallel = self.parallel or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else "12")

    def get_ext_fullpath(self, ext_name):
        """Where a module goes: those of the applications into the bundle, when a wheel is built."""
        path = super().get_ext_fullpath(ext_name)
        if self.in_tree or not ext_name.startswith("apps."):
            return path
        return str(Path(self.build_lib, BUNDLE, Path(path).relative_to(self.build_lib)))

    def run(self):
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with Path(self.build_temp, "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)       # two builds of one place at once: the second waits and finds it all done
            super().run()

    def build_extensions(self):
        import numpy
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError
        recipe, c_code = Path(self.build_temp, "recipe"), Path(self.build_temp, "c")
        text = "\n".join([sys.version, Cython.__version__, numpy.__version__, os.environ.get("CFLAGS", ""),
                          str(self.compiler.compiler_so), *FLAGS, *map(str, MACROS.items()), *map(str, DIRECTIVES.items())])
        if not recipe.exists() or recipe.read_text() != text:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(c_code)
            recipe.write_text(text)
        try:
            done = cythonize(self.extensions, build_dir=str(c_code), compiler_directives=DIRECTIVES, nthreads=self.parallel,
                             include_path=["."], quiet=True)
        except CompileError:
            sys.exit("setup.py: Cython found errors, see above")
        cythonized = {extension.name: extension for extension in done}
        for extension in self.extensions:
            extension.sources = cythonized[extension.name].sources
            extension.extra_compile_args = cythonized[extension.name].extra_compile_args     # with those of its own
            extension.depends = [str(recipe)]
            extension.include_dirs = [numpy.get_include()]
        super().build_extensions()


class Project(Distribution):
    def iter_distribution_names(self):
        """What top_level.txt says that the wheel has."""
        return (name for name in super().iter_distribution_names() if not name.startswith("apps."))


class Bundle(build_py):
    """Adds the applications and their small data, which are no package, to a wheel; an editable install finds them in the tree."""

    def bundled(self):
        """{file in the tree: its place}"""
        found = {path for pattern in BUNDLED for path in Path().glob(pattern) if path.is_file() and path.suffix != ".cache"}
        return {} if self.editable_mode else {str(path): str(Path(self.build_lib, BUNDLE, path)) for path in sorted(found)}

    def run(self):
        super().run()
        for source, target in self.bundled().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target, preserve_mode=False)

    def get_outputs(self, include_bytecode=True):
        return super().get_outputs(include_bytecode) + list(self.bundled().values())

    def get_output_mapping(self):
        return super().get_output_mapping() | {target: source for source, target in self.bundled().items()}


setup(ext_modules=extensions(), distclass=Project, cmdclass={"build_ext": Build, "build_py": Bundle})
