"""Word vectors by skip-gram with negative sampling: words that are used alike get vectors that are alike.

The input vector of word w is parameter 2w, its output vector parameter 2w + 1 (of random keys, with --shuffle). Each worker streams
through a part of the text; the parameters of the words ahead of it relocate to its node (--localize_pos, --prep_context_ahead), and
negatives come from the sampling primitives. After Mikolov et al., Distributed Representations of Words and Phrases and their
Compositionality, NIPS 2013, and their C program.

    python tracker/dmlc_local.py -s 2 build/apps/word2vec --num_threads 2 --negative 2 --binary 1 --num_keys 4970 --embed_dim 10
        --input_file apps/data/lm/small.txt --num_iterations 4 --window 2 --localize_pos 1 --data_words 10000
"""
import logging
import time
from pathlib import Path

import numpy as np

import lapse
from apps.common.exchange import Exchange
from apps.common.files import InputError, check_file, check_folder
from apps.common.program import Report, log_peak_memory, run_application, say_end, set_up
from apps.w2v.output import read_checkpoint, write_checkpoint, write_vectors
from apps.w2v.text import build_vocabulary, open_text, read_vocabulary, write_vocabulary
from apps.w2v.training import SUMS, Job, run_worker
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

NAME = "word2vec"
MOST_WORDS, MOST_KEYS = 2**62, 2**40
log = logging.getLogger(NAME)


def count_or_none(text):
    """Return the whole number >= 1 that `text` spells; none: None."""
    return None if text.lower() == "none" else whole(1, MOST_WORDS)(text)


def parse(argv):
    parser = program_parser(NAME, "Learn vectors of words from a text.")
    add = parser.add_argument
    add("-t", "--num_threads", type=positive_int, default=2, metavar="N", help="worker threads per process")
    add("-i", "--num_iterations", type=non_negative_int, default=15, metavar="N", help="iterations over the text")
    add("-f", "--input_file", required=True, metavar="FILE", help="text to train on")
    add("-o", "--output_file", default="vectors.bin", metavar="FILE", help="where the vectors go (--write_results)")
    add("--vocab_save", metavar="FILE", help="write the vocabulary")
    add("--vocab_retrieve", metavar="FILE", help="read the vocabulary")
    add("--shuffle", type=boolean, default=True, metavar="BOOL", help="words get random keys")
    add("-d", "--debug_mode", type=non_negative_int, default=2, metavar="N",
        help="0: say nothing of the training, 1: a line per iteration, 2: lines about the progress, too")
    add("-w", "--window", type=whole(1, 2**16), default=5, metavar="N", help="context window")
    add("-v", "--embed_dim", type=whole(1, 2**24), default=200, metavar="N", help="embedding dimension")
    add("-k", "--num_keys", type=whole(1, MOST_KEYS), default=10, metavar="N", help="number of parameters: >= 2 x vocabulary")
    add("--negative", type=whole(0, 2**20), default=25, metavar="N", help="negative samples of a pair of words")
    add("--clustered_input", type=boolean, default=False, metavar="BOOL", help="one input file per node: FILE.<rank>")
    add("--write_results", type=boolean, default=False, metavar="BOOL", help="write the vectors")
    add("--localize_pos", type=boolean, default=True, metavar="BOOL", help="localize the words of the sentence ahead")
    add("--sync_push", type=boolean, default=True, metavar="BOOL", help="wait for each push")
    add("--data_words", type=count_or_none, default=None, metavar="N",
        help="words in the input, for the learning rate and the split among workers: each trains on its share of so many; none: on its "
             "part of the file")
    add("--min_count", type=whole(1, MOST_WORDS), default=5, metavar="N", help="drop rarer words")
    add("--neg_power", type=non_negative, default=0.75, metavar="X", help="exponent of the negative-sampling distribution")
    add("--starting_alpha", type=positive, default=0.025, metavar="X", help="initial learning rate")
    add("--subsample", type=non_negative, default=1e-4, metavar="X", help="subsampling threshold of frequent words; 0: keep all")
    add_replicate(parser)
    add("--peek_ahead", type=non_negative_int, default=0, metavar="N", help="localize N words of the next sentence (0: off)")
    add("--prep_context_ahead", type=non_negative_int, default=10, metavar="N",
        help="contexts ahead to localize and to prepare samples")
    add("--binary", type=int, choices=(0, 1), default=1, help="word2vec binary (1) or text (0) output")
    add("--init_model", default="random", metavar="HOW", help="none (zeros), random, or the path of a checkpoint")
    add("--init_scale", type=positive, default=0.5, metavar="X", help="random start in (-X / dimension, X / dimension)")
    add("--model_seed", type=seed, default=134827, metavar="N", help="seed of the initial model")
    add("--max_runtime", type=seconds, default=None, metavar="SECONDS", help="seconds after which training stops")
    add_shared_memory(parser)
    add("--enforce_random_keys", type=boolean, default=False, metavar="BOOL", help="random key assignment: the fair classic baseline")
    add("--dtype", choices=("float32", "float64"), default="float32", help="number type of the vectors")
    add("--seed", type=seed, default=1, metavar="N", help="seed of windows, subsampling and negatives")
    add("--checkpoint", default="", metavar="FOLDER", help="folder for a checkpoint after each iteration (epoch-<n>)")
    add("--report", default="", metavar="FILE", help="file for the numbers of each iteration, one JSON object per line")
    args = parser.parse_args(argv)
    args.binary = bool(args.binary)
    return args


# --- the program ----------------------------------------------------------------------------------------------------------------------

def run_node(args, vocabulary, places, paths, checkpoint):
    with lapse.Server(args.embed_dim, dtype=args.dtype) as server:
        rank, threads = server.my_rank(), args.num_threads
        workers = server.num_nodes * threads
        if args.negative:
            weights = np.zeros(places.max() + 1)
            counts = vocabulary.frequencies()
            weights[places[1::2]] = (counts / counts.max()) ** args.neg_power       # at most 1, whatever the exponent
            server.enable_sampling_support(distribution=weights, min=0, max=len(weights), seed=args.seed, **sampling_settings(args))
            del weights
        if args.vocab_save and rank == 0:
            write_vocabulary(args.vocab_save, vocabulary)
        text = open_text(paths[rank if args.clustered_input else 0])
        ranges = text.ranges(threads) if args.clustered_input else text.ranges(workers)[rank * threads:(rank + 1) * threads]

        def pull(kv, which, begin, end):
            return kv.pull(np.ascontiguousarray(places[2 * begin + which:2 * end:2]))

        def save(kv, epoch):
            write_checkpoint(args.checkpoint, epoch, vocabulary, lambda *what: pull(kv, *what), args.embed_dim, np.dtype(args.dtype))

        job = Job(args, vocabulary, places, text, ranges, workers, checkpoint, save if args.checkpoint else None)
        report = Report(args.report, quiet=args.debug_mode == 0) if rank == 0 else None

        def work(worker):
            kv = lapse.Worker(worker, server)
            me = rank * threads + worker
            trained = run_worker(kv, server, me, job, report)
            if args.write_results and me == 0:
                write_vectors(args.output_file, vocabulary, lambda begin, end: pull(kv, 0, begin, end), args.embed_dim, args.binary)
            kv.finalize()
            return trained

        trained = run_workers(threads, work)[0]
        text.close()
        log_peak_memory(log, rank)
    if rank == 0:
        say_end(NAME, trained, server.num_nodes, threads)
    return 0


def input_paths(args, config):
    """The files of all nodes, in the order of their ranks; one if they share it."""
    if args.clustered_input:
        return [Path(f"{args.input_file}.{rank}") for rank in range(config.num_nodes)]
    return [Path(args.input_file)]


def get_vocabulary(args, paths):
    """Read or count the vocabulary, and check that there are keys for it."""
    began = time.monotonic()
    if args.vocab_retrieve:
        vocabulary = read_vocabulary(args.vocab_retrieve, args.min_count)
        log.info("%s: %d words (%.2f s)", args.vocab_retrieve, len(vocabulary), time.monotonic() - began)
    else:
        vocabulary, words = build_vocabulary(paths, args.min_count)
        log.info("%s: %d words, %d different ones that occur %d times (%.2f s)", args.input_file, words, len(vocabulary), args.min_count,
                 time.monotonic() - began)
    if args.num_keys < 2 * len(vocabulary):
        raise InputError(f"--num_keys is {args.num_keys}, but a vocabulary of {len(vocabulary)} words needs {2 * len(vocabulary)}")
    if not args.sampling_with_replacement and 2 * args.window * args.negative > len(vocabulary):
        raise InputError(f"--sampling.with_replacement 0: the negatives of a context are different words, up to 2 x {args.window} x "
                         f"{args.negative} (--window, --negative), but the vocabulary has {len(vocabulary)}")
    return vocabulary


def prepare(args):
    """Check and open what there is to read; return the arguments of run_node, or None in the scheduler."""
    config = Config.make(1, args.num_threads)
    workers = config.num_nodes * args.num_threads
    num_keys = args.num_keys + Exchange.num_keys(workers, args.embed_dim, SUMS)
    if not set_up(num_keys, args):
        return None
    for option, wanted, path in (("--output_file", args.write_results, args.output_file),
                                 ("--vocab_save", args.vocab_save, args.vocab_save)):
        if wanted:
            check_folder(option, Path(path).parent)
            check_file(option, path)
    if args.checkpoint:
        check_folder("--checkpoint", args.checkpoint)
    if args.report:
        check_file("--report", args.report, appended=True)
    paths = input_paths(args, config)
    needed = paths
    if args.clustered_input and args.vocab_retrieve:        # a node needs no more than its own file, if it knows its rank now
        needed = [] if config.rank_hint is None else [paths[config.rank_hint]]
    for path in needed:
        open_text(path).close()
    vocabulary = get_vocabulary(args, paths)
    places = np.arange(2 * len(vocabulary))
    if args.shuffle or args.enforce_random_keys:
        places = np.random.default_rng([args.model_seed, 1]).permutation(args.num_keys)[:2 * len(vocabulary)]
    checkpoint = None
    if args.init_model not in ("none", "random"):
        checkpoint = read_checkpoint(args.init_model, vocabulary, args.embed_dim)
    return args, vocabulary, places.astype(np.int64), paths, checkpoint


def main(argv=None):
    args = parse(argv)
    return run_application(NAME, lambda: prepare(args), run_node)


if __name__ == "__main__":
    run_program(main)
