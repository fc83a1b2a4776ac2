"""What the workers of all applications do in the same way: check the kernel's codes, count a node's accesses, say what came of it."""
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Accesses", "Trained", "TrainingWorker", "seed_of"]


@dataclass
class Trained:
    """What came of the training."""

    epochs: list = field(default_factory=list)
    stopped: bool = False               # --max_runtime has passed


class TrainingWorker:
    """One worker thread of an application: its lapse.Worker `kv`, the server of its node, and its number `me` in the job."""

    def __init__(self, kv, server, me, args):
        self.kv, self.server, self.me, self.args = kv, server, me, args
        self.first_of_node = me % args.num_threads == 0

    def check(self, result):
        """Raise what a code of the kernel stands for, or return the result."""
        if result < 0:
            self.kv.waitall()
            self.server.is_local([0])           # raises when the job has failed or ended
            raise RuntimeError(f"the kernel ended with code {result}")
        return result


class Accesses:
    """What the parameters of a node were asked for since this was made."""

    def __init__(self, server):
        self.server, self.before = server, server.stats()

    def told(self):
        """Return the pulls and pushes, those found here at once, those that another node was asked for, and the arrivals, by name."""
        after = self.server.stats()
        changes = [(after.pulled, self.before.pulled), (after.pushed, self.before.pushed)]
        return {"local": sum(now.local - then.local for now, then in changes),
                "remote": sum(now.remote - then.remote for now, then in changes),
                "accesses": sum(now.total - then.total for now, then in changes),
                "relocations": after.relocated_in - self.before.relocated_in}


def seed_of(*numbers):
    """Return a seed of 64 bits made of these."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
