kind: str
flags: str
compiler: str
debug: bool
