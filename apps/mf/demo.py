"""What `make demo` shows: a model trains on real ratings while its parameters relocate between two nodes.

Fetches MovieLens 100K (or, without a registry, takes the synthetic ratings of this tree), runs apps/matrix_factorization on 2 local
nodes, shows what comes of each epoch, and draws loss and locality over time. Exit code 1 when the test RMSE is above 0.93 stars.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from apps.data import fetch_movielens, fetching  # noqa: E402
from apps.mf.movielens import FOLDER, SETTINGS  # noqa: E402

SYNTHETIC = ROOT / "apps/data/ratings"
GOAL = 0.93                     # test RMSE
NODES, RANK = 2, 100


def find_data():
    """Return the folder of the data; the first line that is printed says so when it is not the real one."""
    try:
        if not fetching.already(FOLDER, fetch_movielens.MADE):
            with fetching.new_folder(FOLDER, fetch_movielens.MADE) as folder:
                fetch_movielens.fill(folder)
    except (fetching.FetchError, OSError) as error:
        print(f"FALLBACK: no MovieLens 100K ({error}); training on the synthetic ratings of {SYNTHETIC.relative_to(ROOT)}", flush=True)
        return SYNTHETIC
    print(fetch_movielens.LICENCE, flush=True)
    return FOLDER


class Progress:
    """A bar on the terminal where tqdm is installed and somebody watches; lines in any case."""

    def __init__(self, epochs):
        self.bar = None
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm
            self.bar = tqdm(total=epochs, unit="epoch", desc="training", leave=False)

    def show(self, text, step=0):
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)
            self.bar.update(step)

    def close(self):
        if self.bar is not None:
            self.bar.close()


def describe(result):
    return (f"epoch {result['epoch']:2}: test RMSE {result['test_rmse']:.4f}, train {result['train_rmse']:.4f}, "
            f"{100 * result['local_share']:.2f} % of accesses local, {result['relocations']} relocations, {result['seconds']:.3f} s")


def train(data, out):
    """Run the program; return its exit code and the results of its epochs."""
    report = out / "epochs.jsonl"
    report.unlink(missing_ok=True)
    settings = {"--rank": RANK, **SETTINGS[RANK]}
    options = [str(word) for pair in settings.items() for word in pair]
    command = [sys.executable, "-m", "lapse", "run", "-s", str(NODES), sys.executable, "apps/matrix_factorization.py", "--dataset",
               str(data), *options, "--output", str(out / "factors"), "--report", str(report)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    results, log = [], []
    progress = Progress(settings["--epochs"])
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        for line in process.stdout:
            log.append(line)
            if line.startswith("[node 0] epoch "):
                results = [json.loads(row) for row in report.read_text().splitlines(True) if row.endswith("\n")]
                progress.show(describe(results[-1]), min(results[-1]["epoch"], 1))
    progress.close()
    if process.returncode:
        sys.stderr.writelines(log)
    return process.returncode, results


def plot(results, path):
    """Draw loss and locality over time; needs matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    times = [result["total_seconds"] for result in results]
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), layout="constrained")
    top.plot(times, [result["train_rmse"] for result in results], label="training")
    top.plot(times, [result["test_rmse"] for result in results], label="test")
    top.axhline(GOAL, color="grey", linewidth=0.8, linestyle=":", label=f"goal {GOAL}")
    top.set_ylabel("RMSE")
    top.legend()
    bottom.plot(times[1:], [100 * result["local_share"] for result in results[1:]], color="tab:green")
    bottom.set_ylabel("local accesses (%)", color="tab:green")
    bottom.set_ylim(min(95, *[100 * result["local_share"] - 1 for result in results]), 100.5)
    bottom.set_xlabel("seconds")
    right = bottom.twinx()
    right.step(times[1:], [result["relocations"] for result in results[1:]], where="mid", color="tab:orange", alpha=0.7)
    right.set_ylabel("relocations per epoch", color="tab:orange")
    right.set_ylim(bottom=0)
    figure.suptitle(f"Matrix factorization on {NODES} nodes: loss and locality")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER.parents[1] / "demo",
                        help="folder for the plot, the numbers and the factors (default: %(default)s)")
    out = parser.parse_args().out.resolve()
    data = find_data()
    out.mkdir(parents=True, exist_ok=True)
    code, results = train(data, out)
    if code:
        return code
    best, last = min(result["test_rmse"] for result in results), results[-1]
    if importlib.util.find_spec("matplotlib"):
        plot(results, out / "demo.png")
        print(f"loss and locality over time: {out / 'demo.png'}")
    else:
        print("no plot: matplotlib is not installed (pip install 'lapse[apps]')")
    print(f"factors: {out / 'factors'}; numbers: {out / 'epochs.jsonl'}")
    moved = sum(result["relocations"] for result in results)
    good = last["test_rmse"] <= GOAL
    print(f"test RMSE {last['test_rmse']:.4f} after {last['epoch']} epochs (best {best:.4f}), {'at most' if good else 'ABOVE'} {GOAL}; "
          f"{moved} relocations, {100 * sum(r['local_share'] for r in results[1:]) / max(len(results) - 1, 1):.2f} % local")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
