"""The settings of `Server.enable_sampling_support`, checked."""
from __future__ import annotations

import operator

import numpy as np

from lapse._schemes import Sampling
from lapse.errors import KeyRangeError

__all__ = ["DISTRIBUTIONS", "SCHEMES", "checked_sampling"]

SCHEMES = ("naive", "preloc", "pool", "local")
DISTRIBUTIONS = ("uniform", "log-uniform")
MAX_GROUP = 2**24           # keys of a group
MAX_USES = 2**28            # uses of a group's draws


def checked_sampling(protocol, num_keys: int, *, scheme, with_replacement, distribution, low, high, seed, group_size, reuse, postpone,
                     batch_size) -> Sampling:
    """Make what the Workers of a node share; ValueError, TypeError or KeyRangeError when a setting is wrong."""
    scheme = "local" if scheme == "onlylocal" else scheme
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise ValueError(f"unknown sampling scheme {scheme!r}: it is one of {', '.join(SCHEMES)} (= onlylocal)")
    with_replacement = _truth("with_replacement", with_replacement)
    postpone = _truth("postpone", postpone)
    low = _whole("min", low)
    high = num_keys if high is None else _whole("max", high)
    if not 0 <= low < num_keys:
        raise KeyRangeError(f"min is {low}: it must be a key, in [0, {num_keys})")
    if high > num_keys:
        raise KeyRangeError(f"max is {high}: samples are drawn below it, and there are {num_keys} keys")
    if low >= high:
        raise ValueError(f"there is nothing to draw in [{low}, {high})")
    if seed is not None:
        seed = _whole("seed", seed)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), not {seed}")
    group_size = _count("group_size", group_size, MAX_GROUP)
    reuse = _count("reuse", reuse, MAX_USES // group_size)
    batch_size = _count("batch_size", batch_size, MAX_USES)
    return Sampling(protocol, scheme, with_replacement, _distribution(distribution, high - low), low, high, seed=seed,
                    group_size=group_size, reuse=reuse, postpone=postpone, batch_size=batch_size)


def _whole(name: str, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None


def _count(name: str, value, most: int) -> int:
    value = _whole(name, value)
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be in [1, {most}], not {value}")
    return value


def _truth(name: str, value) -> bool:
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, not {value!r}")


def _distribution(distribution, span: int):
    """A name, a callable, or float64 weights."""
    if isinstance(distribution, str):
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"unknown distribution {distribution!r}: it is one of {', '.join(DISTRIBUTIONS)}, an array of weights "
                             "or a callable")
        return distribution
    if callable(distribution):
        return distribution
    if hasattr(distribution, "detach"):
        distribution = distribution.detach().cpu().numpy()
    try:
        weights = np.asarray(distribution)
        if weights.dtype.kind not in "iuf":
            raise TypeError
        weights = weights.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"distribution must be a name, an array of weights or a callable, not {distribution!r}") from None
    if weights.shape != (span,):
        raise ValueError(f"distribution must have {span} weights, one for each key in [min, max), not shape {weights.shape}")
    if span >= 2**32:
        raise ValueError("distribution has 2**32 weights or more")
    with np.errstate(over="ignore", invalid="ignore"):
        total = weights.sum()
    if not ((weights >= 0).all() and 0 < total < np.inf):
        raise ValueError("weights must be finite numbers, at least 0, and not all 0")
    return weights
