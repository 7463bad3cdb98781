"""ddpm/metrics: closed forms, an independent implementation, and data whose answer is known."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits

from ddpm.figures.images import to_float
from ddpm.metrics.frechet import frechet_distance, frechet_error, moments
from ddpm.metrics.judge import accuracy, in_batches, random_shift, train_judge
from ddpm.metrics.recognition import Recogniser, recognition
from models.classifier import Classifier


def covariance(rng: np.random.Generator, d: int, rank: int | None = None) -> np.ndarray:
    a = rng.normal(size=(d, d if rank is None else rank))
    return a @ a.T


# --- Frechet distance


@pytest.mark.equation("FID (distance)")
def test_frechet_in_one_dimension():
    m, c = torch.tensor([0.3]), torch.tensor([[0.7**2]])
    assert frechet_distance(m, c, torch.tensor([1.5]), torch.tensor([[2.0**2]])) == pytest.approx(1.2**2 + 1.3**2)


def test_frechet_of_commuting_covariances():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    s_1, s_2, m_1, m_2 = rng.uniform(0, 2, (4, 6))
    ours = frechet_distance(m_1, q @ np.diag(s_1**2) @ q.T, m_2, q @ np.diag(s_2**2) @ q.T)
    assert ours == pytest.approx(((m_1 - m_2) ** 2).sum() + ((s_1 - s_2) ** 2).sum())


@pytest.mark.equation("FID (distance)")
def test_frechet_against_scipy():
    rng = np.random.default_rng(1)
    m_1, m_2 = rng.normal(size=(2, 12))
    c_1, c_2 = covariance(rng, 12), covariance(rng, 12)
    theirs = ((m_1 - m_2) ** 2).sum() + np.trace(c_1 + c_2 - 2 * scipy.linalg.sqrtm(c_1 @ c_2).real)
    assert frechet_distance(m_1, c_1, m_2, c_2) == pytest.approx(theirs, rel=1e-9)
    assert frechet_distance(m_2, c_2, m_1, c_1) == pytest.approx(theirs, rel=1e-9)


def test_frechet_without_full_rank():
    rng = np.random.default_rng(2)
    c = covariance(rng, 10, rank=3)
    zero = np.zeros(10)
    assert frechet_distance(zero, c, zero, c) == pytest.approx(0, abs=1e-5 * np.trace(c))
    assert frechet_distance(zero, c, zero, np.zeros((10, 10))) == pytest.approx(np.trace(c))
    # on orthogonal supports the roots do not interact
    c_1, c_2 = np.diag([1.0, 4, 0, 0]), np.diag([0, 0, 9.0, 0])
    assert frechet_distance(zero[:4], c_1, zero[:4], c_2) == pytest.approx(1 + 4 + 9)


@pytest.mark.equation("FID (standard error)")
def test_standard_error_in_one_dimension():
    x = torch.from_numpy(np.random.default_rng(4).gamma(2.0, size=(50, 1)))
    m_1, s_1, m_2, s_2 = x.mean().item(), x.std().item(), 1.5, 2.0  # F = (m_1 - m_2)^2 + (s_1 - s_2)^2
    h = 2 * (m_1 - m_2) * (x - m_1) + (1 - s_2 / s_1) * (x - m_1) ** 2
    found = frechet_error(x, torch.tensor([m_2]), torch.tensor([[s_2**2]]))
    assert found == pytest.approx((h.std(correction=0) / 50**0.5).item())


@pytest.mark.equation("FID (standard error)")
def test_standard_error_is_that_of_the_bootstrap_and_of_samples_drawn_anew():
    rng = np.random.default_rng(5)
    n, root, reference = 400, rng.normal(size=(5, 5)) / 2, (torch.zeros(5), torch.eye(5))

    def draw() -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(n, 5)) @ root.T + 0.3 + rng.exponential(0.5, size=(n, 5)))

    x = draw()
    resampled = [frechet_distance(*moments(x[rng.integers(n, size=n)]), *reference) for _ in range(400)]
    found = frechet_error(x, *reference)
    assert found == pytest.approx(np.std(resampled), rel=0.15)  # of 400, the bootstrap's own error is 4 %
    anew = [draw() for _ in range(400)]
    errors = [frechet_error(x, *reference) for x in anew]
    assert np.mean(errors) == pytest.approx(np.std([frechet_distance(*moments(x), *reference) for x in anew]), rel=0.15)


def test_standard_error_without_full_rank():
    """Features that never vary, as some of a classifier's do, add nothing."""
    x = torch.from_numpy(np.random.default_rng(6).normal(size=(60, 3)))
    flat = torch.cat([x, torch.full((60, 1), 0.7, dtype=torch.float64)], dim=1)
    mean, cov = torch.tensor([0.5, 0, 0, 0.7]), torch.diag(torch.tensor([4.0, 1, 1, 0]))
    assert frechet_error(flat, mean, cov) == pytest.approx(frechet_error(x, mean[:3], cov[:3, :3]), rel=1e-6)


def test_moments():
    features = np.random.default_rng(3).normal(size=(20, 4)).astype(np.float32)
    mean, cov = moments(torch.from_numpy(features))
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(cov, np.cov(features.astype(float), rowvar=False), rtol=1e-6)


def test_frechet_refuses_what_it_cannot_compare():
    m, c = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"\(3,\), \(3, 3\), \(2,\), \(2, 2\)"):
        frechet_distance(m, c, torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(m, c, m, c * torch.nan)
    with pytest.raises(ValueError, match=r"at least 2 samples, not \(1, 3\)"):
        moments(torch.zeros(1, 3))
    features = torch.zeros(5, 3)
    features[2, 1], features[4, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 of 5 samples"):
        moments(features)


# --- recognition, on the real digits


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, ...]:
    """x, y of 1,437 digits to train on, and x, y of 360 held-out ones."""
    data = load_digits()
    x = to_float(torch.from_numpy((data.images * 255 / 16).astype(np.uint8)).unsqueeze(1))
    y = torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:1437], order[1437:]
    return x[train], y[train], x[held_out], y[held_out]


@pytest.fixture(scope="module", autouse=True)
def _learned_once(digits):
    """The regression of these digits, which takes a second: after the first time it is known."""
    fit, known = Recogniser.fit, []

    def once(self: Recogniser, x: torch.Tensor, y: torch.Tensor) -> Recogniser:
        if x is not digits[0]:
            return fit(self, x, y)
        known[:] = known or [fit(self, x, y).model]
        self.model = known[0]
        return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recogniser, "fit", once)
        yield


def test_recogniser_knows_digits(digits):
    x, y, held_out_x, held_out_y = digits
    probabilities = Recogniser().fit(x, y).probabilities(held_out_x)
    assert probabilities.shape == (360, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(360).double())
    assert (probabilities.argmax(1) == held_out_y).float().mean() > 0.93


def test_recognition_of_held_out_digits_is_the_yardstick(digits):
    x, y, held_out_x, _ = digits
    result = recognition(held_out_x, x, y, held_out_x)
    assert result.recognised == result.held_out_recognised and 0.6 < result.recognised < 0.9
    assert result.distance_ratio == 1 and result.classes == list(range(10))
    assert sum(result.class_shares) == pytest.approx(1)
    confident, label = Recogniser().fit(x, y).probabilities(held_out_x).max(1)
    assert result.class_shares[3] == pytest.approx((label[confident >= 0.9] == 3).double().mean().item())
    half = recognition(held_out_x[:180], x, y, held_out_x)
    assert half.distance_ratio == pytest.approx(1, abs=0.1) and half.distance_ratio != 1
    assert recognition(held_out_x, x, y, held_out_x, threshold=0.5).recognised > result.recognised


def test_recognition_tells_copies_noise_and_a_single_class(digits):
    x, y, held_out_x, _ = digits
    copies = recognition(x[:200], x, y, held_out_x)
    assert copies.distance_ratio == pytest.approx(0, abs=1e-5) and copies.recognised > 0.6
    noise = recognition(torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)), x, y, held_out_x)
    assert noise.recognised < 0.2 and noise.distance_ratio > 2
    collapsed = recognition(x[y == 7][:50], x, y, held_out_x)
    assert collapsed.class_shares[7] > 0.95
    nothing = recognition(torch.zeros(5, 1, 8, 8), x, y, held_out_x, threshold=1.0)
    assert nothing.recognised == 0 and nothing.class_shares == [0.0] * 10


def test_recognition_reads_well(digits):
    x, y, held_out_x, _ = digits
    lines = str(recognition(x[:100], x, y, held_out_x)).splitlines()
    assert len(lines) == 3 and "of held-out images" in lines[0] and "9: " in lines[1] and "0.000 times" in lines[2]


def test_recognition_refuses_broken_samples(digits):
    x, y, held_out_x, _ = digits
    samples = held_out_x[:4].clone()
    samples[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 4 samples"):
        recognition(samples, x, y, held_out_x)
    with pytest.raises(ValueError, match=r"\(0, 1, 8, 8\)"):
        recognition(samples[:0], x, y, held_out_x)
    with pytest.raises(ValueError, match=r"\(4, 1, 7, 8\)"):
        recognition(samples[:, :, 1:], x, y, held_out_x)


def test_distances_are_those_of_pixels_in_files():
    x, train_x, held_out_x = torch.rand(3, 7, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1

    def distance(images: torch.Tensor) -> float:
        one, all_of_them = (((i.clamp(-1, 1) + 1) * 127.5).round().double() for i in (images, train_x))
        return (one[:, None] - all_of_them[None]).square().sum((2, 3, 4)).sqrt().amin(1).mean().item()

    found = recognition(x, train_x, torch.arange(7) % 2, held_out_x)
    assert found.distance_ratio == pytest.approx(distance(x) / distance(held_out_x), rel=1e-12)


# --- the judge


@pytest.mark.slow
def test_judge_learns_digits_and_the_seed_decides(digits):
    x, y, held_out_x, held_out_y = digits

    def judge(seed: int, epochs: int, global_seed: int = 0) -> Classifier:
        torch.manual_seed(0)
        classifier = Classifier(8, channels=16)
        torch.manual_seed(global_seed)  # must not matter
        return train_judge(classifier, x, y, seed=seed, epochs=epochs, batch_size=64, shift=1)

    trained = judge(seed=0, epochs=8)
    assert not trained.training and accuracy(trained, held_out_x, held_out_y) > 0.93
    first, again, other = (judge(seed, 1, global_seed)(held_out_x) for seed, global_seed in ((1, 0), (1, 9), (2, 0)))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_judge_leaves_global_randomness_alone():
    x, y, classifier = torch.zeros(4, 1, 8, 8), torch.zeros(4), Classifier(8, channels=4)
    before = torch.get_rng_state()
    train_judge(classifier, x, y, epochs=1, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_shift_moves_each_image_by_itself_and_repeats_the_edge():
    image = torch.arange(4 * 6.0).reshape(4, 6)  # every pixel has its own value
    rows, columns = torch.arange(4), torch.arange(6)
    expected = {
        (down, right): image[(rows + down).clamp(0, 3)][:, (columns + right).clamp(0, 5)]
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    moved = random_shift(image.repeat(500, 1, 1, 1), 2, torch.Generator().manual_seed(0))
    found = [[key for key, value in expected.items() if torch.equal(value, one)] for one in moved[:, 0]]
    assert all(len(keys) == 1 for keys in found) and {keys[0] for keys in found} == set(expected)
    assert torch.equal(random_shift(image[None, None], 0, torch.Generator()), image[None, None])


def test_accuracy_and_batches():
    x = torch.eye(4).reshape(4, 1, 2, 2)
    assert accuracy(torch.nn.Flatten(), x, torch.tensor([0, 1, 2, 0])) == 0.75
    seen = []
    result = in_batches(lambda part: seen.append(len(part)) or 2 * part, x, batch_size=3)
    assert seen == [3, 1] and torch.equal(result, 2 * x)
    with pytest.raises(ValueError, match="4 and 3"):
        accuracy(torch.nn.Flatten(), x, torch.zeros(3))
    with pytest.raises(ValueError, match="4 and 3"):
        train_judge(torch.nn.Flatten(), x, torch.zeros(3))
