"""Measures other systems on the workloads of our benchmarks, in one run with ours.

    pip install numpy scipy sparse_dot_topn duckdb faiss-cpu   # what of it is there is used
    python tests/peers/peers.py [--quick]

First `cargo bench` measures the index and the store and exports W1 and W2; then each peer
that can be imported answers the same questions on the same edges, its overlaps are compared
with ours, and a table of medians and ratios is printed and saved as target/bench/peers.json.
`--quick` leaves out everyone's top-10 at W2, which takes scipy's family minutes; `--share N`
lets it answer for one in N of the users there, and counts N times as long;
`--measured` takes the figures of the benchmarks that just ran from target/bench.
"""

import argparse
import importlib.util
import json
import sqlite3
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"w1": (3_000, 1_000), "w2": (100_000, 5_000)}
THREADS, EACH = 64, 20


def bench(name, *figures):
    command = ["cargo", "bench", "-q", "-p", "simpatico-storage", "--bench", name, "--"]
    out = ROOT / "target" / "bench"
    subprocess.run([*command, *figures, "--out", str(out)], cwd=ROOT, check=True)
    return json.loads((out / f"{name}.json").read_text())


def median_us(ask, users):
    times = []
    for user in users:
        start = time.perf_counter()
        ask(user)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def overlaps(counts, user, k=10):
    counts = np.asarray(counts).copy()
    counts[user] = 0
    best = np.sort(np.partition(counts, -k)[-k:])[::-1]
    return best[best > 0].tolist()


def scipy_peer(edges, shape):
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(edges), np.int32), edges.T), shape)
    by_attribute = matrix.T.tocsr()

    def ask(user):
        counts = np.zeros(shape[0], np.int32)
        row = matrix[user] @ by_attribute
        counts[row.indices] = row.data
        return overlaps(counts, user)

    return ask


def numpy_peer(edges, shape):
    """Counters over posting lists, as one writes it with numpy."""
    order = np.argsort(edges[:, 1], kind="stable")
    bounds = np.searchsorted(edges[order, 1], np.arange(shape[1] + 1))
    lists = [edges[order[a:b], 0] for a, b in zip(bounds, bounds[1:])]
    starts = np.searchsorted(edges[:, 0], np.arange(shape[0] + 1))

    def ask(user):
        counts = np.zeros(shape[0], np.uint8)
        for attribute in edges[starts[user] : starts[user + 1], 1]:
            counts[lists[attribute]] += 1
        return overlaps(counts, user)

    return ask


def faiss_peer(edges, shape):
    """Hamming distance ranks like overlap here, because all users have equal degree."""
    import faiss

    width = (shape[1] + 7) // 8 * 8
    bits = np.zeros((shape[0], width // 8), np.uint8)
    np.bitwise_or.at(bits, (edges[:, 0], edges[:, 1] // 8), 1 << (edges[:, 1] % 8).astype(np.uint8))
    index = faiss.IndexBinaryFlat(width)
    index.add(bits)
    faiss.omp_set_num_threads(1)
    degree = len(edges) // shape[0]

    def ask(user):
        distances, _ = index.search(bits[user : user + 1], 11)
        found = sorted((degree - d // 2 for d in distances[0]), reverse=True)
        return [int(n) for n in found[1:] if n > 0]

    return ask


SQL = """select b.user, count(*) as overlap from edge a join edge b using (attribute)
where a.user = ? and b.user <> a.user group by b.user order by overlap desc, b.user limit 10"""


def sqlite_peer(edges, shape):
    connection = sqlite3.connect(":memory:")
    connection.execute("create table edge(user int, attribute int, primary key(user, attribute)) without rowid")
    connection.executemany("insert into edge values (?, ?)", edges.tolist())
    connection.execute("create index by_attribute on edge(attribute, user)")
    return lambda user: [n for _, n in connection.execute(SQL, (int(user),))]


def duckdb_peer(edges, shape):
    import duckdb

    connection = duckdb.connect(config={"threads": 1})
    users, attributes = edges[:, 0].copy(), edges[:, 1].copy()
    connection.register("given", {"user": users, "attribute": attributes})
    connection.execute("create table edge as select * from given")
    return lambda user: [n for _, n in connection.execute(SQL, [int(user)]).fetchall()]


def sparse_dot_topn_all(edges, shape, share):
    from scipy.sparse import csr_matrix
    from sparse_dot_topn import sp_matmul_topn

    matrix = csr_matrix((np.ones(len(edges), np.float32), edges.T), shape)
    transposed = matrix.T.tocsr()
    start = time.perf_counter()
    # The user is among the eleven.
    best = sp_matmul_topn(matrix[: shape[0] // share], transposed, top_n=11, n_threads=2)
    taken = (time.perf_counter() - start) * share

    def answer(user):
        row = best.getrow(user)
        own = sorted((int(n) for u, n in zip(row.indices, row.data) if u != user), reverse=True)
        return own[:10]

    return taken, answer


def sqlite_threads():
    """One durable row at a time from 64 threads: WAL, synchronous=FULL."""
    with tempfile.TemporaryDirectory(dir=ROOT / "target") as folder:
        path = f"{folder}/events.db"

        def connect():
            connection = sqlite3.connect(path, timeout=120, isolation_level=None)
            connection.execute("pragma journal_mode=wal")
            connection.execute("pragma synchronous=full")
            return connection

        connect().execute("create table event(user, attribute, polarity, at)")

        def work(number):
            connection = connect()
            for i in range(EACH):
                connection.execute("insert into event values (?, ?, 'like', ?)", (f"user {number}", f"attribute {i}", i))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return THREADS * EACH / (time.perf_counter() - start)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true")
    arguments.add_argument("--measured", action="store_true")
    arguments.add_argument("--share", type=int, default=1)
    arguments = arguments.parse_args()
    quick = arguments.quick
    if arguments.measured:
        read = lambda name: json.loads((ROOT / f"target/bench/{name}.json").read_text())
        ours = read("graph") | read("store")
    else:
        ours = bench("graph", "w1", "w2", "export") | bench("store", "threads")
    rows = []
    peers = {
        "scipy": ("scipy", scipy_peer),
        "numpy counters": ("numpy", numpy_peer),
        "faiss IndexBinaryFlat": ("faiss", faiss_peer),
        "SQLite": ("sqlite3", sqlite_peer),
        "DuckDB": ("duckdb", duckdb_peer),
    }
    for name, shape in SHAPES.items():
        edges = np.loadtxt(ROOT / f"target/bench/{name}.csv", delimiter=",", dtype=np.int64)
        answers = (ROOT / f"target/bench/{name}.top10.csv").read_text().splitlines()
        answers = [[int(n) for n in line.split(",")] for line in answers]
        mine = ours[f"{name} top-10 Shared, us (median, p99)"][0]
        rows.append((f"{name} top-10, us", "simpatico", mine, 1.0))
        for peer, (module, make) in peers.items():
            if importlib.util.find_spec(module) is None:
                print(f"{peer}: not installed, left out")
                continue
            ask = make(edges, shape)
            for user in range(5):
                assert ask(user) == answers[user], (peer, user, ask(user), answers[user])
            taken = median_us(ask, range(100 if name == "w1" else 15))
            rows.append((f"{name} top-10, us", peer, round(taken, 1), round(taken / mine, 1)))
        if importlib.util.find_spec("sparse_dot_topn") and not (quick and name == "w2"):
            mine = ours[f"{name} top-10 of everyone, s"]
            share = arguments.share if name == "w2" else 1
            taken, answer = sparse_dot_topn_all(edges, shape, share)
            for user in range(100):
                assert answer(user) == answers[user], ("sparse_dot_topn", user)
            rows.append((f"{name} everyone, s", "simpatico", mine, 1.0))
            who = "sparse_dot_topn" if share == 1 else f"sparse_dot_topn, 1/{share}"
            rows.append((f"{name} everyone, s", who, round(taken, 2), round(taken / max(mine, 0.01), 1)))
    mine = ours["64 threads, one durable event each, events/s"]
    theirs = sqlite_threads()
    rows.append(("64 threads durable, events/s", "simpatico", mine, 1.0))
    rows.append(("64 threads durable, events/s", "SQLite", round(theirs), round(mine / theirs, 1)))
    for row in rows:
        print("{:32} {:24} {:>12} {:>8}x".format(*row))
    found = [dict(zip(("figure", "who", "value", "ratio"), row)) for row in rows]
    (ROOT / "target/bench/peers.json").write_text(json.dumps(found, indent=1) + "\n")
    with open(ROOT / "target/bench/results.jsonl", "a") as results:
        results.writelines(json.dumps({"bench": "peers"} | row) + "\n" for row in found)


if __name__ == "__main__":
    main()
