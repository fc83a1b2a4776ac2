"""Train Surprise's SVD (SGD, with biases of users and items unless --biases 0) on a folder with train.mmc and test.mmc."""
import measure
import numpy as np
import ratings
from surprise import SVD, Reader, Trainset


def trainset(cells, size):
    """Surprise's own structure, whose inner ids are the numbers of rows and columns."""
    by_user, by_item = {}, {}
    for row, col, value in zip(*(part.tolist() for part in cells)):
        by_user.setdefault(row, []).append((col, value))
        by_item.setdefault(col, []).append((row, value))
    scale = Reader(rating_scale=(float(cells[2].min()), float(cells[2].max()))).rating_scale
    return Trainset(by_user, by_item, *size, len(cells[2]), scale, {i: i for i in range(size[0])}, {i: i for i in range(size[1])})


def main():
    parser = measure.parser(__doc__, ("folder", "train.mmc and test.mmc"))
    ratings.add_options(parser, epochs=20, lr=0.005, regularization=0.02)
    parser.add_argument("--biases", type=int, choices=(0, 1), default=1)
    options = parser.parse_args()
    (train, test), size = ratings.read(options.folder)
    data = trainset(train, size)
    _ = data.global_mean                # counted now, and kept
    model = SVD(n_factors=options.rank, n_epochs=options.epochs, biased=bool(options.biases), lr_all=options.lr, reg_all=options.reg,
                random_state=options.seed)
    with measure.Clock() as clock:
        model.fit(data)
    rows, cols, values = test
    found = np.einsum("nr,nr->n", model.pu[rows], model.qi[cols])
    if options.biases:
        found = found + data.global_mean + model.bu[rows] + model.bi[cols]
    updates = options.epochs * len(train[2])
    measure.answer("scikit-surprise", clock, updates=updates, updates_per_cpu_s=updates / clock.cpu, rmse=ratings.rmse(found, values))


if __name__ == "__main__":
    main()
