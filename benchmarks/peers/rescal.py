"""Train RESCAL in torch on a folder's train.del: logistic loss, negatives on both sides, AdaGrad, one batch after the other.

The negatives are uniform and drawn for each triple, gradients are written out (no autograd), and only what a batch has touched is updated.
A batch is put in the order of its relations, each of which is one matrix product for all its triples.
"""
import measure
import numpy as np
import torch

START = 1e-6                    # of AdaGrad's sums
SCALE = 0.07                    # of the random start


def update(values, sums, ids, gradients, eta):
    """A step of AdaGrad for the rows that ids name, which may name one several times."""
    rows, which = torch.unique(ids, return_inverse=True)
    gradient = torch.zeros(len(rows), *gradients.shape[1:]).index_add_(0, which, gradients)
    found = sums[rows].addcmul_(gradient, gradient)
    sums[rows] = found
    values[rows] -= eta * gradient / found.sqrt_()


def through(matrices, ends, left, right):
    """left R and R right of each triple; ends: for each relation of the batch where its triples begin and end."""
    q, p = torch.empty_like(left), torch.empty_like(right)
    for number, begin, end in ends:
        torch.mm(left[begin:end], matrices[number], out=q[begin:end])
        torch.mm(right[begin:end], matrices[number].T, out=p[begin:end])
    return q, p


class Model:
    def __init__(self, entities, relations, options):
        self.options = options
        self.e = torch.empty(entities, options.dim).uniform_(-SCALE, SCALE)
        self.r = torch.empty(relations, options.dim, options.dim).uniform_(-SCALE, SCALE)
        self.e_sums, self.r_sums = torch.full_like(self.e, START), torch.full_like(self.r, START)

    def train(self, batch):
        """One step; batch: [triples, 3], in the order of the relations. Returns the summed loss of all scores."""
        n, options = len(batch), self.options
        negatives, dim = options.negative, options.dim
        subjects, objects = batch[:, 0], batch[:, 2]
        numbers, counts = torch.unique_consecutive(batch[:, 1], return_counts=True)
        stops = counts.cumsum(0).tolist()
        ends = list(zip(numbers.tolist(), [0, *stops[:-1]], stops))
        others = torch.randint(len(self.e), (2, n, negatives))         # in place of the objects, of the subjects
        s, o, e_o, e_s = self.e[subjects], self.e[objects], self.e[others[0]], self.e[others[1]]
        q, p = through(self.r, ends, s, o)
        true, of_objects, of_subjects = (q * o).sum(1), torch.bmm(e_o, q.unsqueeze(2)).squeeze(2), torch.bmm(e_s, p.unsqueeze(2)).squeeze(2)
        loss = (torch.nn.functional.softplus(-true).sum() + torch.nn.functional.softplus(of_objects).sum()
                + torch.nn.functional.softplus(of_subjects).sum())
        g, g_o, g_s = torch.sigmoid(true).sub_(1).unsqueeze(1), of_objects.sigmoid_(), of_subjects.sigmoid_()
        to_q = torch.bmm(g_o.unsqueeze(1), e_o).squeeze(1).addcmul_(g, o)       # q: what the objects are multiplied with
        to_p = torch.bmm(g_s.unsqueeze(1), e_s).squeeze(1)
        gradient = torch.empty(len(ends), dim, dim)
        to_s, to_o = torch.empty_like(s), torch.empty_like(o)                       # by way of q, and of p
        for at, (number, begin, end) in enumerate(ends):
            matrix = self.r[number]
            torch.mm(s[begin:end].T, to_q[begin:end], out=gradient[at])
            gradient[at].addmm_(to_p[begin:end].T, o[begin:end])
            torch.mm(to_p[begin:end], matrix, out=to_o[begin:end])
            torch.mm(to_q[begin:end], matrix.T, out=to_s[begin:end])
        to_o.addcmul_(g, q)
        ids = torch.cat([subjects, objects, others.reshape(-1)])
        changes = torch.cat([to_s, to_o, (g_o.unsqueeze(2) * q.unsqueeze(1)).reshape(-1, dim),
                             (g_s.unsqueeze(2) * p.unsqueeze(1)).reshape(-1, dim)])
        update(self.e, self.e_sums, ids, changes, options.eta)
        update(self.r, self.r_sums, numbers, gradient, options.eta)
        return float(loss)


def main():
    parser = measure.parser(__doc__, ("folder", "train.del"))
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--entities", type=int, default=14_000)
    parser.add_argument("--relations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--negative", type=int, default=10, help="negatives of a triple and side")
    parser.add_argument("--eta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    triples = torch.from_numpy(np.loadtxt(options.folder / "train.del", dtype=np.int64, delimiter="\t", ndmin=2))
    model = Model(options.entities, options.relations, options)
    scores = len(triples) * (1 + 2 * options.negative)
    losses = []
    with measure.Clock() as clock, torch.no_grad():
        for _ in range(options.epochs):
            loss = 0.0
            for batch in triples[torch.randperm(len(triples))].split(options.batch):
                loss += model.train(batch[batch[:, 1].argsort()])
            losses.append(loss / scores)
    done = options.epochs * len(triples)
    measure.answer("torch", clock, triples=done, triples_per_cpu_s=done / clock.cpu, loss=losses[-1])


if __name__ == "__main__":
    main()
