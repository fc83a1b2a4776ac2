"""Write the toy knowledge graph: python apps/data/make_triples.py [folder]

280 entities are of 40 kinds, 7 of each; each of 112 relations holds between all entities of one kind and all of another, but for a few
facts that are missing and a few that are noise. Five sixths of the facts are training data. Also written: who trains on what, on 2 nodes
x 2 threads and 4 x 1.
"""
import sys
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from apps.kge import partition

ENTITIES, RELATIONS, KINDS, MISSING, NOISE, SEED = 280, 112, 40, 0.02, 0.01, 4


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "kge")
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(SEED)
    kinds = random.permutation(ENTITIES).reshape(KINDS, -1)
    facts = []
    for relation in range(RELATIONS):
        first, second = random.choice(KINDS, 2, replace=False)
        facts += [(s, relation, o) for s in kinds[first].tolist() for o in kinds[second].tolist() if random.random() >= MISSING]
    facts += [(int(random.integers(ENTITIES)), relation, int(random.integers(ENTITIES)))
              for relation in range(RELATIONS) for _ in range(7 * 7) if random.random() < NOISE]
    facts = random.permutation(np.unique(np.array(facts), axis=0))
    held_out = len(facts) // 12
    for name, part in ("valid", facts[:held_out]), ("test", facts[held_out:2 * held_out]), ("train", facts[2 * held_out:]):
        (folder / f"{name}.del").write_text("".join([f"{s}\t{r}\t{o}\n" for s, r, o in part.tolist()]))
    for nodes, threads in (2, 2), (4, 1):
        partition.main([str(folder), str(nodes), str(threads)])


if __name__ == "__main__":
    main()
