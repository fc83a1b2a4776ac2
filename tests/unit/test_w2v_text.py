"""Words out of a text, the vocabulary, ranges of a text, and the files of vectors."""
import collections
import dataclasses
import errno
import os
import random

import numpy as np
import pytest

text_module = pytest.importorskip("apps.w2v._text", reason="the kernels are not built: make kernels")
from apps.w2v._text import LONGEST_WORD, Vocabulary, begin_of  # noqa: E402

from apps.common.files import InputError, check_file, whole_file  # noqa: E402
from apps.common.program import Report  # noqa: E402
from apps.w2v.output import read_checkpoint, write_checkpoint, write_vectors  # noqa: E402
from apps.w2v.text import build_vocabulary, open_text, read_vocabulary, write_vocabulary  # noqa: E402

TEXTS = {
    "plain": b"a b c\nb c\nc\n",
    "no newline at the end": b"a b c\nb c",
    "no newline": b"one two three two",
    "CRLF": b"a b\r\nb c\r\n\r\n",
    "blank lines": b"\n\n \n\t\na\n\n\nb  a \x0b\x0c\n\n",
    "only blanks": b" \n \t\r\n",
    "nothing": b"",
    "one word": b"word",
    "bytes": bytes(range(256)) * 3 + b"\xff\xfe \x00 \x00 \xc3\xa4 \xc3\xa4\n",
    "long line": b" ".join(b"w%d" % (i * i % 97) for i in range(60_000)),
    "long word": b"a " + b"x" * 200_000 + b" b " + b"y" * LONGEST_WORD + b"\nc " + b"z" * 70_000,
    "many lines": b"".join(b"%d %d\n" % (i, i % 7) for i in range(30_000)),
}


def words_of(content):
    """What counts as words: a word that is too long counts as its first bytes."""
    return collections.Counter(word[:LONGEST_WORD] for word in content.split())


def counted(path, ranges):
    fd = os.open(path, os.O_RDONLY)
    try:
        vocabulary = Vocabulary()
        words = sum(vocabulary.count(fd, begin, end) for begin, end in ranges)
    finally:
        os.close(fd)
    found = {vocabulary.word(i): int(count) for i, count in enumerate(vocabulary.frequencies())}
    assert len(found) == len(vocabulary) and words == vocabulary.total == sum(found.values())
    for i in range(len(vocabulary)):
        assert vocabulary.number(vocabulary.word(i)) == i
    return found


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_words_are_those_of_split(tmp_path, content):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert counted(path, [(0, len(content))]) == words_of(content)


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_each_word_is_in_one_range(tmp_path, content, parts):
    path = tmp_path / "text"
    path.write_bytes(content)
    text = open_text(path)
    ranges = text.ranges(parts)
    text.close()
    assert len(ranges) == parts and ranges[0][0] == 0 and ranges[-1][1] == len(content)
    assert all(begin <= end for begin, end in ranges) and all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
    assert counted(path, ranges) == words_of(content)


@pytest.mark.parametrize("near", [1, 2, 5, 30])
def test_ranges_begin_between_words_wherever_they_are_cut(tmp_path, near):
    """At every byte of a text, for any reach of the search; behind a newline where one is near."""
    chars = random.Random(near).choices(b"ab \n\r\t", weights=[5, 5, 2, 1, 1, 1], k=400)
    content = bytes(chars)
    path = tmp_path / "text"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    begins = [begin_of(fd, position, len(content), near) for position in range(len(content) + 2)]
    os.close(fd)
    assert begins == sorted(begins)
    for position, begin in enumerate(begins):
        assert begin in (0, len(content)) or content[begin - 1:begin].isspace()
        assert position <= begin or position > len(content)
        newline = content.find(b"\n", position - 1)
        if position and 0 <= newline - (position - 1) < near:
            assert begin == newline + 1


def test_the_vocabulary_grows_and_is_ordered(tmp_path):
    """100,000 different words; by falling count, then by their bytes."""
    content = b" ".join(b"%d" % (i % 1000 if i % 3 else i) for i in range(300_000))
    path = tmp_path / "text"
    path.write_bytes(content)
    expected = words_of(content)
    kept, words = build_vocabulary([path], 2)
    assert words == 300_000
    order = sorted(((-count, word) for word, count in expected.items() if count >= 2))
    assert [kept.word(i) for i in range(len(kept))] == [word for _, word in order]
    assert kept.frequencies().tolist() == [-less for less, _ in order] and kept.total == sum(kept.frequencies())
    assert kept.number(b"not there") == -1
    with pytest.raises(IndexError):
        kept.word(len(kept))


def test_several_texts_have_one_vocabulary(tmp_path):
    for i, content in enumerate((b"a b b", b"b c")):
        (tmp_path / f"text.{i}").write_bytes(content)
    kept, words = build_vocabulary([tmp_path / "text.0", tmp_path / "text.1"], 1)
    assert words == 5 and [kept.word(i) for i in range(3)] == [b"b", b"a", b"c"]


def test_a_text_that_cannot_be_read(tmp_path):
    with pytest.raises(OSError) as caught:
        Vocabulary().count(os.open(tmp_path, os.O_RDONLY), 0, 10)
    assert caught.value.errno == errno.EISDIR
    for content, what in ((b"", "has no words"), (b" \n", "has no words"), (b"a b", "no word of .* occurs 2 times")):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(InputError, match=what):
            build_vocabulary([tmp_path / "text"], 2)


# --- files ----------------------------------------------------------------------------------------------------------------------

def some_vocabulary(count=2500):
    vocabulary = Vocabulary()
    for i in range(count):
        vocabulary.add(b"\xc3\xa4%d" % i, count - i)
    return vocabulary


def test_a_vocabulary_survives_its_file(tmp_path):
    vocabulary = some_vocabulary()
    write_vocabulary(tmp_path / "v", vocabulary)
    again = read_vocabulary(tmp_path / "v", 1)
    assert [again.word(i) for i in range(len(again))] == [vocabulary.word(i) for i in range(2500)]
    assert again.frequencies().tolist() == vocabulary.frequencies().tolist()
    assert len(read_vocabulary(tmp_path / "v", 100)) == 2401
    (tmp_path / "v").write_bytes(b"</s> 1000\nthe 7\n\na 3\n")              # as the C program writes it
    again = read_vocabulary(tmp_path / "v", 1)
    assert [again.word(i) for i in range(len(again))] == [b"the", b"a"] and again.total == 10


@pytest.mark.parametrize(("content", "what"), [
    (b"a 5\nb\n", ":2: the line is not"), (b"a 5 6\n", ":1: the line is not"), (b"a x\n", ":1: the line is not"),
    (b"a 0\n", ":1: the line is not"), (b"a -1\n", ":1: the line is not"), (b"a 99999999999999999999\n", ":1: the line is not"),
    (b"a 5\nb 3\na 2\n", ":3: the word a is there for the second time"), (b"", "has no words"), (b"a 1\n", "occurs 2 times")])
def test_a_bad_vocabulary(tmp_path, content, what):
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(InputError, match=what):
        read_vocabulary(tmp_path / "v", 2)


def parse_vectors(content, binary):
    """Read a word2vec file as its description says, byte by byte."""
    head, _, rest = content.partition(b"\n")
    words, dim = map(int, head.split())
    found = {}
    for _ in range(words):
        word, _, rest = rest.partition(b" ")
        if binary:
            found[word] = np.frombuffer(rest[:4 * dim], dtype="<f4")
            assert rest[4 * dim:4 * dim + 1] == b"\n"
            rest = rest[4 * dim + 1:]
        else:
            line, _, rest = rest.partition(b"\n")
            found[word] = np.array(line.split(), dtype=np.float32)
        assert found[word].shape == (dim,)
    assert not rest
    return found


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_word2vec_formats(tmp_path, binary, dtype):
    vocabulary = some_vocabulary()
    vectors = np.random.default_rng(1).normal(size=(2500, 7)).astype(dtype) * 10.0**np.random.default_rng(2).integers(-9, 9, (2500, 7))
    vectors = vectors.astype(dtype)
    write_vectors(tmp_path / "vectors", vocabulary, lambda begin, end: vectors[begin:end], 7, binary)
    found = parse_vectors((tmp_path / "vectors").read_bytes(), binary)
    assert list(found) == [vocabulary.word(i) for i in range(2500)]
    assert np.array_equal(np.array(list(found.values())), vectors.astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["vectors"]


@pytest.mark.parametrize("binary", [False, True])
def test_gensim_loads_the_vectors(tmp_path, binary):
    models = pytest.importorskip("gensim.models")
    vocabulary, vectors = some_vocabulary(), np.random.default_rng(1).normal(size=(2500, 7)).astype(np.float32)
    write_vectors(tmp_path / "vectors", vocabulary, lambda begin, end: vectors[begin:end], 7, binary)
    loaded = models.KeyedVectors.load_word2vec_format(str(tmp_path / "vectors"), binary=binary)
    assert loaded.index_to_key == [vocabulary.word(i).decode() for i in range(2500)]
    assert np.array_equal(loaded.vectors, vectors)


def test_checkpoints(tmp_path):
    vocabulary, values = some_vocabulary(), np.random.default_rng(1).normal(size=(2, 2500, 5)).astype(np.float32)

    def write(epoch, factor=1):
        write_checkpoint(tmp_path, epoch, vocabulary, lambda which, begin, end: factor * values[which, begin:end], 5, np.dtype("float32"))
    write(2)
    write(9, 3)
    write(10, 2)
    write(10, 4)            # again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-10", "epoch-2", "epoch-9"]
    for path, factor in ((tmp_path, 4), (tmp_path / "epoch-9", 3), (tmp_path / "epoch-2", 1)):
        assert np.array_equal(read_checkpoint(path, vocabulary, 5), factor * values)
    with pytest.raises(InputError, match="vectors of 5 numbers, but --embed_dim is 6"):
        read_checkpoint(tmp_path, vocabulary, 6)
    with pytest.raises(InputError, match="of 2500 words, but the vocabulary has 2499"):
        read_checkpoint(tmp_path, some_vocabulary(2499), 5)
    other = some_vocabulary(2499)
    other.add(b"else", 1)
    with pytest.raises(InputError, match=r"vocabulary.txt:2500: the word is .*2499, but else"):
        read_checkpoint(tmp_path, other, 5)
    with pytest.raises(InputError, match="there is no such folder"):
        read_checkpoint(tmp_path / "none", vocabulary, 5)
    (tmp_path / "epoch-10/output.npy").write_bytes((tmp_path / "epoch-10/output.npy").read_bytes()[:-5])
    with pytest.raises(InputError, match=r"output.npy is not a whole .npy file"):
        read_checkpoint(tmp_path, vocabulary, 5)


def test_a_checkpoint_whose_folder_cannot_be_renamed_leaves_the_last_one(tmp_path, monkeypatch):
    vocabulary, values = some_vocabulary(), np.random.default_rng(1).normal(size=(2, 2500, 5)).astype(np.float32)

    def write(factor):
        write_checkpoint(tmp_path, 1, vocabulary, lambda which, begin, end: factor * values[which, begin:end], 5, np.dtype("float32"))
    write(1)
    rename, calls = os.replace, []

    def replace(source, target):
        if str(target).endswith("epoch-1") and not calls:
            calls.append(source)
            raise OSError(errno.EIO, "Input/output error", str(source), None, str(target))
        rename(source, target)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=r"Input/output error: '[^']*epoch-1'$"):
        write(2)
    assert calls and [path.name for path in tmp_path.iterdir()] == ["epoch-1"]
    assert np.array_equal(read_checkpoint(tmp_path, vocabulary, 5), values)


def test_a_report_that_does_not_fit_names_its_file():
    @dataclasses.dataclass
    class Result:
        epoch: int

    report = Report("/dev/full", quiet=True)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        report(Result(1))


def test_no_file_takes_the_place_of_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path / "pipe", "is not a regular file"), (tmp_path, "Is a directory")):
        with pytest.raises(OSError, match=what), whole_file(path) as file:
            file.write(b"no")
        with pytest.raises(InputError, match=what):
            check_file("--out", path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and not (tmp_path / "pipe").is_file()
    check_file("--report", "/dev/null", appended=True)
    with pytest.raises(InputError, match="--out /dev/null: is not a regular file"):
        check_file("--out", "/dev/null")


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path):
    def pull(which, begin, end):
        if which == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return np.zeros((end - begin, 5), dtype=np.float32)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, 1, some_vocabulary(), pull, 5, np.dtype("float32"))
    assert not list(tmp_path.iterdir())
