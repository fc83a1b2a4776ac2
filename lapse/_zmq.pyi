OLDEST: tuple[int, int, int]
libzmq_version: tuple[int, int, int]
