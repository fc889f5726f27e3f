"""Exact kNN and k-means on features, against scikit-learn and (where it is installed) faiss-cpu.

The sizes of the comparison are 10,000 queries against 200,000 features of 512 dimensions, and 1,000 centers; smaller ones
for a small machine. All sides get the same features, k-means the same first centers and number of updates. On a CPU the
process's CPU time is measured, which other load disturbs less than the time on the clock; a round takes minutes, so none
is spent on warming up. The agreement of the neighbors and the ratio of the sums of squared distances stand beside the times.
"""

import argparse
import importlib.util
import time

import numpy as np
import torch
import torch.nn.functional as F
from timing import table, take_turns

from sslbook import results, rng
from sslbook.evaluation.protocols.knn import neighbors
from sslbook.nn.kmeans import kmeans, nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=200_000)
    parser.add_argument("--rows", type=int, default=200_000, help="of k-means")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--centers", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of our side; the others compute on the CPU")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    clock = time.process_time if options.device == "cpu" else time.perf_counter

    g = torch.Generator().manual_seed(0)
    around = torch.randn(200, options.dim, generator=g)

    def features(n: int) -> torch.Tensor:
        """Overlapping clusters, of unit length."""
        x = around[torch.randint(len(around), (n,), generator=g)]
        return F.normalize(x + 2 * torch.randn(n, options.dim, generator=g), dim=1)

    bank, queries, rows = features(options.bank), features(options.queries), features(options.rows)
    sides, found = searches(bank, queries, options.k, options.device)
    seconds = take_turns(sides, options.repetitions, options.device, clock, warm_up=False)
    values = {"kNN": table(seconds, options.queries, "queries")}
    for name, index in found.items():
        if name != "sslbook":
            agreement = 100 * float((index["index"] == found["sslbook"]["index"]).mean())
            values["kNN"][name]["neighbors in agreement, %"] = round(agreement, 3)
            print(f"{name}: {agreement:.3f} % of the neighbors agree")
    sides, centers = clusterings(rows, options.centers, options.iterations, options.device)
    seconds = take_turns(sides, options.repetitions, options.device, clock, warm_up=False)
    values["k-means"] = table(seconds, options.rows * options.iterations, "updates of a row")
    inertia = {name: float(squared_distances(rows, found)) for name, found in centers.items()}
    for name, value in inertia.items():
        ratio = value / inertia["sslbook"]
        values["k-means"][name]["squared distances, ratio"] = round(ratio, 4)
        print(f"{name}: {ratio:.4f} times our sum of squared distances")
    if options.save:
        print(
            results.save("benchmark_knn_kmeans", values, settings={**vars(options), "threads": torch.get_num_threads()})
        )


def searches(bank: torch.Tensor, queries: torch.Tensor, k: int, device: str) -> tuple[dict, dict]:
    """The searches by name, and where each leaves what it found."""
    from sklearn.neighbors import NearestNeighbors

    found: dict[str, dict[str, np.ndarray]] = {}

    def ours() -> None:
        found["sslbook"] = {"index": neighbors(bank, queries, k, device=device)[1].numpy()}

    def theirs() -> None:
        search = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank.numpy())
        found["scikit-learn"] = {"index": search.kneighbors(queries.numpy(), return_distance=False)}

    def faiss_search() -> None:
        import faiss

        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(bank.numpy())
        found["faiss"] = {"index": index.search(queries.numpy(), k)[1]}

    sides = {"sslbook": ours, "scikit-learn": theirs}
    return {**sides, **({"faiss": faiss_search} if importlib.util.find_spec("faiss") else {})}, found


def clusterings(x: torch.Tensor, centers: int, iterations: int, device: str) -> tuple[dict, dict]:
    """The k-means by name, and where each leaves its centers."""
    from sklearn.cluster import KMeans

    first = x[rng.permutation(0, 0, len(x))[:centers]].numpy()
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        found["sslbook"] = kmeans(x.to(device), centers, iterations, 0)[0].cpu()

    def theirs() -> None:
        model = KMeans(centers, init=first, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
        found["scikit-learn"] = torch.from_numpy(model.fit(x.numpy()).cluster_centers_)

    def faiss_kmeans() -> None:
        import faiss

        model = faiss.Kmeans(x.shape[1], centers, niter=iterations, max_points_per_centroid=len(x))
        model.train(x.numpy(), init_centroids=first)
        found["faiss"] = torch.from_numpy(model.centroids)

    sides = {"sslbook": ours, "scikit-learn": theirs}
    return {**sides, **({"faiss": faiss_kmeans} if importlib.util.find_spec("faiss") else {})}, found


def squared_distances(x: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """The sum of the squared distances of rows to their nearest centers."""
    return (x - centers[nearest(x, centers)]).square().sum(dtype=torch.float64)


if __name__ == "__main__":
    main()
