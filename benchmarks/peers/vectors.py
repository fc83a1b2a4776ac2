"""Measure word vectors in word2vec's text or binary format by gensim's own evaluators."""
import measure
from gensim.models import KeyedVectors

# gensim's default: questions with a word that is not among the 300,000 most frequent are left out.
VOCABULARY = 300_000


def qualities(vectors, folder):
    """Analogies (share right), WordSim353 and SimLex999 (Spearman), and how much of each was left out for an unknown word."""
    analogies, sections = vectors.evaluate_word_analogies(str(folder / "questions-words.txt"), restrict_vocab=VOCABULARY)
    asked = sum(len(section["correct"]) + len(section["incorrect"]) for section in sections[:-1])
    found = {"analogies": analogies, "analogies_asked": asked}
    for name, file in ("wordsim353", "wordsim353.tsv"), ("simlex999", "simlex999.txt"):
        _, spearman, unknown = vectors.evaluate_word_pairs(str(folder / file), restrict_vocab=VOCABULARY)
        found |= {name: float(spearman[0]), f"{name}_unknown_percent": float(unknown)}
    return found


def is_binary(path):
    """Whether the first vector of the file is not written in digits."""
    with path.open("rb") as file:
        file.readline()
        start = file.read(400).partition(b" ")[2]
    return any(byte not in b"0123456789+-.eE naif\n" for byte in start[:100])


def main():
    parser = measure.parser(__doc__, ("vectors", "the vectors"), ("folder", "of questions-words.txt, wordsim353.tsv, simlex999.txt"))
    options = parser.parse_args()
    vectors = KeyedVectors.load_word2vec_format(str(options.vectors), binary=is_binary(options.vectors))
    with measure.Clock() as clock:
        found = qualities(vectors, options.folder)
    measure.answer("gensim", clock, words=len(vectors), dim=vectors.vector_size, **found)


if __name__ == "__main__":
    main()
