"""Matrix factorization by stochastic gradient descent: W and H such that W @ H approximates a matrix of which some cells are known.

Row i of W is parameter i, column j of H a parameter behind those. Each worker has the cells of a range of rows, whose parameters it
keeps; the columns' parameters relocate. dsgd: rounds in which every worker has a block of columns of its own (Gemulla et al., KDD
2011); columnwise and plain_sgd: columns are fetched a few groups of cells ahead (--prelocalize_steps).

    python tracker/dmlc_local.py -s 2 build/apps/matrix_factorization --dataset apps/data/mf/ -r 2 --num_rows 6 --num_cols 4 --epochs 10
"""
import logging
import time
from pathlib import Path

import numpy as np

import lapse
from apps.common.exchange import Exchange
from apps.common.files import InputError, check_file, check_folder
from apps.common.program import Report, log_peak_memory, run_application, say_end, set_up
from apps.mf.data import open_cells, read_size
from apps.mf.layout import Layout, Share, load
from apps.mf.output import OUTPUTS, read_factors, write_factors
from apps.mf.training import ALGORITHMS, SUMS, run_worker
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
    seconds,
    seed,
)
from lapse.program import run_program, run_workers

NAME = "matrix_factorization"
log = logging.getLogger(NAME)


def parse(argv):
    parser = program_parser(NAME, "Factorize a matrix of which some cells are known.")
    add = parser.add_argument
    add("-d", "--dataset", required=True, metavar="PATH", help="folder with train.mmc and test.mmc, or the former file")
    add("--num_rows", type=positive_int, metavar="N", help="rows of the matrix; read from the data when not given")
    add("--num_cols", type=positive_int, metavar="N", help="columns of the matrix; read from the data when not given")
    add("-r", "--rank", type=positive_int, required=True, metavar="N", help="rank of the factorization")
    add("-e", "--epochs", type=non_negative_int, required=True, metavar="N", help="epochs")
    add("-l", "--lambda", dest="regularization", type=non_negative, default=0.05, metavar="X", help="L2 regularization")
    add("--eps", type=positive, default=0.001, metavar="X", help="initial step size")
    add("--bold_driver", type=boolean, default=True, metavar="BOOL", help="adapt the step size after each epoch by the training loss")
    add("--increase_step_factor", type=positive, default=1.05, metavar="X", help="bold driver, after a better epoch")
    add("--decrease_step_factor", type=positive, default=0.5, metavar="X", help="bold driver, after a worse epoch")
    add_shared_memory(parser)
    add("--algorithm", choices=ALGORITHMS, default="dsgd", help="the algorithm")
    add("--disable_localize_blocks", type=boolean, default=False, metavar="BOOL", help="dsgd: do not localize the column block")
    add("--disable_localize_left", type=boolean, default=False, metavar="BOOL", help="do not localize the rows of this worker")
    add("--prelocalize_steps", type=non_negative_int, default=0, metavar="N",
        help="columnwise, plain_sgd: localize this many groups ahead")
    add("--prelocalize_groupsize", type=positive_int, default=1000, metavar="N", help="points in one such group")
    add_replicate(parser)
    add("-t", "--num_threads", type=positive_int, default=1, metavar="N", help="worker threads per process")
    add("--wor_blocks", type=boolean, default=True, metavar="BOOL",
        help="dsgd: random block order without replacement; off: in turn")
    add("--wor_points", type=boolean, default=True, metavar="BOOL", help="random order of points; off: as they are stored")
    add("--sync_push", type=boolean, default=False, metavar="BOOL", help="wait for each push")
    add("--compute_loss", type=boolean, default=True, metavar="BOOL",
        help="train and test loss each epoch (without it the step size stays)")
    add("--init_parameters", type=int, choices=(0, 1, 2), default=2, help="0: zeros, 1: W.mma and H.mma of the dataset, 2: random")
    add("--init_scale", type=positive, default=1.0, metavar="X", help="random start in (0, X)")
    add("--model_seed", type=seed, default=134827, metavar="N", help="seed of the initial model")
    add("--enforce_random_keys", type=boolean, default=False, metavar="BOOL", help="random key assignment: the fair classic baseline")
    add("--early_stop", type=non_negative_int, default=0, metavar="N", help="end an epoch after N points of a worker (0: never)")
    add("--max_runtime", type=seconds, default=None, metavar="SECONDS", help="seconds after which training stops")
    add("--prevent_full_model_pull", type=boolean, default=False, metavar="BOOL", help="evaluate without pulling the whole model")
    add("--dtype", choices=("float32", "float64"), default="float64", help="number type of the factors")
    add("--seed", type=seed, default=1, metavar="N", help="seed of the order of blocks and points")
    add("--output", default="", metavar="FOLDER", help="folder for the factors (W.npy, H.npy, W.mma, H.mma)")
    add("--report", default="", metavar="FILE", help="file for the numbers of each epoch, one JSON object per line")
    args = parser.parse_args(argv)
    if args.algorithm == "dsgd" and args.prelocalize_steps:
        parser.error("dsgd has nothing to prelocalize: --prelocalize_steps goes with columnwise and plain_sgd")
    if args.algorithm != "dsgd" and args.disable_localize_blocks:
        parser.error(f"{args.algorithm} has no blocks: --disable_localize_blocks goes with dsgd")
    return args


# --- what there is to read ---------------------------------------------------------------------------------------------------------

def check_size(args, train, test):
    """InputError where the sizes of the files and of the command line are not the same."""
    size = read_size(train)
    for option, given, found in (("--num_rows", args.num_rows, size.rows), ("--num_cols", args.num_cols, size.cols)):
        if given is not None and given != found:
            raise InputError(f"{option} is {given}, but {train} has {found}")
    if size.cells == 0:
        raise InputError(f"{train} has no cells")
    if args.compute_loss:
        other = read_size(test)
        if (other.rows, other.cols) != (size.rows, size.cols):
            raise InputError(f"{test} is of {other.rows} x {other.cols}, but {train} of {size.rows} x {size.cols}")
        if other.cells == 0:
            raise InputError(f"{test} has no cells (--compute_loss 0 does without them)")
    return size


# --- the program ----------------------------------------------------------------------------------------------------------------------

def run_node(args, train_cells, test_cells, layout, factors, config):
    with lapse.Server(args.rank, dtype=args.dtype) as server:
        rank, threads = server.my_rank(), args.num_threads
        if server.num_nodes != config.num_nodes:
            raise RuntimeError(f"{server.num_nodes} nodes, but {config.num_nodes} were announced")
        pieces = {"dsgd": layout.workers, "columnwise": layout.cols, "plain_sgd": 1}[args.algorithm]
        began = time.monotonic()
        train = load(train_cells, layout, rank * threads, threads, pieces)
        if test_cells is not None:
            test = load(test_cells, layout, rank * threads, threads, pieces)
        else:
            test = [Share(train[0].cells[:0], np.zeros_like(share.begins)) for share in train]
        counts = train_cells.row_counts, train_cells.col_counts
        log.info("node %d has %d of %d cells (%.2f s)", rank, sum(len(share.cells) for share in train), train_cells.size.cells,
                 time.monotonic() - began)
        train_cells.close()
        places = None
        if args.enforce_random_keys:
            places = np.random.default_rng([args.model_seed, 1]).permutation(layout.keys).astype(np.int64)
        report = Report(args.report) if rank == 0 else None

        def work(worker):
            kv = lapse.Worker(worker, server)
            me = rank * threads + worker
            trained = run_worker(kv, server, me, args, layout, train[worker], test[worker], counts, places, factors, report)
            if args.output and me == 0:
                def pull(begin, end):
                    return kv.pull(np.arange(begin, end) if places is None else places[begin:end])
                write_factors(args.output, pull, layout, args.rank, np.dtype(args.dtype))
            kv.finalize()
            return trained

        trained = run_workers(threads, work)[0]
        log_peak_memory(log, rank)
    if rank == 0:
        say_end(NAME, trained, server.num_nodes, threads)
    return 0


def prepare(args):
    """Check and open what there is to read; return the arguments of run_node, or None in the scheduler."""
    folder = Path(args.dataset)
    train, test = (folder, folder.parent / "test.mmc") if folder.is_file() else (folder / "train.mmc", folder / "test.mmc")
    size = check_size(args, train, test)
    config = Config.make(1, args.num_threads)
    layout = Layout(size.rows, size.cols, config.num_nodes * args.num_threads)
    num_keys = layout.keys + Exchange.num_keys(layout.workers, args.rank, SUMS)
    if not set_up(num_keys, args):
        return None
    if args.output:
        check_folder("--output", args.output)
        for name in OUTPUTS:
            check_file("--output", Path(args.output) / name)
    if args.report:
        check_file("--report", args.report, appended=True)
    factors = read_factors(train.parent, layout, args.rank) if args.init_parameters == 1 else None
    began = time.monotonic()
    train_cells = open_cells(train)
    test_cells = open_cells(test) if args.compute_loss else None
    log.info("%s: %d x %d, %d cells (%.2f s)", train, size.rows, size.cols, size.cells, time.monotonic() - began)
    return args, train_cells, test_cells, layout, factors, config


def main(argv=None):
    args = parse(argv)
    return run_application(NAME, lambda: prepare(args), run_node)


if __name__ == "__main__":
    run_program(main)
