from lapse._routing import Router

VIOLATIONS: dict[int, str]

class Protocol(Router): ...
