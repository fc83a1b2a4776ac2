"""Make apps/data/lm/small.txt: the first 100,000 words of C. H. Spurgeon's Treasury of David, a sentence a line, out of Debian's package.

    python apps/data/make_small_text.py apps/data/lm/small.txt
"""
import argparse
import re
import sys
from collections import Counter
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from apps.data import fetching
from apps.data.fetch_text import DEBIAN, words

PACKAGE, WORDS = "sword-comm-tdavid", 100_000


def sentences(paragraphs, count):
    """The sentences of paragraphs, as lists of words, until there are `count` words; the last one may be cut."""
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?])\W", paragraph):
            found = words(sentence)[:count]
            if found:
                yield found
                count -= len(found)
            if not count:
                return


def main():
    parser = argparse.ArgumentParser(description="Make the small text of apps/data/lm.")
    parser.add_argument("file", type=Path, help="where to write")
    file = parser.parse_args().file
    try:
        with fetching.debian_package(PACKAGE) as files:
            lines = list(sentences(DEBIAN[PACKAGE](files), WORDS))
    except fetching.FetchError as error:
        sys.exit(f"make_small_text: {error}")
    file.write_text("".join(f"{' '.join(line)}\n" for line in lines))
    counts = Counter(word for line in lines for word in line)
    frequent = [count for count in counts.values() if count >= 5]
    sys.stdout.write(f"{counts.total()} words in {len(lines)} lines; {len(frequent)} words occur five times or more, "
                     f"{sum(frequent)} times in all\n")


if __name__ == "__main__":
    main()
