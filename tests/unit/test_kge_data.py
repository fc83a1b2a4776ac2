"""What surrounds the training of knowledge-graph embeddings: triples in files, their partition, ranks, checkpoints."""
import json
import os

import numpy as np
import pytest

pytest.importorskip("apps.kge._kernel", reason="the kernels are not built: make kernels")
from apps.kge._ranking import count_ranks, pack, panels_for

from apps.common.files import InputError
from apps.kge import data, partition
from apps.kge.checkpoints import Checkpoint, write_checkpoint
from apps.kge.data import read_triples
from apps.kge.evaluation import Evaluation, Known, summary
from apps.kge.layout import Layout

# --- files -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"0\t1\t2\n3\t0\t1\n", b"0 1 2\r\n3 0 1\r\n", b"\n 0\t1  2 \n\n3\t0\t1", b"00\t1\t2\n3\t0\t001\n\n"])
def test_triples_of_a_file(tmp_path, text):
    path = tmp_path / "train.del"
    path.write_bytes(text)
    found = read_triples(path, 4, 2)
    assert found.tolist() == [[0, 1, 2], [3, 0, 1]] and found.dtype == np.int32


def test_blocks_do_not_show(tmp_path, monkeypatch):
    rows = np.random.default_rng(1).integers([5000, 30, 5000, 8], size=(3000, 4))
    path = tmp_path / "train.del"
    path.write_text("\n".join("\t".join(map(str, row)) for row in rows.tolist()))
    for block in (1 << 21, 4096, 100, 31):
        monkeypatch.setattr(data, "BLOCK", block)
        triples, workers = read_triples(path, 5000, 30, 8)
        assert (triples == rows[:, :3]).all() and (workers == rows[:, 3]).all()


@pytest.mark.parametrize(("line", "what"), [
    ("1\t1", "is not 3 whole numbers"), ("1\t1\t1\t1", "is not 3 whole numbers"), ("1\tx\t1", "is not 3"), ("1\t1\t-1", "is not 3"),
    ("1\t1\t1.5", "is not 3"), ("1\t1\t1x", "is not 3"), ("9\t1\t1", "has entity 9, but --num_entities is 9"), ("\x00", "is not 3"),
    ("1\t1\t99999999999999999999", "has entity [0-9]+, but"), ("1\t2\t1", "has relation 2, but --num_relations is 2"),
    ("1" * 20000, "has entity 1+, but")])
@pytest.mark.parametrize("block", [1 << 21, 64])
def test_what_is_no_triple(tmp_path, monkeypatch, line, what, block):
    monkeypatch.setattr(data, "BLOCK", block)
    path = tmp_path / "train.del"
    path.write_text("0\t0\t0\n" * 30 + f"\n{line}\n" + "0\t0\t0\n" * 30)
    with pytest.raises(InputError, match=f"train.del:32: the line {what}"):
        read_triples(path, 9, 2)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.del")
    with pytest.raises(InputError, match="is not a regular file"):
        read_triples(tmp_path / "train.del", 5, 5)


def test_files_without_triples(tmp_path):
    (tmp_path / "train.del").write_text("\n\n")
    with pytest.raises(InputError, match=r"train.del has no triples"):
        read_triples(tmp_path / "train.del", 9, 2)
    with pytest.raises(InputError, match=r"none.del: No such file"):
        read_triples(tmp_path / "none.del", 9, 2)
    (tmp_path / "part.del").write_text("0\t0\t0\t4\n")
    with pytest.raises(InputError, match=r"part.del:1: the line has worker 4, but there are 4"):
        read_triples(tmp_path / "part.del", 9, 2, 4)


# --- partition ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("nodes", "threads"), [(1, 1), (2, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_partition_is_balanced_and_by_relation(nodes, threads, skew):
    random = np.random.default_rng(3)
    weights = 1 / np.arange(1, 61) ** skew
    triples = np.column_stack((np.arange(20000), random.choice(60, 20000, p=weights / weights.sum()), np.arange(20000)))
    workers = partition.partition(triples, nodes, threads)
    sizes = np.bincount(workers, minlength=nodes * threads)
    assert len(sizes) == nodes * threads and sizes.max() <= 1.06 * 20000 / len(sizes)
    homes = [len(np.unique(workers[triples[:, 1] == relation] // threads)) for relation in range(60)]
    counts = np.bincount(triples[:, 1], minlength=60)
    cut = [relation for relation in range(60) if homes[relation] > 1]
    assert len(cut) <= nodes - 1 + (counts > 20000 / nodes).sum()


def test_partition_file(tmp_path, capsys):
    triples = np.random.default_rng(1).integers([50, 9, 50], size=(400, 3))
    (tmp_path / "train.del").write_text("".join(f"{s}\t{r}\t{o}\n" for s, r, o in triples.tolist()))
    assert partition.main([str(tmp_path), "2", "3"]) == 0
    assert "triples per worker" in capsys.readouterr().out
    found, workers = read_triples(tmp_path / "train.partitioned.2x3.del", 50, 9, 6)
    assert (found == triples).all() and np.bincount(workers).min() > 50
    assert partition.main([str(tmp_path / "none"), "2", "3"]) == 2 and "none/train.del: No such file" in capsys.readouterr().err


# --- ranks -------------------------------------------------------------------------------------------------------------------------------

def ranks_by_hand(vectors, queries, targets, known):
    out = []
    for query, target, others in zip(queries, targets, known):
        scores = vectors @ query
        for left_out in (set(), set(others) - {target}):
            kept = [i for i in range(len(vectors)) if i != target and i not in left_out]
            out.append([(~(scores[kept] <= scores[target])).sum(), (scores[kept] == scores[target]).sum()])
    return np.array(out).reshape(-1, 4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("instructions", [0, 1, 2])
@pytest.mark.parametrize("entities", [1, 15, 16, 17, 700, 1100])
def test_ranks_are_those_by_hand(entities, instructions, dtype):
    """Small whole numbers: sums are exact, and ties are many."""
    random = np.random.default_rng(entities)
    vectors, queries = (random.integers(-2, 3, size=(n, 6)).astype(dtype) for n in (entities, 21))
    targets = random.integers(entities, size=21).astype(np.int32)
    known = [np.unique(np.append(random.integers(entities, size=random.integers(9)), target)) for target in targets]
    ends = np.cumsum([len(one) for one in known])
    panels = panels_for(entities, 6, dtype)
    pack(panels, vectors[:entities // 2], 0)
    pack(panels, vectors[entities // 2:], entities // 2)
    found = count_ranks(panels, entities, queries, targets, ends - [len(one) for one in known], ends,
                        np.concatenate(known).astype(np.int32), instructions)
    assert (found == ranks_by_hand(vectors, queries, targets, known)).all()


def test_scores_that_are_no_numbers_rank_last():
    vectors = np.random.default_rng(1).normal(size=(40, 4))
    vectors[7] = np.nan
    panels = panels_for(40, 4, np.float64)
    pack(panels, vectors, 0)
    found = count_ranks(panels, 40, np.ones((2, 4)), np.array([7, 3], dtype=np.int32), np.zeros(2, dtype=np.int64),
                        np.zeros(2, dtype=np.int64), np.zeros(0, dtype=np.int32))
    assert found[0].tolist() == [39, 0, 39, 0]
    assert found[1, 0] == (np.nan_to_num(vectors.sum(axis=1), nan=np.inf) > vectors[3].sum()).sum()


@pytest.mark.parametrize("rescal", [False, True])
def test_evaluation_is_that_by_hand(rescal, serve):
    import lapse
    random = np.random.default_rng(5)
    layout = Layout(30, 4, 6, rescal, 3 if rescal else 1, random.permutation(30 + 4 * (3 if rescal else 1)).astype(np.int64))
    server = serve(layout.lengths(0), num_keys=layout.keys, dtype="float64")
    kv = lapse.Worker(0, server)
    entities, relations = random.normal(size=(30, 6)), random.normal(size=(4, 36 if rescal else 6))
    for kind, values in enumerate((entities, relations)):
        layout.set(kv, kind, 0, len(values), values, values)
    triples = np.unique(random.integers([30, 4, 30], size=(200, 3)), axis=0).astype(np.int32)
    triples = random.permutation(triples)
    test = triples[:40]
    evaluation = Evaluation(layout, "float64", {"test": test}, triples)
    for part in range(3):
        evaluation.refresh(kv, part, 3)
    parts = [evaluation.measure(kv, me, 4) for me in range(4)]
    found = summary({name: np.array([part.get(name, 0.0) for part in parts]) for name in parts[0]}, ["test"])["test"]

    def scores(s, r, o):
        if rescal:
            return np.einsum("ni,ij,nj->n", s, r.reshape(6, 6), o)
        s, r, o = (x[..., :3] + 1j * x[..., 3:] for x in (s, r, o))
        return (s * r * o.conj()).sum(axis=-1).real
    ranks = {"": [], "raw_": []}
    facts = set(map(tuple, triples.tolist()))
    for s, r, o in test.tolist():
        for place in (0, 2):
            candidates = [(e, r, o) if place == 0 else (s, r, e) for e in range(30)]
            found_scores = scores(*[np.stack([table[c[k]] for c in candidates]) if table is entities else relations[r]
                                    for k, table in ((0, entities), (1, relations), (2, entities))])
            true = found_scores[s if place == 0 else o]
            for setting in ranks:
                kept = [x for c, x in zip(candidates, found_scores) if setting or c not in facts]
                ranks[setting].append(1 + sum(x > true + 1e-12 for x in kept))
    for setting, values in ranks.items():
        values = np.array(values)
        assert found[f"{setting}mrr"] == pytest.approx((1 / values).mean()) and found[f"{setting}mr"] == pytest.approx(values.mean())
        for most in (1, 3, 10):
            assert found[f"{setting}hits{most}"] == pytest.approx((values <= most).mean())


def test_known_entities():
    triples = np.array([[0, 1, 5], [0, 1, 3], [0, 1, 3], [2, 0, 5], [4, 1, 5]])
    known = Known(triples, 2, 2)
    begins, ends = known.ranges(np.array([[0, 1, 9], [2, 0, 0], [7, 1, 1]]))
    assert [known.entities[a:b].tolist() for a, b in zip(begins, ends)] == [[3, 5], [5], []]
    known = Known(triples, 0, 2)
    begins, ends = known.ranges(np.array([[9, 1, 5]]))
    assert known.entities[begins[0]:ends[0]].tolist() == [0, 4]


# --- checkpoints -------------------------------------------------------------------------------------------------------------------------

def model(layout, seed=1):
    random = np.random.default_rng(seed)
    shapes = (layout.entities, layout.dim), (layout.relations, layout.dim ** (2 if layout.rescal else 1))
    return [[random.normal(size=shape).astype(np.float32) for _ in range(2)] for shape in shapes]


@pytest.mark.parametrize("rescal", [False, True])
def test_checkpoints(tmp_path, rescal):
    layout, other = Layout(1000, 7, 100 if not rescal else 30, rescal), Layout(1000, 7, 20, rescal)
    values = model(layout)

    def pull(kind, begin, end):
        return [array[begin:end] for array in values[kind]]
    (tmp_path / "entity_ids.del").write_text("0\tzero\n")
    for _ in range(2):          # the second takes the place of the first
        write_checkpoint(tmp_path / "out", 3, layout, "float32", tmp_path, pull)
        values = model(layout, 2)
    folder = tmp_path / "out/epoch-3"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["epoch-3"]
    assert (folder / "entity_ids.del").read_text() == "0\tzero\n" and (folder / "relation_ids.del").read_text().startswith("0\t0\n1\t1\n")
    assert np.load(folder / "relations.npy").shape == layout.relation_shape
    checkpoint = Checkpoint(folder, layout)
    assert checkpoint.epoch == 3
    for kind, begin, end in ((0, 10, 20), (1, 2, 7)):
        for found, right in zip(checkpoint.read(kind, begin, end, np.dtype("float64")), pull(kind, begin, end)):
            assert found.dtype == np.float64 and (found == right).all()
    for wrong, what in ((other, "its embed_dim is"), (Layout(1001, 7, layout.dim, rescal), "its num_entities is 1000, but here it is 1001"),
                        (Layout(1000, 8, layout.dim, rescal), "its num_relations"),
                        (Layout(1000, 7, layout.dim, not rescal), "its algorithm")):
        with pytest.raises(InputError, match=what):
            Checkpoint(folder, wrong)
    with pytest.raises(InputError, match="no checkpoint"):
        Checkpoint(tmp_path, layout)
    (folder / "entities.npy").write_bytes((folder / "entities.npy").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"entities.npy is no complete array"):
        Checkpoint(folder, layout)
    (folder / "entities.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"entities.npy is no complete array"):
        Checkpoint(folder, layout)
    for text in "{", "[]", "{}", json.dumps({"version": 9, "epoch": 1}), json.dumps({"version": 1, "epoch": "1"}):
        (folder / "checkpoint.json").write_text(text)
        with pytest.raises(InputError, match=r"its checkpoint.json is none of this"):
            Checkpoint(folder, layout)


def test_a_checkpoint_that_fails_leaves_what_was_there(tmp_path):
    layout = Layout(1000, 7, 100)
    values = model(layout)
    write_checkpoint(tmp_path, 3, layout, "float32", tmp_path, lambda kind, begin, end: [array[begin:end] for array in values[kind]])
    before = (tmp_path / "epoch-3/entities.npy").read_bytes()

    def fail(kind, begin, end):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(tmp_path, 3, layout, "float32", tmp_path, fail)
    assert str(caught.value.filename).endswith("epoch-3")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-3"] and (tmp_path / "epoch-3/entities.npy").read_bytes() == before
