"""The text: the formats of the packages, what of it is kept."""
import gzip
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest

from apps.data import fetch_text, make_small_text
from apps.data.fetching import FetchError

SMALL = Path(__file__).resolve().parents[2] / "apps/data/lm/small.txt"


def found(paragraphs):
    return [" ".join(fetch_text.words(text)) for text in paragraphs if fetch_text.words(text)]


def test_words():
    assert fetch_text.words("Don't over-act: Café Σ 3rd") == ["don", "t", "over", "act", "cafe", "rd"]


def test_dictionary():
    entries = """Abdicative \\Ab"di*ca*tive\\, a. [L. abdicativus.]
   Causing, or implying, abdication. [R.] --Bailey.
   [1913 Webster]

Abditory
   A place for hiding.
   [1913 Webster +PJC]
"""
    assert found(fetch_text.dictionary(gzip.compress(entries.encode()))) == [
        "abdicative a l abdicativus causing or implying abdication r bailey", "abditory a place for hiding"]


def test_page():
    data = b"""<html><head><title>Not this</title></head><body><div class="related"><p>nor</p><div>this</div></div>
    <div class="body" role="main"><h1>A head<a class="headerlink" href="#x">mark</a></h1><p>First <em>one</em>,<br>on.</p>
    <pre>code()</pre><ul><li>Two &amp; three</li><li><p>four</p></li></ul>left over</div></body></html>"""
    assert found(fetch_text.page(data)) == ["a head", "first one on", "two three", "four", "left over"]


@pytest.mark.parametrize("wide", [False, True])
def test_sword(wide):
    texts = [b'<p>In the <w lemma="x">beginning</w><note>not this</note> was</p><lb/>a second', b"the &quot;word&quot;"]
    blocks = [zlib.compress(texts[0] + b"unused"), zlib.compress(b"???" + texts[1])]
    index = struct.pack("<III", 0, len(blocks[0]), 0) + struct.pack("<III", len(blocks[0]), len(blocks[1]), 0)
    layout = "<III" if wide else "<IIH"
    verses = struct.pack(layout, 0, 0, 0) + struct.pack(layout, 1, 3, len(texts[1])) + struct.pack(layout, 0, 0, len(texts[0]))
    assert found(fetch_text.sword(index, b"".join(blocks), verses, wide)) == ["the word", "in the beginning was", "a second"]


def test_glosses():
    data = b"  1 This software\n00001740 03 n 01 entity 0 000 | that which is; \"one\"  \n"
    assert found(fetch_text.glosses(data)) == ["that which is one"]


def test_tagged():
    assert found(fetch_text.tagged(b"\n\tThe/at Fulton/np-tl jury/nn said/vbd ``/`` no/at ./.\n\n")) == ["the fulton jury said no"]


def test_first():
    lines = ["a b c", "d e", "f"]
    assert fetch_text.first(lines, 6) == lines
    assert fetch_text.first(lines, 5) == lines[:2]
    assert fetch_text.first(lines, 4) == lines[:1]


def test_count_is_checked(capsys):
    fetch_text.check_count("a", 100_050, 100_000)
    assert not capsys.readouterr().err
    fetch_text.check_count("a", 110_000, 100_000)
    assert capsys.readouterr().err == "a has 110,000 words, not 100,000 as when this was written\n"
    for count in 0, 70_000, 130_000:
        with pytest.raises(FetchError, match=f"a has {count:,} words, not about 100,000"):
            fetch_text.check_count("a", count, 100_000)


def test_each_package_has_a_reader():
    assert set(fetch_text.WORDS) == set(fetch_text.DEBIAN) | set(fetch_text.NPM)


def test_sentences():
    paragraphs = ["One two. Three! Is it four?", "", "Five 'six.' seven eight"]
    assert list(make_small_text.sentences(paragraphs, 8)) == [["one", "two"], ["three"], ["is", "it", "four"], ["five", "six"]]
    assert list(make_small_text.sentences(paragraphs, 4)) == [["one", "two"], ["three"], ["is"]]


def test_small_text():
    """The committed text: what its README says, which the command lines of word2vec rely on."""
    data = SMALL.read_bytes()
    assert len(data) < 700_000
    assert data.endswith(b"\n")
    assert set(data) <= set(b"abcdefghijklmnopqrstuvwxyz \n")
    lines = data.decode().splitlines()
    counts = Counter(word for line in lines for word in line.split(" "))
    assert counts.total() == 100_000
    assert max(line.count(" ") for line in lines) < 1000
    assert 2 * sum(count >= 5 for count in counts.values()) <= 4970
