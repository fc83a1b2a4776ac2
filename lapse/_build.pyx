"""How this copy of Lapse was compiled: the kind of build, the flags, the compiler.

Design: constants of the compiled code itself, so that they cannot be out of date.
"""

kind: str = BUILD_KIND.decode()            # release, debug, asan or tsan
flags: str = BUILD_FLAGS.decode()
compiler: str = COMPILER.decode()
debug: bool = bool(DEBUG)
