"""The text and its vocabulary: files in, ranges and words out.

A vocabulary file has a line `word count` for each word, as the C program writes them. A text is read in place by whoever needs a part
of it; nothing of it stays in memory.
"""
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from apps.w2v._text import Vocabulary, begin_of

from apps.common.files import InputError, whole_file

__all__ = ["Text", "build_vocabulary", "open_text", "read_vocabulary", "write_vocabulary"]

MOST = 2**62
SENTENCE = b"</s>"              # what the C program counts newlines as, in the first line; it never is a word of a text there


@dataclass
class Text:
    """An open file of words."""

    path: Path
    fd: int
    size: int

    def ranges(self, parts):
        """Return `parts` ranges (first byte, the one behind the last) of about equal size; each word is in one of them."""
        borders = [begin_of(self.fd, self.size * part // parts, self.size) for part in range(parts)] + [self.size]
        return list(zip(borders, borders[1:]))

    def close(self):
        os.close(self.fd)


def open_text(path):
    """Return the Text in a file. InputError when there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)      # of a pipe nobody is waited for
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise InputError(f"{path} is not a regular file")
    return Text(Path(path), fd, status.st_size)


def build_vocabulary(paths, min_count):
    """Return the Vocabulary of all texts' words that occur often enough, and how many words there are in all. InputError when none does."""
    counted = Vocabulary()
    words = 0
    for path in paths:
        text = open_text(path)
        try:
            words += counted.count(text.fd, 0, text.size)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        finally:
            text.close()
    names = ", ".join(map(str, paths))
    if not words:
        raise InputError(f"{names} {'has' if len(paths) == 1 else 'have'} no words")
    kept = counted.keep(min_count)
    if len(kept) == 0:
        raise InputError(f"no word of {names} occurs {min_count} times (--min_count)")
    return kept, words


def read_vocabulary(path, min_count):
    """Return the Vocabulary in a file, without the words that are too rare. InputError when something is wrong with it."""
    read, total = Vocabulary(), 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                fields = line.split()
                if not fields or (number == 1 and fields[0] == SENTENCE):
                    continue
                if len(fields) != 2 or not fields[1].isdigit() or not 0 < int(fields[1]) < MOST:
                    raise InputError(f"{path}:{number}: the line is not a word and how often it occurs")
                total += int(fields[1])
                if total >= MOST:
                    raise InputError(f"{path}:{number}: the words occur {MOST} times or more, up to here")
                if not read.add(fields[0], int(fields[1])):
                    raise InputError(f"{path}:{number}: the word {fields[0].decode(errors='replace')} is there for the second time")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(read) == 0:
        raise InputError(f"{path} has no words")
    kept = read.keep(min_count)
    if len(kept) == 0:
        raise InputError(f"no word of {path} occurs {min_count} times (--min_count)")
    return kept


def write_vocabulary(path, vocabulary):
    """Write a vocabulary file, completely or not at all."""
    with whole_file(path) as file:
        for number, count in enumerate(vocabulary.frequencies().tolist()):
            file.write(b"%s %d\n" % (vocabulary.word(number), count))
