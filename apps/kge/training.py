"""What one worker of the job does: start, epochs, evaluation, checkpoints.

The loss is that of the C++ program: the mean of the logistic loss over all scores that an epoch has computed, true and corrupted
triples, each at the time of its training, without regularization. All workers exchange their sums through parameters of their own,
and each draws the same conclusions.
"""
import math
import time
from dataclasses import dataclass, field

import numpy as np
from apps.kge._kernel import Trainer

from apps.common.exchange import Exchange
from apps.common.program import TrainingError
from apps.common.training import Accesses, Trained, TrainingWorker
from apps.kge.evaluation import METRICS, summary

__all__ = ["SPLITS", "SUMS", "Diverged", "EpochResult", "run_worker"]

SPLITS = ("train", "valid", "test")
SUMS = ("loss", "triples", "seconds", "cpu_seconds", "stop", "local", "remote", "accesses", "relocations", "evaluation_seconds",
        *(f"{split}_{name}" for split in SPLITS for name in ("ranks", *METRICS)))
START = 1e-6                    # of the AdaGrad sums


class Diverged(TrainingError):
    """The embeddings are no numbers any more."""


@dataclass
class EpochResult:
    """One line of the report; epoch 0 is the start."""

    epoch: int
    seconds: float = 0.0                # of the training, the slowest worker's
    total_seconds: float = 0.0          # since the start of the training
    triples: int = 0
    triples_per_second: float = 0.0
    triples_per_cpu_second: float = 0.0     # of the worker threads
    loss: float = math.nan
    local_share: float = 1.0            # of the parameters that were used in training: found here at once
    remote_share: float = 0.0           # another node had to be asked; the rest was on its way here
    relocations: int = 0
    evaluation_seconds: float = 0.0
    metrics: dict = field(default_factory=dict)

    def line(self):
        words = [f"epoch {self.epoch}:"]
        if self.epoch:
            words.append(f"{self.seconds:.3f} s, {self.triples_per_second:.0f} triples/s, loss {self.loss:.6g}, "
                         f"{100 * self.local_share:.2f} % local, {self.relocations} relocations")
        lines = [" ".join(words)] if self.epoch else []
        for split, found in self.metrics.items():
            lines.append(f"epoch {self.epoch}: {split}: MRR {found['mrr']:.4f} MR {found['mr']:.1f} hits@1/3/10 {found['hits1']:.4f} "
                         f"{found['hits3']:.4f} {found['hits10']:.4f}; raw MRR {found['raw_mrr']:.4f} MR {found['raw_mr']:.1f} hits@1/3/10 "
                         f"{found['raw_hits1']:.4f} {found['raw_hits3']:.4f} {found['raw_hits10']:.4f}")
        return "\n".join(lines)


def _together(args):
    """For how many triples parameters are localized and samples prepared in one go, at least --localize_parameters_ahead triples ahead."""
    if not args.sampling_with_replacement:
        return 1                        # no repetition within a triple, rather than within several
    return min(max(1, args.localize_parameters_ahead // 5), 64)


class _Worker(TrainingWorker):
    def __init__(self, kv, server, me, args, layout, workers, triples, evaluation):
        super().__init__(kv, server, me, args)
        self.layout, self.workers = layout, workers
        self.triples, self.evaluation, self.dtype = triples, evaluation, np.dtype(args.dtype)
        self.trainer = Trainer(kv, rescal=layout.rescal, double_precision=self.dtype == np.float64, dim=layout.dim,
                               num_entities=layout.entities, negatives=args.neg_ratio, eta=args.eta, gamma_entity=args.gamma_entity,
                               gamma_relation=args.gamma_relation, group=args.group, parts=layout.parts, lines=layout.lines,
                               places=layout.places, ahead=args.localize_parameters_ahead, together=_together(args),
                               async_push=args.async_push, localize_relations=not args.localize_relations_initial)
        self.exchange = Exchange(kv, me, workers, layout.keys, 2 * layout.dim, self.dtype, SUMS)

    # --- start

    def start(self, checkpoint):
        """Give this worker's share of the parameters its start: random numbers, zeros, or what a checkpoint has."""
        args = self.args
        for kind, begin, end in self.layout.share(self.me, self.workers):
            if checkpoint is not None:
                values, sums = checkpoint.read(kind, begin, end, self.dtype)
            else:
                shape = end - begin, self.layout.dim ** 2 if kind and self.layout.rescal else self.layout.dim
                values, sums = np.zeros(shape, dtype=self.dtype), np.full(shape, START, dtype=self.dtype)
                if args.init_parameters:        # of the block, whoever's it is
                    values[:] = np.random.default_rng([args.model_seed, kind, begin]).uniform(-args.init_scale, args.init_scale, shape)
            self.layout.set(self.kv, kind, begin, end, values, sums)
        if checkpoint is not None and args.neg_ratio and args.sampling_scheme == "naive":
            # go on with the draws that would have come next
            each = len(self.triples) if args.max_N < 0 else min(args.max_N, len(self.triples))
            self.check(self.trainer.skip_draws(checkpoint.epoch * each))
        if args.localize_relations_initial:
            for relation in np.unique(self.triples[:, 1]).tolist():
                self.kv.localize(self.layout.keys_of_block(1, relation, relation + 1))

    # --- an epoch

    def train_epoch(self, epoch, seconds):
        """Train for one epoch, or so many seconds if that is less; return what there is to tell the others. Collective."""
        accesses = Accesses(self.server) if self.first_of_node else None
        order = np.random.default_rng([self.args.seed, epoch, self.me]).permutation(len(self.triples))
        triples = self.triples[order]
        self.kv.barrier()
        self.trainer.begin_epoch(self.args.max_N, seconds)
        start, cpu = time.monotonic(), time.thread_time()
        self.check(self.trainer.train(triples))
        self.kv.waitall()
        cpu = time.thread_time() - cpu
        self.kv.barrier()
        told = {"seconds": time.monotonic() - start, "cpu_seconds": cpu, "triples": self.trainer.trained, "loss": self.trainer.loss,
                "stop": self.trainer.out_of_time}
        if self.first_of_node:
            told |= accesses.told()
        return told

    def measure(self):
        """Return this worker's part of the evaluation. Collective."""
        start = time.monotonic()
        self.evaluation.refresh(self.kv, self.me % self.args.num_threads, self.args.num_threads)
        self.kv.barrier()
        told = self.evaluation.measure(self.kv, self.me, self.workers)
        return {**told, "evaluation_seconds": time.monotonic() - start}


def _result(epoch, told, args, splits, started):
    """What all workers together have told."""
    result = EpochResult(epoch, total_seconds=time.monotonic() - started)
    if epoch and "triples" in told and told["triples"].sum():
        accesses, triples = told["accesses"].sum(), told["triples"].sum()
        result.seconds, result.triples = float(told["seconds"].max()), int(triples)
        result.triples_per_second = float(triples / max(result.seconds, 1e-9))
        result.triples_per_cpu_second = float(triples / max(told["cpu_seconds"].sum(), 1e-9))
        result.loss = float(told["loss"].sum() / (triples * (1 + 2 * args.neg_ratio)))
        result.local_share = float(told["local"].sum() / accesses) if accesses else 1.0
        result.remote_share = float(told["remote"].sum() / accesses) if accesses else 0.0
        result.relocations = int(told["relocations"].sum())
        if not math.isfinite(result.loss):
            raise Diverged(f"the embeddings have diverged in epoch {epoch} (the loss is {result.loss}); a smaller --eta than {args.eta:g} "
                           f"may help")
    if splits:
        result.metrics, result.evaluation_seconds = summary(told, splits), float(told["evaluation_seconds"].max())
    return result


def run_worker(kv, server, me, args, layout, workers, triples, evaluation, checkpoint, write, report):
    """Train; return a Trained. `report(EpochResult)` and `write(kv, epoch)`, which writes a checkpoint, are called in the first worker
    of the job. Collective."""
    worker = _Worker(kv, server, me, args, layout, workers, triples, evaluation)
    kv.begin_setup()
    worker.start(checkpoint)
    kv.end_setup()
    trained, began = Trained(), checkpoint.epoch if checkpoint is not None else 0
    started = time.monotonic()
    for epoch in range(began, max(args.num_epochs, began) + 1):
        told, splits = {}, ()
        if epoch > began:
            seconds = None if args.max_runtime is None else args.max_runtime - (time.monotonic() - started)
            told = worker.train_epoch(epoch, seconds)
        if evaluation is not None and (epoch % args.eval_freq == 0 if epoch > began and args.eval_freq > 0 else
                                       epoch == began and args.eval_initial):
            splits = evaluation.splits
            told.update(worker.measure())
        late = args.max_runtime is not None and time.monotonic() - started >= args.max_runtime
        told = worker.exchange(**{**told, "stop": bool(told.get("stop") or late)})
        result = _result(epoch, told, args, splits, started)
        trained.epochs.append(result)
        stop = bool(told["stop"].any())
        last = stop or epoch >= args.num_epochs
        if me == 0:
            if epoch > began or splits:
                report(result)
            due = epoch > began and args.write_embeddings and epoch % args.write_every == 0
            if due or (last and args.write_end_checkpoint):
                write(kv, epoch)
        kv.barrier()            # nobody trains while the model is written
        if stop:
            trained.stopped = epoch < args.num_epochs
            break
    return trained
