"""ddpm/metrics/structure.py: purity and silhouettes by hand; what is refused; the same places from the same seed."""

from types import SimpleNamespace

import pytest
import torch

from ddpm.metrics.structure import Means, chance, in_plane, measure_structure, must_have_structure, purity, silhouettes

LINE = torch.tensor([[0.0], [1], [3], [7], [15]])


@pytest.mark.equation("Purity (neighbours)")
def test_neighbours_on_a_line_are_counted_by_hand():
    """Of 0: 1 and 3; of 1: 0 and 3; of 3: 1 and 0; of 7: 3 and 1; of 15: 7 and 3."""
    y = torch.tensor([0, 0, 1, 1, 1])
    assert purity(LINE, y, k=2).tolist() == [0.5, 0.5, 0, 0.5, 1]
    assert purity(LINE, y, k=1).tolist() == [1, 1, 0, 1, 1]
    assert purity(LINE, y, k=4).tolist() == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert torch.equal(purity(LINE, y, k=2, chunk=2), purity(LINE, y, k=2))


def test_equal_distances_share_a_place_whatever_the_order():
    """Of 0 both 1 and -1 are the nearest; where all rows are the same, all others are."""
    x, y = torch.tensor([[0.0], [1], [-1]]), torch.tensor([0, 0, 1])
    for order in ([0, 1, 2], [0, 2, 1]):
        assert purity(x[order], y[order], k=1)[0] == 0.5
    same = purity(torch.zeros(6, 2), torch.tensor([0, 0, 0, 0, 1, 1]), k=3)
    torch.testing.assert_close(same, torch.tensor([3 / 5] * 4 + [1 / 5] * 2).double())


@pytest.mark.equation("Purity (chance)")
def test_chance_is_what_neighbours_have_that_know_nothing():
    y = torch.tensor([0, 0, 0, 2])
    assert chance(y) == 9 / 16 + 1 / 16
    many = torch.arange(400) % 3
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    assert purity(x, many).mean().item() == pytest.approx(chance(many), abs=0.02)


@pytest.mark.equation("Silhouette (of a point)")
def test_silhouettes_of_five_points_are_those_of_the_definition():
    """The last one is alone in its class."""
    x, y = torch.tensor([[0.0, 0], [0, 2], [4, 0], [4, 3], [9, 9]]), torch.tensor([0, 0, 1, 1, 2])
    expected = []
    for i in range(5):
        mean = {k: [(x[i] - x[j]).norm().item() for j in range(5) if j != i and y[j] == k] for k in range(3)}
        if not mean[int(y[i])]:
            expected.append(0.0)
            continue
        a = sum(mean[int(y[i])]) / len(mean[int(y[i])])
        b = min(sum(of) / len(of) for k, of in mean.items() if k != y[i])
        expected.append((b - a) / max(a, b))
    assert silhouettes(x, y).tolist() == pytest.approx(expected) and expected[0] == pytest.approx((4.5 - 2) / 4.5)
    with pytest.raises(ValueError, match="5 samples of 1 classes"):
        silhouettes(x, torch.zeros(5, dtype=torch.long))


def test_a_record_has_means_their_intervals_and_those_of_classes():
    z, y = torch.cat([torch.arange(12.0), 100 + torch.arange(12.0)])[:, None], torch.tensor([0] * 11 + [3] * 13)
    (pure, of_purity), (apart, of_silhouette) = measure_structure(Means(z, y, z), "points", 1).values()
    each = purity(z, y)
    mean, half = each.mean().item(), 1.959963984540054 * each.std().item() / 24**0.5
    assert (of_purity["value"], of_purity["low"], of_purity["high"]) == pytest.approx((mean, mean - half, mean + half))
    assert 0 < mean < 1 and half > 0
    assert of_purity["chance"] == chance(y) and of_purity["classes"] == [0, 3] and of_purity["n"] == 24
    assert of_purity["of_classes"] == pytest.approx([each[y == k].mean().item() for k in (0, 3)])
    assert of_silhouette["value"] == pytest.approx(silhouettes(z, y).mean().item()) and "chance" not in of_silhouette
    assert "by chance 0.503" in pure and "from -1 to 1" in apart


@pytest.mark.parametrize(
    ("n", "labels", "told"),
    [
        (20, None, "has no labels"),
        (10, [0, 1] * 10, "n is at least 11"),
        (20, [4] * 20, "of 1 classes"),
        (20, list(range(20)), "of 20 classes"),
    ],
)
def test_what_has_no_structure_is_refused(n, labels, told):
    labels = None if labels is None else torch.tensor(labels)
    data = SimpleNamespace(name="some", units="images", held_out=torch.arange(20), labels=labels)
    with pytest.raises(ValueError, match=told):
        must_have_structure(data, n)
    must_have_structure(SimpleNamespace(held_out=torch.arange(20), labels=torch.arange(20) % 2), 11)


def test_places_in_the_plane():
    """Principal components keep the distances of what lies in a plane; t-SNE is the same for the same seed."""
    random = torch.Generator().manual_seed(0)
    flat, (turn, _) = torch.randn(12, 2, generator=random), torch.linalg.qr(torch.randn(3, 3, generator=random))
    found = in_plane(flat @ turn[:2])
    torch.testing.assert_close(torch.pdist(found["pca"]), torch.pdist(flat.double()), rtol=1e-5, atol=1e-5)
    assert found["pca"][:, 0].var() > found["pca"][:, 1].var()
    assert torch.equal(in_plane(flat @ turn[:2])["tsne"], found["tsne"]) and found["tsne"].isfinite().all()
    on_a_line = in_plane(LINE.repeat(3, 1))
    assert on_a_line["pca"].shape == on_a_line["tsne"].shape == (15, 2) and on_a_line["pca"][:, 1].abs().max() < 1e-9
