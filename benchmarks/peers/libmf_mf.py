"""Train LIBMF on a folder with train.mmc and test.mmc. What it predicts is computed here from its P and Q: its own predict is wrong."""
import measure
import numpy as np
import ratings
from libmf import mf


def main():
    parser = measure.parser(__doc__, ("folder", "train.mmc and test.mmc"))
    ratings.add_options(parser, epochs=20, lr=0.1, regularization=0.05)
    options = parser.parse_args()
    (train, test), size = ratings.read(options.folder)
    table = np.column_stack(train).astype(np.float32)
    model = mf.MF(k=options.rank, nr_iters=options.epochs, eta=options.lr, lambda_p1=0.0, lambda_q1=0.0, lambda_p2=options.reg,
                  lambda_q2=options.reg, nr_threads=1, quiet=True)
    with measure.Clock() as clock:
        model.fit(table)
    # A row or column without a training cell has no factors, or NaN: the mean is predicted.
    factors = [np.full((count, options.rank), np.nan) for count in size]
    for target, found in zip(factors, (model.p_factors(), model.q_factors())):
        target[:len(found)] = found[:, :options.rank]
    rows, cols, values = test
    predicted = np.einsum("nr,nr->n", factors[0][rows], factors[1][cols])
    predicted[np.isnan(predicted)] = model.model.b
    updates = options.epochs * len(train[2])
    measure.answer("libmf", clock, updates=updates, updates_per_cpu_s=updates / clock.cpu, rmse=ratings.rmse(predicted, values))


if __name__ == "__main__":
    main()
