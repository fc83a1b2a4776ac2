"""Knowledge-graph embeddings, ComplEx and RESCAL: vectors of entities and relations that tell true triples from corrupted ones.

Entity e is parameter e, the relations' parameters come behind; AdaGrad's sums lie beside the values. For each triple of the training
data, others take the place of its subject and its object (negative sampling). Triples may be shared out by relation
(apps/kge/partition.py), relations localized at the start, and entities some triples ahead.

    python tracker/dmlc_local.py -s 2 build/apps/knowledge_graph_embeddings --dataset apps/data/kge/ --num_entities 280 \\
        --num_relations 112 --num_epochs 4 --embed_dim 100 --eval_freq 2
"""
import argparse
import logging
import time
from pathlib import Path

import numpy as np

import lapse
from apps.common.exchange import Exchange
from apps.common.files import InputError, check_file, check_folder
from apps.common.program import Report, log_peak_memory, run_application, say_end, set_up
from apps.kge.checkpoints import Checkpoint, write_checkpoint
from apps.kge.data import partitioned_name, read_triples
from apps.kge.evaluation import Evaluation
from apps.kge.layout import Layout
from apps.kge.training import SUMS, run_worker
from lapse.config import Config
from lapse.options import (
    add_replicate,
    add_shared_memory,
    boolean,
    non_negative,
    non_negative_int,
    positive,
    positive_int,
    program_parser,
    sampling_settings,
    seconds,
    seed,
    whole,
)
from lapse.program import run_program, run_workers

NAME = "knowledge_graph_embeddings"
LARGEST_PART = 16384            # numbers of a relation in one parameter, while they can be split
log = logging.getLogger(NAME)


def whole_or_minus_one(text):
    """Return the whole number >= -1, but not 0, that `text` spells; -1 stands for never, or all."""
    return -1 if text.strip() == "-1" else positive_int(text)


MOST_DIM, MOST_AHEAD, MOST_NEGATIVES = 2**20, 2**24, 2**20


def algorithm(text):
    """Return the name of the algorithm, in whichever case it is written."""
    names = {name.lower(): name for name in ("ComplEx", "RESCAL")}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is no algorithm: say ComplEx or RESCAL")
    return names[text.lower()]


def parse(argv):
    parser = program_parser(NAME, "Learn vectors of the entities and relations of a knowledge graph.")
    add = parser.add_argument
    add("--algorithm", type=algorithm, default="ComplEx", metavar="NAME", help="the algorithm: ComplEx or RESCAL")
    add("--dataset", default="", metavar="FOLDER", help="folder with train.del, valid.del, test.del")
    add("--write_embeddings", default="", metavar="FOLDER", help="folder for checkpoints")
    add("--write_end_checkpoint", type=boolean, default=False, metavar="BOOL", help="checkpoint at the end")
    add("--write_every", type=positive_int, default=1, metavar="N", help="checkpoint every N epochs")
    add("--embed_dim", type=whole(1, MOST_DIM), default=10, metavar="N", help="embedding dimension")
    add("-t", "--num_threads", type=positive_int, default=2, metavar="N", help="worker threads per process")
    add("--num_epochs", type=non_negative_int, default=10, metavar="N", help="epochs")
    add("--eta", type=positive, default=0.1, metavar="X", help="initial AdaGrad learning rate")
    add("--gamma_entity", type=non_negative, default=1e-3, metavar="X", help="L2 regularization, entities")
    add("--gamma_relation", type=non_negative, default=1e-3, metavar="X", help="L2 regularization, relations")
    add("--neg_ratio", type=whole(0, MOST_NEGATIVES), default=6, metavar="N", help="negatives per positive and side")
    add("--eval_freq", type=whole_or_minus_one, default=1, metavar="N", help="evaluate every N epochs (-1: never)")
    add("--num_entities", type=positive_int, default=14951, metavar="N", help="entities")
    add("--num_relations", type=positive_int, default=1345, metavar="N", help="relations")
    add("--localize_parameters_ahead", type=whole(0, MOST_AHEAD), default=0, metavar="N",
        help="latency hiding: localize this many triples ahead")
    add("--async_push", type=boolean, default=False, metavar="BOOL", help="do not wait for pushes")
    add("--localize_relations_initial", type=boolean, default=False, metavar="BOOL",
        help="data clustering: localize the relations of this worker once")
    add("--read_partitioned_dataset", type=boolean, default=True, metavar="BOOL",
        help="read train.partitioned.<nodes>x<threads>.del instead of train.del")
    add("--location_caches", type=boolean, default=False, metavar="BOOL", help="use location caches")
    add_shared_memory(parser)
    add("--init_parameters", type=boolean, default=True, metavar="BOOL", help="random start; off: zeros, which learn nothing")
    add("--init_model", default="", metavar="FOLDER", help="checkpoint to go on from (a folder epoch-<n>)")
    add("--init_scale", type=positive, default=0.07, metavar="X", help="random start in (-X, X)")
    add("--enforce_random_keys", type=boolean, default=False, metavar="BOOL", help="random key assignment: the fair classic baseline")
    add_replicate(parser)
    add("--eval_truncate_tr", type=non_negative_int, default=2048, metavar="N",
        help="evaluate on at most N training triples (0: all)")
    add("--eval_truncate_va", type=non_negative_int, default=0, metavar="N", help="the same, validation")
    add("--eval_initial", type=boolean, default=False, metavar="BOOL", help="evaluate before training")
    add("--model_seed", type=seed, default=134827, metavar="N", help="seed of the initial model")
    add("--seed", type=seed, default=1, metavar="N", help="seed of the order of triples and of the negatives")
    add("--max_N", type=whole_or_minus_one, default=-1, metavar="N", help="at most N points per worker (-1: all)")
    add("--max_runtime", type=seconds, default=None, metavar="SECONDS", help="seconds after which training stops")
    add("--relation_parts", type=non_negative_int, default=0, metavar="N",
        help="RESCAL: parameters of a relation, at least; 0: as few as can be worked on in some microseconds each")
    add("--group", type=positive_int, default=1, metavar="N", help="ComplEx: corrupted triples of one side that are one step")
    add("--dtype", choices=("float32", "float64"), default="float32", help="number type of the embeddings")
    add("--report", default="", metavar="FILE", help="file for the numbers of each epoch, one JSON object per line")
    args = parser.parse_args(argv)
    if not args.dataset:
        parser.error("--dataset is needed: a folder with train.del")
    if args.algorithm == "ComplEx" and args.embed_dim % 2:
        parser.error(f"--embed_dim {args.embed_dim}: ComplEx has complex numbers, two of the dimensions each, so that has to be even")
    if not args.sampling_with_replacement and 2 * args.neg_ratio > args.num_entities:
        parser.error(f"--sampling.with_replacement 0: the negatives of a triple are different entities, 2 x {args.neg_ratio} "
                     f"(--neg_ratio), but --num_entities is {args.num_entities}")
    if args.write_end_checkpoint and not args.write_embeddings:
        parser.error("--write_end_checkpoint needs the folder of --write_embeddings")
    return args


# --- what there is to read ---------------------------------------------------------------------------------------------------------

def read_train(args, nodes):
    """Return the training triples, and the worker of each."""
    folder, size = Path(args.dataset), (args.num_entities, args.num_relations)
    workers = nodes * args.num_threads
    if args.read_partitioned_dataset:
        path = folder / partitioned_name(nodes, args.num_threads)
        if not path.exists():
            if not (folder / "train.del").exists():
                raise InputError(f"{folder}: {'no train.del there' if folder.is_dir() else 'no such folder'}")
            raise InputError(f"{path} is missing: make it by `python -m lapse partition {args.dataset} {nodes} {args.num_threads}`, or "
                             f"say --read_partitioned_dataset 0")
        triples, places = read_triples(path, *size, workers)
    else:
        triples = read_triples(folder / "train.del", *size)
        places = np.arange(len(triples)) * workers // len(triples)
    return triples, places


def some(triples, most):
    """At most so many triples (0: all), any, but the same every time."""
    if not most or most >= len(triples):
        return triples
    return triples[np.sort(np.random.default_rng(0).choice(len(triples), most, replace=False))]


def make_evaluation(args, layout, train):
    """Return an Evaluation of what there is of the three data sets, or None where nothing will be evaluated."""
    if args.eval_freq < 0 and not args.eval_initial:
        return None
    splits, known = {"train": some(train, args.eval_truncate_tr)}, [train]
    for split, most in ("valid", args.eval_truncate_va), ("test", 0):
        path = Path(args.dataset) / f"{split}.del"
        if path.exists():
            triples = read_triples(path, args.num_entities, args.num_relations)
            splits[split] = some(triples, most)
            known.append(triples)
    return Evaluation(layout, args.dtype, splits, np.concatenate(known))


def make_layout(args):
    rescal, parts = args.algorithm == "RESCAL", 1
    if rescal:
        least = args.relation_parts or -(-args.embed_dim**2 // LARGEST_PART)
        parts = next((n for n in range(min(least, args.embed_dim), args.embed_dim) if args.embed_dim % n == 0), args.embed_dim)
    layout = Layout(args.num_entities, args.num_relations, args.embed_dim, rescal, parts)
    if not args.enforce_random_keys:
        return layout
    places = np.random.default_rng([args.model_seed, 2]).permutation(layout.keys).astype(np.int64)
    return Layout(args.num_entities, args.num_relations, args.embed_dim, rescal, parts, places)


# --- the program ----------------------------------------------------------------------------------------------------------------------

def enable_sampling(server, args, layout):
    """Negatives are entities, all with equal right."""
    settings = {**sampling_settings(args), "seed": args.seed}
    if layout.places is None:
        server.enable_sampling_support(**settings, min=0, max=layout.entities)
        return
    weights = np.zeros(layout.keys)
    weights[layout.places[:layout.entities]] = 1
    server.enable_sampling_support(**settings, distribution=weights, min=0, max=layout.keys)


def run_node(args, layout, train, places, evaluation, checkpoint, config):
    workers = config.num_nodes * args.num_threads
    with lapse.Server(layout.lengths(exchange_keys(args, layout, workers)), dtype=args.dtype) as server:
        rank, threads = server.my_rank(), args.num_threads
        if server.num_nodes != config.num_nodes:
            raise RuntimeError(f"{server.num_nodes} nodes, but {config.num_nodes} were announced")
        if args.neg_ratio:
            enable_sampling(server, args, layout)
        shares = [np.ascontiguousarray(train[places == rank * threads + thread]) for thread in range(threads)]
        log.info("node %d has %d of %d triples", rank, sum(map(len, shares)), len(train))
        report = Report(args.report) if rank == 0 else None

        def write(kv, epoch):
            write_checkpoint(args.write_embeddings, epoch, layout, args.dtype, args.dataset,
                             lambda kind, begin, end: layout.pull(kv, kind, begin, end))

        def work(thread):
            kv = lapse.Worker(thread, server)
            trained = run_worker(kv, server, rank * threads + thread, args, layout, workers, shares[thread], evaluation, checkpoint, write,
                                 report)
            kv.finalize()
            return trained

        trained = run_workers(threads, work)[0]
        log_peak_memory(log, rank)
    if rank == 0:
        say_end(NAME, trained, server.num_nodes, threads)
    return 0


def exchange_keys(args, layout, workers):
    return Exchange.num_keys(workers, 2 * layout.dim, SUMS)


def prepare(args):
    """Check and read what there is to read; return the arguments of run_node, or None in the scheduler."""
    config = Config.make(1, args.num_threads)
    layout = make_layout(args)
    num_keys = layout.keys + exchange_keys(args, layout, config.num_nodes * args.num_threads)
    if not set_up(num_keys, args):
        return None
    began = time.monotonic()
    train, places = read_train(args, config.num_nodes)
    evaluation = make_evaluation(args, layout, train)
    checkpoint = Checkpoint(args.init_model, layout) if args.init_model else None
    if args.write_embeddings:
        check_folder("--write_embeddings", args.write_embeddings)
    if args.report:
        check_file("--report", args.report, appended=True)
    log.info("%s: %d triples (%.2f s)", args.dataset, len(train), time.monotonic() - began)
    return args, layout, train, places, evaluation, checkpoint, config


def main(argv=None):
    args = parse(argv)
    return run_application(NAME, lambda: prepare(args), run_node)


if __name__ == "__main__":
    run_program(main)
