"""Train cornac's MF (SGD, with biases of users and items unless --biases 0) on a folder with train.mmc and test.mmc."""
import measure
import numpy as np
import ratings
from cornac.data import Dataset
from cornac.models import MF


def main():
    parser = measure.parser(__doc__, ("folder", "train.mmc and test.mmc"))
    ratings.add_options(parser, epochs=20, lr=0.01, regularization=0.02)
    parser.add_argument("--biases", type=int, choices=(0, 1), default=1)
    options = parser.parse_args()
    (train, test), size = ratings.read(options.folder)
    users, items = ({number: number for number in range(count)} for count in size)
    data = Dataset(*size, users, items, (train[0], train[1], train[2].astype(np.float32)))
    model = MF(k=options.rank, max_iter=options.epochs, learning_rate=options.lr, lambda_reg=options.reg, use_bias=bool(options.biases),
               early_stop=False, num_threads=1, seed=options.seed, verbose=False)
    with measure.Clock() as clock:
        model.fit(data)
    rows, cols, values = test
    found = np.einsum("nr,nr->n", model.u_factors[rows], model.i_factors[cols])
    if options.biases:
        found = found + model.global_mean + model.u_biases[rows] + model.i_biases[cols]
    updates = options.epochs * len(train[2])
    measure.answer("cornac", clock, updates=updates, updates_per_cpu_s=updates / clock.cpu, rmse=ratings.rmse(found, values))


if __name__ == "__main__":
    main()
