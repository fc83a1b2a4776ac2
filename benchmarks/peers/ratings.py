"""Read train.mmc and test.mmc: Matrix Market, coordinate, real, 1-based."""
import numpy as np


def read(folder):
    """Return (rows, columns, values) of the training cells and of the test cells, and the size of the matrix."""
    parts = [np.loadtxt(folder / name, comments="%", ndmin=2) for name in ("train.mmc", "test.mmc")]
    size = int(parts[0][0, 0]), int(parts[0][0, 1])
    return [(part[1:, 0].astype(np.int64) - 1, part[1:, 1].astype(np.int64) - 1, part[1:, 2]) for part in parts], size


def rmse(predicted, values):
    """The root of the mean squared error; NaN if a prediction is NaN."""
    return float(np.sqrt(np.mean((np.asarray(predicted) - values) ** 2)))


def add_options(parser, epochs, lr, regularization):
    """The options that all have; the defaults of each are its own."""
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--reg", type=float, default=regularization)
    parser.add_argument("--seed", type=int, default=1)
