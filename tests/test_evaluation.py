"""The rulers: against independent implementations, and on clouds of which the answer is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mar_mini.evaluation import (
    bootstrap,
    class_accuracy,
    floor,
    frechet_distance,
    kernel_distance,
    linear_discriminant,
    nearest,
    precision_recall,
    psnr,
)
from mar_mini.judge.statistics import Reference, judge


def cloud(n: int, d: int = 6, shift: float = 0.0, scale: float = 1.0, seed: int = 0):
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_frechet_distance_with_a_matrix_root():
    """Against the textbook formula with a root by the eigenvalues of the unsymmetric product."""
    a, b = cloud(300, seed=1) @ cloud(6, seed=5), cloud(200, shift=0.3, seed=2)
    cov_a, cov_b = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    values = np.linalg.eigvals(cov_a @ cov_b)
    means = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    want = means + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(values.real.clip(0)).sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)


@given(shift=st.floats(0, 3), scale=st.floats(0.1, 3))
@settings(max_examples=20, deadline=None)
def test_frechet_distance_of_a_moved_and_scaled_cloud(shift, scale):
    a = cloud(500)
    moved = scale * a + shift
    var = torch.cov(a.double().T).trace().item()
    want = float(((1 - scale) * a.double().mean(0) - shift).square().sum()) + var * (1 - scale) ** 2
    assert frechet_distance(a, moved) == pytest.approx(want, rel=1e-4, abs=1e-3)


def test_frechet_distance_is_symmetric_and_zero_for_the_same():
    a, b = cloud(50), cloud(70, shift=1.0, seed=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) < 1e-9


def test_fewer_images_are_further_away():
    everything = cloud(20_000, d=20)
    distances = [frechet_distance(cloud(n, d=20, seed=n), everything) for n in (50, 200, 1000)]
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0


@pytest.mark.parametrize(("a", "b"), [((1, 3), (5, 3)), ((5, 3), (5, 4)), ((5,), (5, 3))])
def test_frechet_distance_refuses_what_is_no_cloud(a, b):
    with pytest.raises(ValueError, match=r"expected \(N, D\) and \(M, D\) with two rows"):
        frechet_distance.__wrapped__(torch.zeros(a), torch.zeros(b))


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    seeded = torch.Generator().manual_seed(0)
    near, spread = kernel_distance(
        cloud(2000, 20), cloud(2000, 20, seed=1), size=200, generator=seeded
    )
    assert abs(near) < 4 * spread / math.sqrt(50)
    far, spread = kernel_distance(
        cloud(2000, 20), cloud(2000, 20, shift=0.5, seed=1), size=200, generator=seeded
    )
    assert far > 10 * spread


def test_kernel_distance_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    kernel = lambda x, y: (float(x @ y) / 2 + 1) ** 3  # noqa: E731
    want = kernel(a[0], a[1]) + kernel(b[0], b[1]) - 2 * sum(kernel(x, y) for x in a for y in b) / 4
    assert kernel_distance(a, b, subsets=3)[0] == pytest.approx(want)


def test_precision_and_recall_of_half_a_cloud():
    """Samples from one of two far islands: all are real, half of the real ones are missed."""
    real = torch.cat([cloud(200, 2), cloud(200, 2, shift=50.0, seed=1)])
    precision, recall = precision_recall(cloud(300, 2, seed=2), real)
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.03)
    assert precision_recall(cloud(50, 2, shift=200.0), real) == (0.0, 0.0)


def test_nearest_finds_a_copy():
    real = cloud(30)
    distance, index = nearest(real[[7, 3]] + 1e-4, real)
    assert index.tolist() == [7, 3] and distance.max() < 1e-2


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 4, 4)
    b = a + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0]), rtol=0, atol=1e-3)


def test_bootstrap_covers_the_mean():
    """Of 200 intervals of 95% about 190 hold the true mean."""
    seeded, held = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        x = cloud(40, 1, seed=seed).flatten()
        low, high = bootstrap(lambda i, x=x: float(x[i].mean()), 40, rounds=200, generator=seeded)
        held += low <= 0.0 <= high
    assert 175 <= held <= 199


def test_a_floor_is_of_two_sets_without_overlap_and_falls_with_their_size():
    sets = []
    floor(torch.arange(20.0)[:, None], 6, 9, distance=lambda *x: sets.append(x) or 0.0)
    (a, b), *_ = sets
    assert (len(a), len(b), len(torch.cat([a, b]).unique())) == (6, 9, 15)
    everything = cloud(4000)
    few, many = (
        floor(everything, n, n, generator=torch.Generator().manual_seed(0)) for n in (50, 1000)
    )
    assert few > 10 * many
    with pytest.raises(ValueError, match=r"20 real images; expected 12 \+ 9"):
        floor(torch.zeros(20, 2), 12, 9)


def test_class_accuracy_by_hand():
    taken, asked = torch.tensor([0, 1, 1, 3, 0]), torch.tensor([0, 0, 1, 3, 3])
    want = torch.tensor([0.5, 1.0, torch.nan, 0.5], dtype=torch.float64)
    torch.testing.assert_close(class_accuracy(taken, asked, 4), want, equal_nan=True)


def labelled(n: int, seed: int = 0, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of two classes whose means are 4 apart, and the classes."""
    labels = torch.arange(n) % 2
    features = cloud(n, 10, seed=seed, shift=shift)
    features[:, 0] += 4.0 * labels
    return features, labels


@pytest.fixture
def reference() -> Reference:
    train, labels = labelled(4000)
    test, test_labels = labelled(1000, seed=1)
    some = {"train": train[:1000], "train_labels": labels[:1000]}
    return Reference.of(train, "numbers", test=test, test_labels=test_labels, **some)


def test_frechet_distance_of_the_library():
    """torchmetrics with a feature module of our own: the same features, the same distance."""
    fid = pytest.importorskip("torchmetrics.image.fid")

    class FirstPixels(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.double().flatten(1)[:, : self.num_features]

    library = fid.FrechetInceptionDistance(
        feature=FirstPixels(), input_img_size=(3, 2, 2), normalize=True
    ).set_dtype(torch.float64)
    a = torch.rand(300, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    b = torch.rand(200, 3, 2, 2, generator=torch.Generator().manual_seed(1)) ** 2
    library.update(a, real=True)
    library.update(b, real=False)
    ours = frechet_distance(a.flatten(1), b.flatten(1))
    assert float(library.compute()) == pytest.approx(ours, rel=1e-5)


def test_judging_real_ones_gives_the_floor(reference):
    allowed = {
        "distance": 0.2,
        "KID": 0.25,
        "precision": 0.08,
        "recall": 0.08,
        "class found": 0.02,
        "nearest": 0.1,
    }
    for name, (value, real) in judge(*labelled(500, seed=9), reference).items():
        assert value == pytest.approx(real, abs=allowed.pop(name)), name
    assert not allowed
    features, labels = labelled(500, seed=9, shift=0.5)
    shifted = judge(features, 1 - labels, reference)
    assert shifted["distance"][0] > 5 * shifted["distance"][1]
    assert shifted["KID"][0] > 0.5 + shifted["KID"][1]
    assert shifted["precision"][0] < shifted["precision"][1]
    assert shifted["class found"][0] < 0.1 < 0.95 < shifted["class found"][1]


def test_the_discriminant_weighs_by_the_spread_within():
    """A wide axis with nearer means, a narrow one with what tells the classes apart."""
    labels = torch.arange(2000) % 2
    x = cloud(2000, 2) * torch.tensor([100.0, 1.0])
    x[:, 1] += 5.0 * labels
    classify = linear_discriminant(x, labels)
    assert (classify(x) == labels).double().mean() > 0.98


def test_a_reference_comes_back_from_its_file(reference, tmp_path):
    reference.save(tmp_path / "r.safetensors")
    again = Reference.load(tmp_path / "r.safetensors")
    assert again.features == "numbers" and again.count == 4000
    assert torch.equal(again.cov, reference.cov)
    x = cloud(100, 10, seed=4)
    assert again.distance(x) == reference.distance(x)
    (tmp_path / "r.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="missing or damaged"):
        Reference.load(tmp_path / "r.safetensors")


def test_more_samples_than_test_images_are_refused(reference):
    with pytest.raises(ValueError, match="1001 samples, but the reference has 1000 test images"):
        judge(*labelled(1001), reference)
