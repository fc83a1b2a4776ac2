"""Fetch a knowledge graph and write it as train.del, valid.del and test.del, entity_ids.del and relation_ids.del.

    python apps/data/fetch_kge.py umls|kinships|nations|films|wordnet|gene_ontology [--out FOLDER] [--whole 1] [--together 0]

A line of a .del file of triples is subject, relation and object, numbers separated by tabs; of the ids, the number and the name.

umls, kinships, nations: small graphs of medicine, kinship and politics, with the splits that the literature uses; out of PyPI's pykeen
    1.11.1.
films: films and those who made them, a part of Freebase; out of PyPI's recbole 1.2.1.
wordnet: WordNet 3.0, senses of words under the 18 relations of WN18; out of Debian's wordnet-base. Only senses with at least three
    neighbours (counted once, before any is left out), or all of them with --whole 1.
gene_ontology: terms and their parents under 5 relations; out of Debian's r-bioc-go.db.

The last three have no split of their own. Here about 5,000 triples are held out for each of valid and test, drawn with a seed. In films and
wordnet nearly every triple has its inverse in the graph (a film's director, the films of a director), from which a model could copy
it; so all triples between two entities, in both directions, are held out together or not at all. With --together 0 each triple is drawn by
itself, as in WN18: what a model then reaches says how well it remembers inverses. Only entities and relations that are left in train are in
valid and test.
"""
import sqlite3
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from apps.data import fetching
from apps.data.fetching import FetchError

HELD_OUT, SPLIT_SEED = 5000, 100
NEIGHBOURS = 3                  # a sense of WordNet needs so many
OFFICIAL = ("umls", "kinships", "nations")
PARTS = ("train", "valid", "test")
PYKEEN, RECBOLE = "pykeen==1.11.1", "recbole==1.2.1"
FILMS = "recbole/dataset_example/ml-100k/ml-100k.kg"

SHA256 = {
    "umls/train.txt": "873ef4925516b83e7f6f8cc02b4be51d848828710a7f65a956f0ac4a9e452f35",
    "umls/valid.txt": "025c98f8a4891e2a6582ec5b40ee0d904031edad9c52554522f4b7904820c98e",
    "umls/test.txt": "a7eb529a3d2810fcc96341ccc97c625a5e202f8389673aa6bd317eeebbb79014",
    "kinships/train.txt": "738612111a6acf0e39662bde24c7e72a4d1edf20931beea077da367dda689731",
    "kinships/valid.txt": "c56f8630a583178b1e569f11a64aa535ae1ce0b0912d8b1e24716be2b37f04da",
    "kinships/test.txt": "05e5733265761d55be9c05bfaff5a8d0808df46f9c1e9d66cc3f2fe114e43d88",
    "nations/train.txt": "0830fa9da8e5bba2ccdaa45b7bdc9130451ba66b09ff2708f35fccaf82473e57",
    "nations/valid.txt": "2b337a62e51a2f45c283eac98a70d21b7e0e102136be1539b2a52c652a7b0530",
    "nations/test.txt": "3971085165b47b6aeaec68058c6d8d98b3005e929db81268410b95ae4db770ab",
    "films": "200a0636fa07c218119a42e5bac7aa3e26e3665a6f919c1b22909bd412b14779",
}
COUNTS = {                      # entities, relations, triples of all parts
    "umls": (135, 46, 6529), "kinships": (104, 25, 10686), "nations": (14, 55, 1992), "films": (34628, 24, 91631),
    "wordnet": (37876, 18, 148993), "wordnet, whole": (112199, 18, 346720), "gene_ontology": (43559, 5, 85716),
}
LICENCES = {
    "umls": "UMLS semantic network (McCray, 2003; Kok and Domingos, ICML 2007), as published with PyKEEN (MIT licence).",
    "kinships": "Alyawarra kinships (Denham, 1973; Kemp et al., AAAI 2006), as published with PyKEEN (MIT licence).",
    "nations": "Dimensionality of Nations (Rummel, 1950-1965; Kemp et al., AAAI 2006), as published with PyKEEN (MIT licence).",
    "films": "A part of Freebase (Google; CC BY 2.5), linked to MovieLens by KB4Rec (Zhao et al., 2019), as published with RecBole (MIT).",
    "wordnet": "WordNet 3.0, Copyright 2006 by Princeton University. All rights reserved. Free to use, copy, modify and distribute with "
               "this notice (WordNet 3.0 license).",
    "gene_ontology": "Gene Ontology (Ashburner et al., 2000; Gene Ontology Consortium; CC BY 4.0), as published with Bioconductor's GO.db.",
}

# Pointers of WordNet's data files, by the names of WN18.
POINTERS = {
    "@": "hypernym", "~": "hyponym", "@i": "instance_hypernym", "~i": "instance_hyponym", "#m": "member_holonym", "%m": "member_meronym",
    "#p": "part_of", "%p": "has_part", ";c": "synset_domain_topic_of", "-c": "member_of_domain_topic", ";r": "synset_domain_region_of",
    "-r": "member_of_domain_region", ";u": "synset_domain_usage_of", "-u": "member_of_domain_usage", "+": "derivationally_related_form",
    "&": "similar_to", "^": "also_see", "$": "verb_group",
}
KINDS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


# --- the formats: each returns (subject, relation, object), names --------------------------------------------------------------------

def tab_separated(data, what, head=0):
    """Triples out of lines of three names between tabs, without the first `head` lines."""
    triples = []
    for number, line in enumerate(data.decode("utf-8").splitlines()[head:], head + 1):
        words = line.split("\t")
        if len(words) != 3 or not all(words):
            raise FetchError(f"{what}, line {number}: {len(words)} names, not 3")
        triples.append(tuple(words))
    return triples


def wordnet(files):
    """Triples out of {"noun": data.noun, …}, whose lines are described in WordNet's wndb(5WN). A sense is named lemma.kind.offset."""
    names, found = {}, {}                   # a dict keeps the order of the files, and no triple twice
    for kind, data in files.items():
        for number, line in enumerate(data.decode("latin-1").splitlines(), 1):
            if line.startswith("  "):       # the licence
                continue
            try:
                words = line.partition(" | ")[0].split(" ")
                sense, first = KINDS[kind] + words[0], 4 + 2 * int(words[3], 16)
                names[sense] = f"{words[4]}.{KINDS[kind]}.{words[0]}"
                for at in range(first + 1, first + 1 + 4 * int(words[first]), 4):
                    if words[at] in POINTERS:
                        found[sense, POINTERS[words[at]], words[at + 2].replace("s", "a") + words[at + 1]] = None
            except (ValueError, IndexError):
                raise FetchError(f"data.{kind}, line {number} is not a line of WordNet") from None
    try:
        return [(names[s], relation, names[o]) for s, relation, o in found]
    except KeyError as error:
        raise FetchError(f"WordNet has no sense at {error}") from None


def connected(triples, least):
    """The triples both of whose entities have at least so many neighbours (among all triples)."""
    neighbours = Counter(entity for pair in {frozenset((s, o)) for s, _, o in triples} if len(pair) == 2 for entity in pair)
    return [triple for triple in triples if neighbours[triple[0]] >= least and neighbours[triple[2]] >= least]


def gene_ontology(path):
    """Triples child, relation, parent out of GO.db's SQLite file."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            names = dict(database.execute("SELECT _id, go_id || ' ' || term FROM go_term"))
            triples = [(names[child], relation.replace(" ", "_"), names[parent]) for table in ("bp", "cc", "mf") for child, relation, parent
                       in database.execute(f"SELECT _id, relationship_type, _parent_id FROM go_{table}_parents ORDER BY 1, 3, 2")]
        database.close()
    except (sqlite3.Error, KeyError) as error:
        raise FetchError(f"GO.sqlite is not what it should be: {error}") from None
    return triples


# --- numbers and splits ------------------------------------------------------------------------------------------------------------------

def numbered(parts):
    """Number entities and relations in the order of their names; return arrays of triples, and both lists of names."""
    entities = sorted({name for part in parts for s, _, o in part for name in (s, o)})
    relations = sorted({relation for part in parts for _, relation, _ in part})
    of_entity, of_relation = ({name: number for number, name in enumerate(names)} for names in (entities, relations))
    return [np.array([(of_entity[s], of_relation[r], of_entity[o]) for s, r, o in part], np.int64).reshape(-1, 3) for part in parts], \
        entities, relations


def split(triples, held_out, seed, together=True):
    """Split an array of triples into train, valid and test: at least `held_out` in each of the last two if that many can be spared.

    together: all triples between the same two entities are in one part. What is held out leaves each of its entities and relations in
    train.
    """
    ends = np.sort(triples[:, [0, 2]], axis=1)
    group = np.unique(ends, axis=0, return_inverse=True)[1] if together else np.arange(len(triples))
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    entity_left = np.bincount(np.concatenate([triples[:, 0], triples[:, 2]]))
    relation_left = np.bincount(triples[:, 1])
    where, filled, part = np.zeros(len(triples), np.int8), 0, 1
    for number in np.random.default_rng(seed).permutation(len(members)):
        own = triples[members[number]]
        entities, uses = np.unique(own[:, [0, 2]], return_counts=True)
        kinds, times = np.unique(own[:, 1], return_counts=True)
        if (entity_left[entities] <= uses).any() or (relation_left[kinds] <= times).any():
            continue
        entity_left[entities] -= uses
        relation_left[kinds] -= times
        where[members[number]] = part
        filled += len(own)
        if filled >= held_out:
            part, filled = part + 1, 0
            if part > 2:
                break
    shuffled = np.random.default_rng(seed).permutation(len(triples))
    return [triples[shuffled[where[shuffled] == part]] for part in range(3)]


# --- the sets --------------------------------------------------------------------------------------------------------------------------

def official(name):
    members = {part: f"pykeen/datasets/{name}/{part}.txt" for part in PARTS}
    files = fetching.python_package(PYKEEN, members.values())
    parts = [tab_separated(fetching.check(files[member], SHA256[f"{name}/{part}.txt"], f"{member} in {PYKEEN}"), member)
             for part, member in members.items()]
    return numbered(parts)


def own_split(triples, together):
    (table,), entities, relations = numbered([triples])
    fetching.progress("splitting")
    return split(table, HELD_OUT, SPLIT_SEED, together), entities, relations


def films(together):
    data = fetching.python_package(RECBOLE, [FILMS])[FILMS]
    return own_split(tab_separated(fetching.check(data, SHA256["films"], f"{FILMS} in {RECBOLE}"), FILMS, head=1), together)


def wordnet_of_package(whole, together):
    with fetching.debian_package("wordnet-base") as package:
        files = {kind: fetching.read(package / "usr/share/wordnet" / f"data.{kind}") for kind in KINDS}
    triples = wordnet(files)
    return own_split(triples if whole else connected(triples, NEIGHBOURS), together)


def gene_ontology_of_package(together):
    with fetching.debian_package("r-bioc-go.db") as package:
        return own_split(gene_ontology(package / "usr/lib/R/site-library/GO.db/extdata/GO.sqlite"), together)


def write(folder, parts, entities, relations):
    for name, part in zip(PARTS, parts):
        (folder / f"{name}.del").write_text("".join(f"{s}\t{r}\t{o}\n" for s, r, o in part.tolist()))
    for name, names in ("entity_ids.del", entities), ("relation_ids.del", relations):
        (folder / name).write_text("".join(f"{number}\t{text}\n" for number, text in enumerate(names)), encoding="utf-8")


def fill(name, whole, together, folder):
    """Write the files of a set; return a sentence about it."""
    if name in OFFICIAL:
        parts, entities, relations = official(name)
    else:
        fetch = {"films": films, "wordnet": partial(wordnet_of_package, whole), "gene_ontology": gene_ontology_of_package}[name]
        parts, entities, relations = fetch(together)
    counts = len(entities), len(relations), sum(map(len, parts))
    expected = COUNTS["wordnet, whole" if name == "wordnet" and whole else name]
    if counts != expected:
        raise FetchError("{} has {} entities, {} relations and {} triples, not {}, {} and {} as it had".format(name, *counts, *expected))
    write(folder, parts, entities, relations)
    return f"{counts[0]} entities, {counts[1]} relations; {' + '.join(str(len(part)) for part in parts)} triples"


def main():
    parser = fetching.parser(__doc__)
    parser.add_argument("name", choices=LICENCES, help="the graph")
    parser.add_argument("--out", type=Path, help="where to write (default: build/data/NAME)")
    parser.add_argument("--whole", type=int, choices=(0, 1), default=0, help="wordnet: every sense (default: 0)")
    parser.add_argument("--together", type=int, choices=(0, 1), default=1, help="triples between two entities stay together (default: 1)")
    options = parser.parse_args()
    if options.name in OFFICIAL and not options.together:
        parser.error("--together is for a graph without a split of its own")
    if options.whole and options.name != "wordnet":
        parser.error("--whole is for wordnet")
    out = options.out or Path("build/data") / (options.name + "_whole" * options.whole + "_apart" * (1 - options.together))
    made = {"name": options.name, "whole": options.whole, "together": options.together, "seed": SPLIT_SEED, "format": 1}
    return fetching.main("fetch_kge", LICENCES[options.name], out, made, partial(fill, options.name, options.whole, options.together))


if __name__ == "__main__":
    sys.exit(main())
