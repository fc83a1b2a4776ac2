"""What one worker of the job does: start, epochs, losses.

The loss is that of the C++ program: the mean of the squared residuals plus lambda (|W|^2 + |H|^2) per training cell. Every worker
computes the residuals of the cells of its own rows, block of columns by block of columns, and the rest from its own parameters; then
all workers exchange their sums through parameters of their own, and each draws the same conclusions.
"""
import math
import time
from dataclasses import dataclass

import numpy as np
from apps.mf._kernel import Trainer

from apps.common.exchange import Exchange
from apps.common.program import TrainingError
from apps.common.training import Accesses, Trained, TrainingWorker, seed_of

__all__ = ["ALGORITHMS", "SUMS", "Diverged", "EpochResult", "run_worker"]

SUMS = ("train_squares", "test_squares", "norms", "train_cells", "test_cells", "points", "seconds", "cpu_seconds", "stop", "local",
        "accesses", "relocations")


class Diverged(TrainingError):
    """The factors are no numbers any more."""


@dataclass
class EpochResult:
    """One line of the report; epoch 0 is the start."""

    epoch: int
    eps: float
    seconds: float = 0.0                # of the training, the slowest worker's
    total_seconds: float = 0.0          # since the start of the training
    points: int = 0
    updates_per_cpu_second: float = 0.0
    local_share: float = 1.0            # of the parameters that were used in training
    relocations: int = 0
    train_loss: float = math.nan
    test_loss: float = math.nan
    train_rmse: float = math.nan
    test_rmse: float = math.nan

    def line(self):
        words = [f"epoch {self.epoch}:"]
        if self.epoch:
            words.append(f"{self.seconds:.3f} s, step {self.eps:.6g}, {100 * self.local_share:.2f} % local, "
                         f"{self.relocations} relocations")
        if not math.isnan(self.train_loss):
            words.append(f"{'; ' if self.epoch else ''}loss {self.train_loss:.6g} train {self.test_loss:.6g} test, "
                         f"RMSE {self.train_rmse:.5g} train {self.test_rmse:.5g} test")
        return " ".join(words).replace(" ; ", "; ")


class _Worker(TrainingWorker):
    def __init__(self, kv, server, me, args, layout, train, test, counts, places):
        super().__init__(kv, server, me, args)
        self.layout = layout
        self.train, self.test, self.dtype = train, test, np.dtype(args.dtype)
        self.places = places
        begin, end = layout.rows_of(me)
        self.trainer = Trainer(kv, rank=args.rank, double_precision=self.dtype == np.float64, row_begin=begin, row_end=end,
                               num_cols=layout.cols, column_key=layout.column_key, row_counts=counts[0][begin:end],
                               col_counts=counts[1], regularization=args.regularization, seed=seed_of(args.seed, me), places=places,
                               sync_push=args.sync_push, localize_rows=args.disable_localize_left)
        self.exchange = Exchange(kv, me, layout.workers, layout.keys, args.rank, self.dtype, SUMS)
        self.offset = 0                 # this worker was last at the block of columns `offset + me`
        self.columns = None

    def column_keys(self, cols):
        return self.layout.column_key + cols[0], self.layout.column_key + cols[1]

    def keys(self, begin, end):
        """Where the parameters of keys begin up to end are."""
        return np.arange(begin, end) if self.places is None else self.places[begin:end]

    # --- start

    def start(self, factors):
        """Give the parameters of this worker's rows and block of columns their start. `factors`: rows x rank, columns x rank."""
        args, trainer = self.args, self.trainer
        rows, cols = self.layout.rows_of(self.me), self.layout.cols_of(self.me)
        if not args.disable_localize_left:
            self.check(trainer.localize(*rows))
        for number, (begin, end), keys in (0, rows, rows), (1, cols, self.column_keys(cols)):
            if args.init_parameters == 2:
                self.check(trainer.set_random(*keys, args.model_seed + number, begin, args.init_scale))
            elif args.init_parameters == 1:
                for at in range(begin, end, 1024):
                    values = np.ascontiguousarray(factors[number][at:min(at + 1024, end)], dtype=self.dtype)
                    key = keys[0] + at - begin
                    self.kv.set(self.keys(key, key + len(values)), values)

    # --- an epoch

    def go_to(self, block):
        """Have a block of columns here."""
        if not self.args.disable_localize_blocks:
            self.check(self.trainer.localize(*self.column_keys(self.layout.cols_of(block))))

    def dsgd(self, random):
        """Rounds, in which every worker has a block of columns of its own (strata)."""
        workers = self.layout.workers
        order = random.permutation(workers) if self.args.wor_blocks else np.arange(workers)
        for shift in order.tolist():
            block = (shift + self.me) % workers
            self.go_to(block)
            self.check(self.trainer.train(self.train.pieces(block, block + 1), self.args.wor_points))
            self.kv.waitall()
            self.kv.barrier()
        self.offset = order[-1]

    def columnwise(self, random):
        """Column after column, each worker in an order of its own."""
        begins = self.train.begins
        filled = np.flatnonzero(np.diff(begins))
        if self.args.wor_points:
            order = np.random.default_rng([self.args.seed, random.integers(2**31), self.me]).permutation(filled)
        else:
            order = np.roll(filled, -np.searchsorted(filled, self.layout.cols_of(self.me)[0]))
        runs = np.stack((begins[order], begins[order + 1]), axis=1)
        if self.args.wor_points:
            self.check(self.trainer.shuffle_runs(self.train.cells, runs) or 0)
        sizes = np.diff(runs)[:, 0]
        group = (np.cumsum(sizes) - sizes) // self.args.prelocalize_groupsize
        groups = np.append(np.flatnonzero(np.diff(group, prepend=-1)), len(runs))
        self.check(self.trainer.train_groups(self.train.cells, runs, groups, self.args.prelocalize_steps))

    def plain_sgd(self, random):
        """All cells of the worker in random order."""
        cells, size = self.train.cells, self.args.prelocalize_groupsize
        if self.args.wor_points:
            self.check(self.trainer.shuffle_runs(cells, np.array([[0, len(cells)]])) or 0)
        begins = np.arange(0, len(cells), size)
        runs = np.stack((begins, np.minimum(begins + size, len(cells))), axis=1)
        self.check(self.trainer.train_groups(cells, runs, np.arange(len(runs) + 1), self.args.prelocalize_steps))

    def train_epoch(self, epoch, eps, seconds):
        """Train for one epoch, or so many seconds if that is less; return what there is to tell the others. Collective."""
        accesses = Accesses(self.server) if self.first_of_node else None
        self.kv.barrier()
        self.trainer.begin_epoch(eps, self.args.early_stop, seconds)
        start, cpu = time.monotonic(), time.thread_time()
        getattr(self, self.args.algorithm)(np.random.default_rng([self.args.seed, epoch]))
        self.kv.waitall()
        self.kv.barrier()
        told = {"seconds": time.monotonic() - start, "cpu_seconds": time.thread_time() - cpu, "points": self.trainer.trained,
                "stop": self.trainer.out_of_time}
        if self.first_of_node:
            told |= accesses.told()
        return told

    # --- loss

    def measure(self):
        """Return what this worker adds to the losses. Collective, as blocks of columns go round."""
        layout, args = self.layout, self.args
        told = {"train_squares": 0.0, "test_squares": 0.0, "norms": self.check(self.trainer.norms(*layout.rows_of(self.me))),
                "train_cells": len(self.train.cells), "test_cells": len(self.test.cells)}
        if args.algorithm == "plain_sgd":
            blocks = [(layout.cols_of(self.me), (0, layout.cols), self.train.cells, self.test.cells)]
        else:
            blocks = []
            for shift in range(layout.workers):
                block = (self.offset + self.me + shift) % layout.workers
                cols = layout.cols_of(block)
                pieces = cols if args.algorithm == "columnwise" else (block, block + 1)
                blocks.append((cols, cols, self.train.pieces(*pieces), self.test.pieces(*pieces)))
            self.offset = (self.offset + layout.workers - 1) % layout.workers
        for number, (own, cols, train, test) in enumerate(blocks):
            if args.algorithm != "plain_sgd":
                if number and not args.disable_localize_blocks:
                    self.kv.barrier()
                self.check(self.trainer.localize(*self.column_keys(cols)) if not args.disable_localize_blocks else 0)
            if number == 0:
                told["norms"] += self.check(self.trainer.norms(*self.column_keys(own)))
            columns = None if args.prevent_full_model_pull else self.pull_columns(cols)
            told["train_squares"] += self.check(self.trainer.squares(train, columns, cols[0]))
            told["test_squares"] += self.check(self.trainer.squares(test, columns, cols[0]))
        return told

    def pull_columns(self, cols):
        """Return the parameters of a block of columns, in a matrix that is used again."""
        if self.columns is None:
            most = self.layout.cols if self.args.algorithm == "plain_sgd" else self.layout.cols_each
            self.columns = np.empty((most, self.args.rank), dtype=self.dtype)
        for begin in range(cols[0], cols[1], 1024):
            end = min(begin + 1024, cols[1])
            self.kv.pull(self.keys(*self.column_keys((begin, end))), self.columns[begin - cols[0]:end - cols[0]])
        return self.columns


ALGORITHMS = ("dsgd", "columnwise", "plain_sgd")


def _result(epoch, eps, told, losses, args, started):
    """What all workers together have told."""
    result = EpochResult(epoch, eps, total_seconds=time.monotonic() - started)
    if epoch:
        accesses = told["accesses"].sum()
        result.seconds, result.points = float(told["seconds"].max()), int(told["points"].sum())
        result.local_share = float(told["local"].sum() / accesses) if accesses else 1.0
        result.relocations = int(told["relocations"].sum())
        result.updates_per_cpu_second = float(result.points / max(told["cpu_seconds"].sum(), 1e-9))
    if losses:
        cells, tests = told["train_cells"].sum(), told["test_cells"].sum()
        penalty = args.regularization * told["norms"].sum() / cells
        train, test = told["train_squares"].sum() / cells, told["test_squares"].sum() / tests
        result.train_loss, result.test_loss = float(train + penalty), float(test + penalty)
        result.train_rmse, result.test_rmse = math.sqrt(train), math.sqrt(test)
        if not math.isfinite(result.train_loss):
            raise Diverged(f"the factors have diverged in epoch {epoch} (the loss is {result.train_loss}); "
                           f"a smaller --eps than {args.eps:g} may help")
    return result


def run_worker(kv, server, me, args, layout, train, test, counts, places, factors, report):
    """Train; return a Trained. `report(EpochResult)` is called in the first worker of the job. Collective."""
    worker = _Worker(kv, server, me, args, layout, train, test, counts, places)
    kv.begin_setup()
    worker.start(factors)
    kv.end_setup()
    trained, eps, before = Trained(), args.eps, math.inf
    started = time.monotonic()
    for epoch in range(args.epochs + 1):
        told = {}
        if epoch:
            seconds = None if args.max_runtime is None else args.max_runtime - (time.monotonic() - started)
            told = worker.train_epoch(epoch, eps, seconds)
        if args.compute_loss:
            told.update(worker.measure())
        late = args.max_runtime is not None and time.monotonic() - started >= args.max_runtime
        told = worker.exchange(**{**told, "stop": bool(told.get("stop") or late)})
        result = _result(epoch, eps, told, args.compute_loss, args, started)
        trained.epochs.append(result)
        if me == 0 and (epoch or args.compute_loss):
            report(result)
        if told["stop"].any():
            trained.stopped = epoch < args.epochs
            break
        if epoch and args.bold_driver and args.compute_loss:
            eps *= args.increase_step_factor if result.train_loss < before else args.decrease_step_factor
        before = result.train_loss
    return trained
