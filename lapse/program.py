"""What every program on Lapse does in the same way: run its worker threads, and end with the right exit code."""
import logging
import sys
import threading

__all__ = ["run_program", "run_workers"]


def run_program(main):
    """Run `main()` and end the process with its result as exit code (None: 0).

    A failure of the job ends with one sentence on stderr and exit code 1, Ctrl-C with 130. Any other exception is the
    program's own and keeps its traceback.
    """
    from lapse.errors import Interrupted, LapseError
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = main() or 0
    except (KeyboardInterrupt, Interrupted):
        code = 130
    except LapseError as error:
        sys.stdout.flush()
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = 1
    sys.exit(code)


def run_workers(num_threads, work):
    """Call `work(0)` … `work(num_threads - 1)`, each in its own thread; return their results in this order.

    The first exception of a worker is raised here at once, without waiting for the others (they may be waiting for the
    one that has failed), and so is KeyboardInterrupt. The threads are daemons: they do not hold up the end of the process.
    """
    results = [None] * num_threads
    failures = []
    changed = threading.Condition()
    running = num_threads

    def run(index):
        nonlocal running
        failure = None
        try:
            results[index] = work(index)
        except BaseException as error:
            failure = error
        with changed:
            running -= 1
            if failure is not None:
                failures.append(failure)
            changed.notify()

    threads = [threading.Thread(target=run, args=(index,), name=f"worker {index}", daemon=True)
               for index in range(num_threads)]
    for thread in threads:
        thread.start()
    with changed:
        while running and not failures:
            changed.wait()
    if failures:
        raise failures[0]
    for thread in threads:
        thread.join()
    return results
