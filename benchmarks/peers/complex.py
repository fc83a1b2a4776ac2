"""Train PyKEEN's ComplEx on a folder of .del files with Adam, and rank test.del by it.

dim counts real numbers: 100 are 50 complex ones. wall and cpu are the training's alone.
"""
import measure
import ranks
import torch
from pykeen.models import ComplEx
from pykeen.regularizers import LpRegularizer
from pykeen.training import LCWATrainingLoop, SLCWATrainingLoop
from pykeen.utils import set_random_seed


def main():
    parser = measure.parser(__doc__, ("folder", "train.del, valid.del and test.del"))
    parser.add_argument("--dim", type=int, default=100, help="real numbers of an entity")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--loop", choices=("slcwa", "lcwa"), default="slcwa", help="lcwa scores every entity for each pair")
    parser.add_argument("--negative", type=int, default=10, help="negatives of a triple (slcwa)")
    parser.add_argument("--init", default="xavier_uniform", help="of PyKEEN: xavier_uniform, xavier_normal, normal, uniform …")
    parser.add_argument("--weight", type=float, default=0.01, help="of the L2 regularization; PyKEEN's default is 0.01")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rank", type=int, default=1, help="0: train only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_random_seed(options.seed)
    train, valid, test = ranks.read(options.folder)
    regularizer = LpRegularizer(weight=options.weight, p=2.0, normalize=True)
    model = ComplEx(triples_factory=train, embedding_dim=options.dim // 2, entity_initializer=options.init,
                    relation_initializer=options.init, regularizer=regularizer, random_seed=options.seed)
    adam = torch.optim.Adam(model.get_grad_params(), lr=options.lr)
    if options.loop == "lcwa":
        loop = LCWATrainingLoop(model=model, triples_factory=train, optimizer=adam)
    else:
        loop = SLCWATrainingLoop(model=model, triples_factory=train, optimizer=adam,
                                 negative_sampler_kwargs={"num_negs_per_pos": options.negative})
    with measure.Clock() as clock:
        losses = loop.train(triples_factory=train, num_epochs=options.epochs, batch_size=options.batch, use_tqdm=False)
    found = ranks.rank(model.eval(), train, valid, test) if options.rank else {}
    triples = options.epochs * train.num_triples
    measure.answer("pykeen", clock, triples=triples, triples_per_cpu_s=triples / clock.cpu, loss=losses[-1], **found)


if __name__ == "__main__":
    main()
