"""What one worker of the job does: start, iterations over its part of the text, what all of them tell each other."""
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
from apps.w2v._kernel import Trainer

from apps.common.exchange import Exchange
from apps.common.program import TrainingError
from apps.common.training import Accesses, Trained, TrainingWorker, seed_of

__all__ = ["SUMS", "Diverged", "IterationResult", "Job", "run_worker"]

SUMS = ("words", "read", "trained", "pairs", "targets", "loss", "seconds", "cpu_seconds", "stop", "local", "accesses", "relocations")
BLOCK = 1024                    # words whose vectors get their start in one call
SLICE = 0.2                     # seconds of training between two looks at the clock
PROGRESS = 5.0                  # seconds between two lines about the progress


class Diverged(TrainingError):
    """The vectors are no numbers any more."""


@dataclass
class Job:
    """What all workers of a node share."""

    args: object
    vocabulary: object
    places: np.ndarray              # keys of the input and output vectors, two per word
    text: object
    ranges: list                    # of the text, one per worker of the node
    workers: int                    # of the job
    checkpoint: object              # input and output vectors to start from, or None
    write_checkpoint: object = None         # called with a Worker and an iteration's number, or None


@dataclass
class IterationResult:
    """One line of the report."""

    epoch: int
    seconds: float                  # of the slowest worker
    total_seconds: float            # since the start of the training
    words: int                      # of the text that were read, all of them
    trained: int                    # of the vocabulary, left by subsampling
    pairs: int
    words_per_second: float
    words_per_cpu_second: float
    loss: float                     # of a pair: -log sigmoid, 1 + negative times the mean over right words and those drawn
    alpha: float                    # at the end
    local_share: float              # of the parameters that were used
    relocations: int

    def line(self):
        return (f"epoch {self.epoch}: {self.seconds:.3f} s, loss {self.loss:.6g}, {self.words_per_second:.0f} words/s, "
                f"{self.trained} of {self.words} words left by subsampling, alpha {self.alpha:.6g}, {100 * self.local_share:.2f} % local, "
                f"{self.relocations} relocations")


class _Worker(TrainingWorker):
    def __init__(self, kv, server, me, job):
        args = job.args
        super().__init__(kv, server, me, args)
        self.job, self.dtype = job, np.dtype(args.dtype)
        self.number = me % args.num_threads             # in the node
        self.trainer = Trainer(kv, job.vocabulary, job.places, dim=args.embed_dim, double_precision=self.dtype == np.float64,
                               window=args.window, negative=args.negative, subsample=args.subsample, alpha=args.starting_alpha,
                               seed=seed_of(args.seed, me), ahead=args.prep_context_ahead, peek=args.peek_ahead,
                               localize=args.localize_pos and server.num_nodes > 1, sync_push=args.sync_push,
                               replacement=args.sampling_with_replacement)
        self.exchange = Exchange(kv, me, job.workers, args.num_keys, args.embed_dim, self.dtype, SUMS)

    def start(self):
        """Give the vectors of this worker's blocks of words their start: the same for any number of workers."""
        args, job = self.args, self.job
        words, dim = len(job.vocabulary), args.embed_dim
        if args.init_model == "none":
            return
        for block in range(self.me, -(-words // BLOCK), job.workers):
            begin, end = block * BLOCK, min((block + 1) * BLOCK, words)
            if job.checkpoint is None:
                random = np.random.default_rng([args.model_seed, block])
                self.set(0, begin, args.init_scale * (2 * random.random((end - begin, dim)) - 1) / dim)
            else:
                for which in 0, 1:
                    self.set(which, begin, job.checkpoint[which][begin:end])

    def set(self, which, begin, values):
        keys = self.job.places[2 * begin + which:2 * (begin + len(values)):2]
        self.kv.set(np.ascontiguousarray(keys), np.ascontiguousarray(values, dtype=self.dtype))

    def train(self, epoch, deadline):
        """Train on this worker's range once, or until the deadline; return what there is to tell the others. Collective."""
        args, job, trainer = self.args, self.job, self.trainer
        iterations = max(args.num_iterations, 1)
        share = None if args.data_words is None else -(-args.data_words // job.workers)
        trainer.begin_iteration(job.text.fd, *job.ranges[self.number], (epoch - 1) / iterations, 1 / iterations, share)
        self.kv.barrier()
        accesses = Accesses(self.server) if self.first_of_node else None
        start, cpu = time.monotonic(), time.process_time()
        done = self.run(epoch, start, deadline)
        self.kv.waitall()
        self.kv.barrier()
        told = {name: getattr(trainer, name) for name in ("words", "read", "trained", "pairs", "targets", "loss")}
        told |= {"seconds": time.monotonic() - start,
                 "stop": not done or (epoch < args.num_iterations and time.monotonic() >= deadline)}
        if self.first_of_node:
            told["cpu_seconds"] = time.process_time() - cpu
            told |= accesses.told()
        return told

    def run(self, epoch, start, deadline):
        """Train in slices, between which there is time for a look at the clock and a line about the progress. Return whether it was all
        of the range."""
        trainer, said, words = self.trainer, start, 1000
        while True:
            began, read = time.monotonic(), trainer.read
            if self.check(trainer.train(words)) == 0:
                return True
            now = time.monotonic()
            if now >= deadline or not math.isfinite(trainer.loss):
                self.check(trainer.give_up())
                return False
            words = min(max(int((trainer.read - read) / max(now - began, 1e-6) * SLICE), 100), 2 * words)
            if self.me == 0 and self.args.debug_mode > 1 and now - said >= PROGRESS:
                said = now
                local = self.server.stats().pulled.local_share
                loss = trainer.loss / max(trainer.targets, 1) * (1 + self.args.negative)
                sys.stdout.write(f"epoch {epoch}: {now - start:.0f} s, worker 0 has read {trainer.read} words "
                                 f"({trainer.read / (now - start):.0f} words/s), alpha {trainer.learning_rate:.6g}, loss {loss:.6g}, "
                                 f"{100 * local:.2f} % local\n")
                sys.stdout.flush()


def _result(epoch, told, alpha, negative, started):
    """What all workers together have told."""
    total = {name: float(values.sum()) for name, values in told.items()}
    seconds = float(told["seconds"].max())
    loss = total["loss"] / total["targets"] * (1 + negative) if total["targets"] else math.nan
    if total["targets"] and not math.isfinite(loss):
        raise Diverged(f"the vectors have diverged in epoch {epoch} (the loss is {loss}); a smaller --starting_alpha may help")
    return IterationResult(epoch, seconds, time.monotonic() - started, int(total["read"]), int(total["trained"]), int(total["pairs"]),
                           total["read"] / max(seconds, 1e-9), total["read"] / max(total["cpu_seconds"], 1e-9), loss, alpha,
                           total["local"] / total["accesses"] if total["accesses"] else 1.0, int(total["relocations"]))


def run_worker(kv, server, me, job, report):
    """Train; return a Trained. `report(IterationResult)` is called in the first worker of the job. Collective."""
    worker = _Worker(kv, server, me, job)
    args, trained = job.args, Trained()
    kv.begin_setup()
    worker.start()
    kv.end_setup()
    started = time.monotonic()
    deadline = math.inf if args.max_runtime is None else started + args.max_runtime
    for epoch in range(1, args.num_iterations + 1):
        told = worker.exchange(**worker.train(epoch, deadline))
        result = _result(epoch, told, worker.trainer.learning_rate, args.negative, started)
        trained.epochs.append(result)
        if me == 0:
            report(result)
            if job.write_checkpoint:
                job.write_checkpoint(kv, epoch)
        if told["stop"].any():
            trained.stopped = True
            break
    return trained
