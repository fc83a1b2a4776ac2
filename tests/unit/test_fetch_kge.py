"""Knowledge graphs: the formats of the packages, and the split."""
import sqlite3
from itertools import pairwise

import numpy as np
import pytest

from apps.data import fetch_kge, fetching
from apps.data.fetching import FetchError

NOUNS = b"""  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 + 00692329 a 0101 = 00001930 n 0000 | that which is; "one | two"
00001930 03 n 02 physical_entity 0 thing 1 002 @ 00001740 n 0000 + 00692329 a 0201 | an entity that has physical existence
"""
ADJECTIVES = b"""00692329 00 a 01 physical 0 003 + 00001930 n 0101 + 00001930 n 0102 & 00692762 a 0000 | involving the body
00692762 00 s 01 bodily 0 001 & 00692329 a 0000 | of the body
"""
VERBS = b"""00001740 29 v 01 breathe 0 001 $ 00001740 v 0000 02 + 02 00 + 08 00 | draw air
"""


def test_tab_separated():
    assert fetch_kge.tab_separated(b"head\trelation\ttail\na b\tr\tc\nc\tr\ta b\n", "x", head=1) == [("a b", "r", "c"), ("c", "r", "a b")]
    with pytest.raises(FetchError, match="x, line 2: 2 names, not 3"):
        fetch_kge.tab_separated(b"a\tr\tb\na\tr\n", "x")


def test_wordnet():
    entity, physical_entity = "entity.n.00001740", "physical_entity.n.00001930"
    physical, bodily = "physical.a.00692329", "bodily.a.00692762"
    assert fetch_kge.wordnet({"noun": NOUNS, "adj": ADJECTIVES, "verb": VERBS}) == [
        (entity, "hyponym", physical_entity), (entity, "derivationally_related_form", physical),
        (physical_entity, "hypernym", entity), (physical_entity, "derivationally_related_form", physical),
        (physical, "derivationally_related_form", physical_entity), (physical, "similar_to", bodily),
        (bodily, "similar_to", physical), ("breathe.v.00001740", "verb_group", "breathe.v.00001740")]


def test_wordnet_is_checked():
    with pytest.raises(FetchError, match=r"data\.noun, line 4 is not a line of WordNet"):
        fetch_kge.wordnet({"noun": NOUNS + b"half a line\n"})
    with pytest.raises(FetchError, match="WordNet has no sense at 'a00692329'"):
        fetch_kge.wordnet({"noun": NOUNS})


def test_connected():
    triangle = [("a", "r", "b"), ("b", "r", "c"), ("c", "r", "a")]
    assert fetch_kge.connected([*triangle, ("c", "r", "d"), ("d", "q", "c"), ("d", "q", "d")], 2) == triangle


def test_gene_ontology(tmp_path):
    path = tmp_path / "GO.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE go_term (_id INTEGER, go_id TEXT, term TEXT)")
        database.executemany("INSERT INTO go_term VALUES (?, ?, ?)", [(1, "GO:1", "cell part"), (2, "GO:2", "cell"), (3, "GO:3", "growth")])
        for table in "bp", "cc", "mf":
            database.execute(f"CREATE TABLE go_{table}_parents (_id INTEGER, _parent_id INTEGER, relationship_type TEXT)")
        database.execute("INSERT INTO go_cc_parents VALUES (1, 2, 'part of')")
        database.execute("INSERT INTO go_bp_parents VALUES (3, 2, 'isa')")
    database.close()
    assert fetch_kge.gene_ontology(path) == [("GO:3 growth", "isa", "GO:2 cell"), ("GO:1 cell part", "part_of", "GO:2 cell")]
    with pytest.raises(FetchError, match=r"GO\.sqlite is not what it should be"):
        fetch_kge.gene_ontology(tmp_path / "none.sqlite")


def graph(seed=1, entities=200, triples=3000):
    """Random triples, half of which have their inverse or are symmetric; no triple twice."""
    random = np.random.default_rng(seed)
    s, o = random.integers(0, entities, (2, triples))
    r = random.integers(0, 4, triples)
    both = np.concatenate([np.stack([s, r, o], 1), np.stack([o, r ^ 1, s], 1)[:triples // 2]])
    return np.unique(both, axis=0)


def pairs(triples):
    return {frozenset((s, o)) for s, _, o in triples.tolist()}


def test_split():
    triples = graph()
    parts = fetch_kge.split(triples, 300, seed=1)
    assert sorted(map(tuple, np.concatenate(parts).tolist())) == sorted(map(tuple, triples.tolist()))
    train, valid, test = parts
    assert all(300 <= len(part) < 310 for part in (valid, test))
    for one, other in ((train, valid), (train, test), (valid, test)):
        assert not pairs(one) & pairs(other)
    for part in valid, test:
        assert set(part[:, [0, 2]].flat) <= set(train[:, [0, 2]].flat)
        assert set(part[:, 1]) <= set(train[:, 1])
    again, other = fetch_kge.split(triples, 300, seed=1), fetch_kge.split(triples, 300, seed=2)
    assert all((one == two).all() for one, two in zip(parts, again))
    assert pairs(other[2]) != pairs(test)
    assert any(one > two for one, two in pairwise(train[:, 0])), "train is shuffled"


def test_split_of_single_triples():
    triples = graph()
    train, valid, test = fetch_kge.split(triples, 300, seed=1, together=False)
    assert sorted(map(tuple, np.concatenate([train, valid, test]).tolist())) == sorted(map(tuple, triples.tolist()))
    assert (len(valid), len(test)) == (300, 300)
    assert len(pairs(train) & pairs(test)) > 50


def test_split_leaves_each_entity_in_train():
    """In a tree a leaf's only triple cannot be held out, nor a relation's only one: what is left is one triple, fewer than wanted."""
    triples = np.array([(0, 0, 1), (0, 0, 2), (1, 0, 3), (1, 1, 4), (4, 0, 5)])
    train, valid, test = fetch_kge.split(triples, 2, seed=1)
    assert (len(train), valid.tolist(), len(test)) == (4, [[0, 0, 1]], 0)


def test_files(tmp_path):
    parts, entities, relations = fetch_kge.numbered([[("b", "q", "a"), ("a", "r", "é")], [], [("é", "q", "a")]])
    fetch_kge.write(tmp_path, parts, entities, relations)
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {
        "train.del": "1\t0\t0\n0\t1\t2\n", "valid.del": "", "test.del": "2\t0\t0\n", "entity_ids.del": "0\ta\n1\tb\n2\té\n",
        "relation_ids.del": "0\tq\n1\tr\n"}


def test_changed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "python_package", lambda requirement, names: dict.fromkeys(names, b"a\tr\tb\n"))
    with pytest.raises(FetchError, match=r"pykeen/datasets/umls/train\.txt in pykeen==1\.11\.1 is not the file that it was"):
        fetch_kge.fill("umls", 0, 1, tmp_path)
    monkeypatch.setattr(fetching, "check", lambda data, sha256, what: data)
    with pytest.raises(FetchError, match="umls has 2 entities, 1 relations and 3 triples, not 135, 46 and 6529 as it had"):
        fetch_kge.fill("umls", 0, 1, tmp_path)
    assert not list(tmp_path.iterdir())
