"""Train RESCAL in torch on a folder's train.del: logistic loss, uniform negatives on both sides, Adagrad on sparse gradients.

The same work as the program here: per triple so many corrupted subjects and as many corrupted objects, each score with its part in the
gradients, one update per parameter of a batch. q = R^T s and p = R o are computed once per triple, and a batch's scores are two batched
products.
"""
import measure
import numpy as np
import torch
from torch.nn.functional import softplus


def main():
    parser = measure.parser(__doc__, ("folder", "train.del"))
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--negative", type=int, default=10, help="negatives per side")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--triples", type=int, default=0, help="the first so many (0: all)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    triples = torch.from_numpy(np.loadtxt(options.folder / "train.del", dtype=np.int64, delimiter="\t", ndmin=2))
    entities, relations = int(triples[:, [0, 2]].max()) + 1, int(triples[:, 1].max()) + 1
    triples = triples[:options.triples or None]
    entity = torch.nn.Embedding(entities, options.dim, sparse=True)
    relation = torch.nn.Embedding(relations, options.dim**2, sparse=True)
    for table in entity, relation:
        torch.nn.init.uniform_(table.weight, -0.07, 0.07)
    adagrad = torch.optim.Adagrad([*entity.parameters(), *relation.parameters()], lr=options.lr)
    total = 0.0
    with measure.Clock() as clock:
        for _ in range(options.epochs):
            order = torch.randperm(len(triples))
            for at in range(0, len(triples), options.batch):
                s, r, o = triples[order[at:at + options.batch]].T
                drawn = torch.randint(entities, (2, len(s), options.negative))
                es, eo, matrix = entity(s), entity(o), relation(r).view(-1, options.dim, options.dim)
                q = torch.bmm(es.unsqueeze(1), matrix).squeeze(1)
                p = torch.bmm(matrix, eo.unsqueeze(2)).squeeze(2)
                false = torch.bmm(entity(drawn[0]), p.unsqueeze(2)), torch.bmm(entity(drawn[1]), q.unsqueeze(2))
                loss = softplus(-(q * eo).sum(dim=1)).sum() + sum(softplus(scores).sum() for scores in false)
                adagrad.zero_grad(set_to_none=True)
                loss.backward()
                adagrad.step()
                total += float(loss)
    count = options.epochs * len(triples)
    measure.answer("torch", clock, triples=count, triples_per_cpu_s=count / clock.cpu, loss=total / count / (1 + 2 * options.negative))


if __name__ == "__main__":
    main()
