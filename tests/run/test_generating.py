"""A set of images is the same whoever makes it; a distance that means nothing is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mar_mini import load_pretrained
from mar_mini.data import load_images, to_tensors
from mar_mini.evaluation import frechet_distance
from mar_mini.judge.features import features_of, load_features
from mar_mini.judge.statistics import Reference, doubts, features_in, picture_side
from mar_mini.run.generate import check_complete, write_images
from mar_mini.run.images import open_pictures

QUICK = {"num_iter": 2, "num_sampling_steps": 4, "cfg": 2.0}


@pytest.fixture(scope="module")
def pipeline():
    return load_pretrained("digits")


def make(pipeline, folder, count=12, **arguments):
    done = sum(write_images(pipeline, folder, count, **{"shard_size": 5, **QUICK, **arguments}))
    return done, open_pictures(folder) if done == count else None


def pixels(pictures) -> np.ndarray:
    return np.stack([np.asarray(pictures.picture(i)) for i in range(len(pictures))]).astype(int)


def test_each_image_is_of_its_own_seed_and_class(pipeline, tmp_path):
    done, pictures = make(pipeline, tmp_path)
    assert done == 12 and pictures.labels.tolist() == [*range(10), 0, 1]
    assert pictures.classes == [str(i) for i in range(10)]
    images, _ = to_tensors(load_images(tmp_path / "train-00002-of-00003.parquet"))
    assert images.shape == (2, 1, 16, 16)  # numbers 10 and 11
    got = pixels(pictures)
    assert np.abs(got[0] - got[10]).max() > 50, "the same class, another seed"
    assert np.abs(got[1] - got[11]).max() > 50


def test_neither_parts_nor_batches_change_the_set(pipeline, tmp_path):
    _, one = make(pipeline, tmp_path / "one", batch_size=64)
    assert make(pipeline, tmp_path / "two", part=(1, 2), batch_size=2)[0] == 5
    with pytest.raises(ValueError, match=r"5 of 12 images are in .*again, or that of the missing"):
        check_complete(tmp_path / "two", len(open_pictures(tmp_path / "two")))
    make(pipeline, tmp_path / "two", part=(0, 2), batch_size=3)
    two = open_pictures(tmp_path / "two")
    check_complete(tmp_path / "two", len(two))
    assert np.abs(pixels(one) - pixels(two)).max() <= 1 and two.labels.equal(one.labels)
    _, other = make(pipeline, tmp_path / "other", seed=1)
    assert np.abs(pixels(one) - pixels(other)).max() > 50


def test_what_is_there_is_not_made_again(pipeline, tmp_path):
    steps = write_images(pipeline, tmp_path, 12, shard_size=5, batch_size=2, **QUICK)
    while not (first := tmp_path / "train-00000-of-00003.parquet").exists():
        next(steps)
    steps.close()
    before = first.stat().st_mtime_ns
    assert len(make(pipeline, tmp_path)[1]) == 12 and first.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds other images .*seed is 0 there and 1 here"):
        make(pipeline, tmp_path, seed=1)
    with pytest.raises(ValueError, match="holds other images .*model is"):
        make(load_pretrained("cifar10"), tmp_path)


def test_pngs_are_the_same_images(pipeline, tmp_path):
    _, rows = make(pipeline, tmp_path / "rows")
    _, files = make(pipeline, tmp_path / "files", png=True)
    assert files.names[11] == "000011.png" and (pixels(rows) == pixels(files)).all()
    with Image.open(tmp_path / "files" / "000011.png") as picture:
        assert picture.mode == "L" and picture.size == (16, 16)


# Statistics ---------------------------------------------------------------------------------------


def colours(path, count=8, side=64) -> None:
    path.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")


def of(folder, **arguments) -> Reference:
    pictures, network = open_pictures(folder), load_features()
    features = torch.cat(list(features_in(pictures, network, batch_size=3, **arguments)))
    return Reference.of(features, network.name, arguments.get("size") or picture_side(pictures))


def test_the_distance_is_that_of_the_features(tmp_path):
    colours(tmp_path / "a"), colours(tmp_path / "b", 5)
    a, b = of(tmp_path / "a"), of(tmp_path / "b")
    features = []
    for name in ("a", "b"):
        images = torch.from_numpy(pixels(open_pictures(tmp_path / name))).permute(0, 3, 1, 2) / 255
        features.append(features_of(load_features(), images))
    assert b.distance(a) == pytest.approx(frechet_distance(*features), rel=1e-3)
    b.save(tmp_path / "deep" / "b.npz")
    again = Reference.load(tmp_path / "deep" / "b.npz")
    assert (again.count, again.image_size) == (5, 64)
    assert again.features == "EfficientNet-Lite0, block 10"
    assert again.distance(a) == b.distance(a)
    assert len(doubts(a, again)) == 2 and "8 images: a distance falls" in doubts(a, again)[0]


def ours(d: int = 112, **arguments) -> Reference:
    return Reference(torch.zeros(d).double(), torch.eye(d).double(), **arguments)


def test_published_statistics_of_other_features_are_refused(tmp_path):
    np.savez(tmp_path / "imagenet.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    theirs = Reference.load(tmp_path / "imagenet.npz")
    with pytest.raises(ValueError, match=r"2048 numbers an image \(Inception\), .*of 112 .*--png"):
        theirs.distance(ours(features="EfficientNet", count=20_000, image_size=256))


def test_statistics_of_other_images_are_refused():
    mine = ours(features="EfficientNet", count=50_000, image_size=64)
    with pytest.raises(ValueError, match="are of images of 256 pixels, these have 64"):
        ours(features="EfficientNet", image_size=256).distance(mine)
    with pytest.raises(ValueError, match=r"112 numbers an image \(another\)"):
        ours(features="another").distance(mine)
    assert ours().distance(mine) == 0.0
    assert [text[:25] for text in doubts(mine, ours())] == ["the file does not say how"]
    assert doubts(mine) == []


@pytest.mark.parametrize("damage", ["text", "no sigma", "pickle", "shape", "missing"])
def test_wrong_statistics_are_refused(tmp_path, damage):
    path, mu, sigma = tmp_path / "s.npz", np.zeros(3), np.eye(3)
    if damage == "text":
        path.write_text("mu sigma")
    elif damage == "no sigma":
        np.savez(path, mu=mu)
    elif damage == "pickle":
        np.savez(path, mu=np.array([{}], dtype=object), sigma=sigma)
    elif damage == "shape":
        np.savez(path, mu=mu, sigma=np.eye(4))
    with pytest.raises(
        ValueError, match=r"s.npz is missing or damaged .* .npz with `mu` and `sigma`"
    ):
        Reference.load(path)


def test_pictures_of_several_sizes_want_a_size(tmp_path):
    colours(tmp_path / "a", 3)
    Image.new("RGB", (64, 80)).save(tmp_path / "a" / "z.png")
    with pytest.raises(ValueError, match="z.png is 64x80 pixels, expected 64x64"):
        of(tmp_path / "a")
    assert of(tmp_path / "a", size=32).count == 4
    (tmp_path / "a" / "y.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="y.png .*mend or remove"):
        of(tmp_path / "a", size=32)
    Image.new("RGB", (64, 80)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match="0.png is 64x80 pixels; say to which side .*--size"):
        of(tmp_path / "a")


def test_a_claim_is_json(pipeline, tmp_path):
    make(pipeline, tmp_path, 1)
    card = json.loads((tmp_path / "generated.json").read_text())
    assert card["count"] == 1 and card["settings"]["cfg"] == 2.0
