"""Train gensim's skip-gram with negative sampling on a text, one sentence a line; the vocabulary is counted before the clock starts."""
import measure
import vectors
from gensim.models import Word2Vec


def main():
    parser = measure.parser(__doc__, ("text", "the text"))
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--negative", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--min_count", type=int, default=5)
    parser.add_argument("--sample", type=float, default=1e-3, help="threshold of subsampling")
    parser.add_argument("--alpha", type=float, default=0.025)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--evaluate", type=measure.Path, help="folder of the questions: measure the vectors too")
    parser.add_argument("--output", help="write the vectors there, in word2vec's text format")
    options = parser.parse_args()
    model = Word2Vec(sg=1, hs=0, vector_size=options.dim, window=options.window, negative=options.negative, min_count=options.min_count,
                     sample=options.sample, alpha=options.alpha, seed=options.seed, workers=1)
    model.build_vocab(corpus_file=str(options.text))
    with measure.Clock() as clock:
        effective, words = model.train(corpus_file=str(options.text), total_words=model.corpus_total_words, epochs=options.epochs)
    if options.output:
        model.wv.save_word2vec_format(options.output)
    found = vectors.qualities(model.wv, options.evaluate) if options.evaluate else {}
    measure.answer("gensim", clock, words=words, words_per_cpu_s=words / clock.cpu, effective_words=effective,
                   effective_words_per_cpu_s=effective / clock.cpu, vocabulary=len(model.wv), **found)


if __name__ == "__main__":
    main()
