"""Sampling on two nodes: what is local, what is localized ahead, what is postponed; ends that nobody asked for."""
import numpy as np
import pytest

import lapse
from lapse._build import kind
from tests.unit.sampling_common import K

# --- local

def test_local_keys_alone(serve):
    """One node of one: all is local, and nothing is sent for it."""
    server = serve(2, num_keys=K, shared_memory=True)
    server.enable_sampling_support("local", seed=2)
    with lapse.Worker(0, server) as kv:
        before = server.stats().received_messages
        keys = np.empty(1000, np.int64)
        kv.pull_sample(kv.prepare_sample(1000), keys)
        stats = server.stats()
    assert (stats.received_messages, stats.pulled.local, stats.pulled.remote) == (before, 1000, 0)


LOCAL = """
    import numpy as np, lapse
    from tests.cluster.common import fits, shares_of
    from tests.unit import sampling_probe
    K = 20_000
    rank_0_has = {has}
    lapse.setup(K, 1)
    server = lapse.Server(1, dtype="int64")
    rng = np.random.default_rng(3)
    distribution = {distribution}
    server.enable_sampling_support("local", {replacement}, distribution, seed=1)
    kv = lapse.Worker(0, server)
    rank = server.my_rank()
    if rank == 0:
        kv.set(range(K), np.arange(K))
    kv.barrier()
    if rank == 1:
        kv.localize(np.arange(K))
    kv.barrier()
    shares = shares_of(distribution, K) if isinstance(distribution, str) else distribution / np.sum(distribution)
    if rank == 0:
        for count in rank_0_has:
            some = rng.permutation(K)[:count]
            kv.localize(some)
            local = server.is_local(np.arange(K))
            before = server.stats()
            {body}
            after = server.stats()
            assert after.sent_messages == before.sent_messages, (before, after)
            assert after.sample_fallbacks == before.sample_fallbacks
    kv.barrier()
    kv.finalize()
    server.shutdown()
    """

DRAWS = """
            drawn = [sampling_probe.draw(kv, 50, 50) for _ in range(400)]
            keys, vals = np.empty(10, np.int64), np.empty(10, np.int64)
            for _ in range(200):
                kv.pull_sample(kv.prepare_sample(10), keys, vals)
                assert (keys == vals).all()
                drawn.append(keys.copy())
            drawn = np.concatenate(drawn)
            assert local[drawn].all()
            assert fits(np.bincount(drawn, minlength=K), shares * local, 3.72), (count, np.flatnonzero(local), np.unique(drawn))
"""
DIFFERENT = """
            for n in (1, local.sum() // 2, local.sum()):
                drawn = sampling_probe.draw(kv, n, 16)
                assert len(np.unique(drawn)) == n and local[drawn].all()
"""


@pytest.mark.parametrize("distribution", ['"uniform"', '"log-uniform"', "rng.random(K)**3 + 1e-6"])
def test_local_draws_on_two_nodes(run_program, distribution):
    """Of few keys (which are listed), of more, of most: every local key with its share, nothing else, and no message for it."""
    run_program(LOCAL.format(has="(3, 5, 40, 20, 300, 3000, 15_000)", distribution=distribution, replacement=True, body=DRAWS), nodes=2)


@pytest.mark.parametrize("distribution", ['"uniform"', "rng.random(K)**3 + 1e-6"])
def test_different_local_draws_on_two_nodes(run_program, distribution):
    run_program(LOCAL.format(has="(3, 30, 20, 300, 3000)", distribution=distribution, replacement=False, body=DIFFERENT), nodes=2)


def test_local_keys_that_have_come_back(run_program):
    """A key that leaves and returns counts once, whether it is in the list of local keys or came after that was made."""
    run_program("""
        import numpy as np, lapse
        from tests.cluster.common import fits
        from tests.unit import sampling_probe
        K = 20_000
        lapse.setup(K, 1)
        server = lapse.Server(1)
        server.enable_sampling_support("local", seed=1)
        kv = lapse.Worker(0, server)
        rank = server.my_rank()
        kv.barrier()
        if rank == 1:
            kv.localize(np.arange(K))
        kv.barrier()
        if rank == 0:
            kv.localize(np.arange(100, 110))
            sampling_probe.draw(kv, 1000, 10)           # makes the list
            kv.localize(np.arange(200, 205))
        for _ in range(10):
            kv.barrier()
            if rank == 1:
                kv.localize([105, 203])
            kv.barrier()
            if rank == 0:
                kv.localize([203, 105])
                counts = np.bincount(sampling_probe.draw(kv, 3000, 10), minlength=K)
                assert fits(counts, server.is_local(np.arange(K)), 3.72), np.flatnonzero(counts)
        kv.barrier()
        kv.finalize()
        server.shutdown()
        """, nodes=2)


NOTHING = """
    import numpy as np, lapse
    K = 1000
    lapse.setup(K, 1)
    server = lapse.Server(1, dtype="int64")
    rank = server.my_rank()
    server.enable_sampling_support("local", {replacement}, {distribution}, 0, 500, seed=1)
    kv = lapse.Worker(0, server)
    if rank == 0:
        kv.set(range(K), np.arange(K))
    kv.barrier()
    if rank == 1:
        kv.localize(np.arange(500))
    kv.barrier()
    if rank == 0:
        def draw(n):
            keys, vals = np.empty(n, np.int64), np.empty(n, np.int64)
            kv.pull_sample(kv.prepare_sample(n), keys, vals)
            assert (keys == vals).all()
            assert keys.max() < 500
            return keys
        for _ in range(50):
            assert len(np.unique(draw(10))) > 1
        stats = server.stats()
        assert stats.sample_fallbacks == stats.sampled == 500
        assert stats.pulled.remote == 500
        kv.localize([600, 700])                 # outside
        draw(10)
        assert server.stats().sample_fallbacks == 510
        kv.localize([77])                       # now there is one
        assert draw(1)[0] == 77
        if {replacement}:
            assert (draw(100) == 77).all()
            assert server.stats().sample_fallbacks == 510
        else:
            keys = draw(100)
            assert keys[0] == 77 and len(np.unique(keys)) == 100
            assert server.stats().sample_fallbacks == 609
    kv.barrier()
    kv.finalize()
    server.shutdown()
    """


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("distribution", ['"uniform"', '"log-uniform"', "lambda rng, n: rng.integers(0, 500, n)"])
def test_nothing_local_falls_back(run_program, replacement, distribution):
    if not replacement and "lambda" in distribution:
        distribution = '"uniform"'
    run_program(NOTHING.format(replacement=replacement, distribution=distribution), nodes=2)


def test_a_callable_that_seldom_finds_what_is_here(run_program):
    """One key in 5000 is here: of 4096 draws about half have it, every time anew."""
    run_program("""
        import numpy as np, lapse
        K = 5000
        lapse.setup(K, 1)
        server = lapse.Server(1)
        rank = server.my_rank()
        server.enable_sampling_support("local", True, lambda rng, n: rng.integers(0, K, n), seed=1)
        kv = lapse.Worker(0, server)
        if rank == 1:
            kv.localize(np.arange(1, K))
        kv.barrier()
        if rank == 0:
            keys = np.empty(1, np.int64)
            for _ in range(200):
                kv.pull_sample(kv.prepare_sample(1), keys)
            assert 40 < server.stats().sample_fallbacks < 160, server.stats()
        kv.barrier()
        kv.finalize()
        server.shutdown()
        """, nodes=2)


@pytest.mark.parametrize("keys", [200, 20_000])         # a draw in two is here; or fewer than one in 32: out of a list
def test_what_arrives_late_in_a_sample_has_equal_right(run_program, keys):
    """All but one of node 0's keys have been drawn when three arrive, and then two leave again: one that was drawn, one that was not."""
    run_program(f"""
        import numpy as np, lapse
        K, ROUNDS = {keys}, 600
        lapse.setup(K, 1)
        server = lapse.Server(1)
        server.enable_sampling_support("local", False, seed=3)
        kv = lapse.Worker(0, server)
        rank = server.my_rank()
        if rank == 1:
            kv.localize(np.arange(100, K))
            kv.localize([0])
        kv.barrier()
        here, coming, first = np.arange(1, 100), np.arange(K - 4, K - 1), []
        one, some = np.empty(1, np.int64), np.empty(98, np.int64)
        for turn in range(ROUNDS):
            if rank == 0:
                sample = kv.prepare_sample(105)
                kv.pull_sample(sample, some)
                assert len(set(some)) == 98 and set(some) <= set(here), some
                left = set(here) - set(some)
                kv.localize(coming)
                kv.pull_sample(sample, one)
                first.append(one[0] in left)
                left = (left | set(coming)) - set(one)
            kv.barrier()
            if rank == 1:
                kv.localize(coming[:2])
            kv.barrier()
            if rank == 0:
                before = server.stats().sample_fallbacks
                for _ in left - set(coming[:2]):
                    kv.pull_sample(sample, one)
                    left.remove(one[0])
                assert server.stats().sample_fallbacks == before and left <= set(coming[:2]), left
                kv.pull_sample(sample, one)         # nothing is left here
                assert server.stats().sample_fallbacks == before + 1
                kv.finish_sample(sample)
            kv.barrier()
            if rank == 1:
                kv.localize(coming)
            kv.barrier()
        if rank == 0:
            share = np.mean(first)
            assert abs(share - 0.25) < 4 * (0.25 * 0.75 / ROUNDS)**0.5, share
        kv.finalize()
        server.shutdown()
        """, nodes=2)


def test_local_while_keys_come_and_go(run_program):
    """Two nodes take keys from each other while both draw: values are right, and hardly anything but fallbacks goes over the network."""
    run_program("""
        import threading
        import numpy as np, lapse
        K = 400
        lapse.setup(K, 3)
        server = lapse.Server(1, dtype="int64")
        server.enable_sampling_support("local", seed=1)
        rank = server.my_rank()
        failures = []
        def work(index):
            kv = lapse.Worker(index, server)
            if rank == index == 0:
                kv.set(range(K), np.arange(K))
            kv.barrier()
            rng = np.random.default_rng(10 * rank + index)
            for i in range(1500):
                if index == 0:
                    kv.localize(rng.integers(0, K, 5))
                keys, vals = np.empty(20, np.int64), np.empty(20, np.int64)
                kv.pull_sample(kv.prepare_sample(20), keys, vals)
                if not (keys == vals).all():
                    failures.append((keys, vals))
            kv.finalize()
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not failures, failures[0]
        stats = server.stats()
        assert stats.sampled == 90_000
        assert stats.pulled.remote + stats.pulled.queued <= stats.sample_fallbacks + 900, stats
        server.shutdown()
        """, nodes=2)


# --- preloc and pool on more nodes

def test_prepared_samples_are_local(run_program):
    run_program("""
        import numpy as np, lapse
        K = 1000
        lapse.setup(K, 1)
        server = lapse.Server(1, dtype="int64")
        server.enable_sampling_support("preloc", seed=1)
        kv = lapse.Worker(0, server)
        if server.my_rank() == 0:
            kv.set(range(K), np.arange(K))
        kv.barrier()
        if server.my_rank() == 0:
            samples = [kv.prepare_sample(20) for _ in range(10)]
            kv.waitall()
            before = server.stats()
            keys, vals = np.empty(20, np.int64), np.empty(20, np.int64)
            for sample in samples:
                kv.pull_sample(sample, keys, vals)
                assert (keys == vals).all() and server.is_local(keys).all()
            assert server.stats().sent_messages == before.sent_messages
            assert server.stats().pulled.remote == 0
            early = kv.prepare_sample(20)               # used before its keys have arrived
            kv.pull_sample(early, keys, vals)
            assert (keys == vals).all()
        kv.barrier()
        kv.finalize()
        server.shutdown()
        """, nodes=2)


def test_what_is_not_local_is_postponed_once(run_program):
    """Node 1 holds the even keys from the pool's arrival on; they come last in each sample, and each use still comes once."""
    run_program("""
        import numpy as np, lapse
        K, GROUP, REUSE = 1000, 50, 2
        lapse.setup(K, 1)
        server = lapse.Server(1, dtype="int64")
        rank = server.my_rank()
        if rank == 0:
            drawn = []
            def function(rng, n):
                keys = rng.integers(0, K, n)
                drawn.append(keys)
                return keys
            server.enable_sampling_support("pool", True, function, group_size=GROUP, reuse=REUSE, postpone=True, seed=1, batch_size=GROUP)
        kv = lapse.Worker(0, server)
        if rank == 0:
            kv.set(range(K), np.arange(K))
            keys, vals = np.empty(GROUP * REUSE, np.int64), np.empty(GROUP * REUSE, np.int64)
            kv.pull_sample(kv.prepare_sample(GROUP * REUSE), keys, vals)
            first = server.stats().sample_postponed
        kv.barrier()
        if rank == 1:
            kv.localize(np.arange(0, K, 2))
        kv.barrier()
        if rank == 0:
            sample = kv.prepare_sample(GROUP)           # given up while draws of it are postponed: they come again
            some = np.empty(GROUP // 2, np.int64)
            kv.pull_sample(sample, some)
            assert server.stats().sample_postponed > first
            kv.finish_sample(sample)
            taken = [some]
            for _ in range(20):
                before = server.stats().sample_postponed
                sample = kv.prepare_sample(GROUP * REUSE)
                kv.pull_sample(sample, keys[:70], vals[:70])
                kv.pull_sample(sample, keys[70:], vals[70:])
                assert (keys == vals).all()
                taken.append(keys.copy())
                postponed = server.stats().sample_postponed - before
                if postponed:
                    first += postponed
                    last = keys[len(keys) - postponed:]
                    assert (last % 2 == 0).all()
            assert first > 0
            assert first <= 21 * GROUP * REUSE
        kv.finalize()
        kv = lapse.Worker(1, server)
        if rank == 0:                           # what the first Worker had taken and not used comes to the next one
            rest = -sum(map(len, taken)) % (GROUP * REUSE)
            some = np.empty(rest, np.int64)
            kv.pull_sample(kv.prepare_sample(rest), some)
            counts = np.unique(np.concatenate([*taken, some]), return_counts=True)[1]
            assert (counts % REUSE == 0).all(), counts
        kv.finalize()
        server.shutdown()
        """, nodes=2)


def test_the_pool_ends_with_the_job(run_program):
    """A node dies: the others' draws raise NodeFailure, and no thread holds up their end."""
    done = run_program("""
        import os, threading
        import numpy as np, lapse
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        server.enable_sampling_support("pool", group_size=10)
        kv = lapse.Worker(0, server)
        keys = np.empty(10, np.int64)
        kv.barrier()
        if server.my_rank() == 1:
            os._exit(7)
        try:
            while True:
                kv.pull_sample(kv.prepare_sample(10), keys)
        except lapse.NodeFailure as error:
            print("caught", error)
        try:
            server.shutdown()
        except lapse.NodeFailure:
            pass
        print("left", [t.name for t in threading.enumerate() if t.name == "lapse-sampling"])
        """, nodes=2, check=7)
    assert "caught node 1" in done.stdout and "left []" in done.stdout, done.stdout + done.stderr


def test_a_forked_child_cannot_sample(run_program):
    done = run_program("""
        import os, threading
        import numpy as np, lapse
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        server.enable_sampling_support("pool")
        kv = lapse.Worker(0, server)
        sample = kv.prepare_sample(10)
        child = os.fork()
        if child == 0:
            for call in (lambda: kv.prepare_sample(1), lambda: kv.pull_sample(sample, np.empty(1, np.int64)),
                         lambda: kv.finish_sample(sample)):
                try:
                    call()
                except RuntimeError as error:
                    assert "forked child" in str(error)
                else:
                    os._exit(1)
            del kv, server
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        kv.pull_sample(sample, np.empty(10, np.int64))
        kv.finalize()
        server.shutdown()
        """)
    assert "Traceback" not in done.stderr, done.stderr


def test_a_forked_child_does_not_wait_for_the_pool(run_program):
    """Its copy of the pool's lock is taken by a thread that it does not have."""
    run_program("""
        import os, signal, time
        import numpy as np, lapse
        from tests.unit import sampling_probe
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        server.enable_sampling_support("pool")
        kv = lapse.Worker(0, server)
        kv.pull_sample(kv.prepare_sample(1), np.empty(1, np.int64))         # the rest of a batch is the worker's
        sampling_probe.lock_pool(kv)
        child = os.fork()
        if child == 0:
            del kv
            os._exit(0)
        sampling_probe.unlock_pool(kv)
        end = time.monotonic() + 30
        ended = 0
        while ended == 0 and time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.01)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        kv.finalize()
        server.shutdown()
        assert ended and status == 0
        """)


def test_a_slow_callable_sends_nothing_after_the_end(run_program):
    """The node does not wait for it for ever, and others may still be at work when it returns."""
    run_program("""
        import threading
        import numpy as np, lapse, lapse.node
        lapse.node.JOIN_THREADS = 0.1
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        rank = server.my_rank()
        go, called = threading.Event(), threading.Event()
        def slow(rng, n):
            called.set()
            go.wait(60)
            return np.arange(n) + 500               # of node 1
        if rank == 0:
            server.enable_sampling_support("pool", True, slow, batch_size=250)
            called.wait(60)
            threading.Timer(0.5, go.set).start()
            node, thread = server._node, server._node.filler_thread
        else:
            kv = lapse.Worker(0, server)
            threading.Event().wait(2)
            kv.finalize()
        lapse.node.JOIN_THREADS = 0.1 if rank == 0 else 10.0
        server.shutdown()
        if rank == 0:
            thread.join(30)
            assert not thread.is_alive()
            assert sum(worker["localized_remote"] for worker in node.protocol.counters()["workers"]) == 0
        """, nodes=2)


@pytest.mark.skipif(kind in ("asan", "tsan"), reason="a sanitizer's runtime has signals of its own")
def test_ctrl_c_ends_a_wait_for_the_pool(run_program):
    done = run_program("""
        import os, signal, threading
        import numpy as np, lapse
        lapse.setup(1000, 1)
        server = lapse.Server(1)
        held = threading.Event()
        server.enable_sampling_support("pool", True, lambda rng, n: held.wait(60) and None, batch_size=10)
        kv = lapse.Worker(0, server)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            kv.pull_sample(kv.prepare_sample(1), np.empty(1, np.int64))
        except KeyboardInterrupt:
            print("interrupted")
        held.set()
        server.shutdown()
        """, check=None)
    assert "interrupted" in done.stdout, done.stdout + done.stderr
