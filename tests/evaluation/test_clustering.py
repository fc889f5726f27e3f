"""Clustering against scikit-learn, and assignments by trying all of them."""

from itertools import permutations

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from sslbook.errors import UserError
from sslbook.evaluation.protocols.clustering import Clustering, accuracy_by_assignment, scores
from tests.evaluation.given import clusters, given


def test_the_best_assignment_is_found() -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        y, found = torch.randint(4, (30,), generator=g), torch.randint(5, (30,), generator=g)
        best = max(sum(int(names[c] == label) for c, label in zip(found, y)) for names in permutations(range(5)))
        assert accuracy_by_assignment(found, y) == pytest.approx(100 * best / 30)
    assert accuracy_by_assignment(torch.tensor([7, 7, 2]), torch.tensor([0, 0, 1])) == 100  # whatever their numbers
    assert accuracy_by_assignment(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 0, 1])) == 75


def test_equal_to_scikit_learn_on_separate_clusters() -> None:
    """Where the optimum is clear, our k-means and scikit-learn's find the same partition of the test images."""
    train, test = clusters(200, 1, noise=0.4, centers=2.0), clusters(80, 2, noise=0.4, centers=2.0)
    model = given(train, test)
    metrics = Clustering(normalize=False).run(model, model.data)
    theirs = KMeans(4, n_init=10, random_state=0).fit(train[0].double()).predict(test[0].double())
    assert metrics["NMI"] == pytest.approx(100 * normalized_mutual_info_score(test[1], theirs))
    assert metrics["ARI"] == pytest.approx(100 * adjusted_rand_score(test[1], theirs))
    assert metrics == pytest.approx(scores(torch.as_tensor(theirs).long(), test[1]))
    assert metrics["clustering accuracy"] > 95


def test_about_as_tight_as_scikit_learn_on_overlapping_clusters() -> None:
    x, y = clusters(400, 3, noise=1.5)
    model = given((x, y), clusters(10, 4))
    Clustering(num_clusters=12, restarts=10, iterations=100, normalize=False).run(model, model.data)
    tightest = min(model.details["clustering"]["squared distances"])
    assert tightest < 1.02 * KMeans(12, n_init=10, random_state=0).fit(x.double()).inertia_


def test_of_several_starts_the_tightest_counts() -> None:
    model = given(clusters(100, 5, noise=1.5), clusters(40, 6, noise=1.5))
    Clustering(restarts=6, iterations=2).run(model, model.data)
    noted = model.details["clustering"]
    assert noted["start"] == noted["squared distances"].index(min(noted["squared distances"]))
    assert max(noted["squared distances"]) > min(noted["squared distances"])


def test_features_without_information_are_at_chance() -> None:
    y = torch.arange(4).repeat(100)
    model = given((torch.randn(400, 8), y), (torch.randn(400, 8), y))
    metrics, chance = Clustering().run(model, model.data), Clustering().chance(model.data)
    assert metrics["NMI"] == pytest.approx(chance["NMI"], abs=3)
    assert metrics["ARI"] == pytest.approx(chance["ARI"], abs=3)
    assert metrics["clustering accuracy"] < chance["clustering accuracy"] + 12


def test_more_clusters_than_images() -> None:
    model = given(clusters(10, 7), clusters(10, 8))
    with pytest.raises(UserError, match="11 clusters of 10 training images"):
        Clustering(num_clusters=11).run(model, model.data)
