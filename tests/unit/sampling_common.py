"""What the tests of sampling share; the fixture `sampler` is in conftest.py."""
import numpy as np

ERR_NO_SAMPLING, ERR_SAMPLE, ERR_SAMPLE_COUNT, ERR_DRAW = -12, -13, -14, -15       # as in _types.pxd
SCHEMES = ["naive", "preloc", "pool", "local"]
Z = 3.72                                # one in 10,000, with fixed seeds
K = 50


def pulled(kv, n, piece=1000):
    """n draws, through pull_sample; each value is checked."""
    sample = kv.prepare_sample(n)
    keys = np.empty(n, np.int64)
    vals = np.full((n, 2), -1.0)
    for at in range(0, n, piece):
        assert kv.pull_sample(sample, keys[at:at + piece], vals[at:at + piece]) == -1
    assert (vals == keys[:, None]).all()
    return keys


def counted(keys, low=0, high=K):
    assert keys.min() >= low and keys.max() < high
    return np.bincount(keys - low, minlength=high - low)
