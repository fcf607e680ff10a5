"""The package as a whole: light to import, within its size, free of what it must not carry."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mar_mini import MAR, AutoencoderKL, get_config
from mar_mini.configs import PRESETS

REPO = Path(__file__).resolve().parent.parent
IMPORT = """
import sys, time
start = time.process_time()
import torch
between = time.process_time()
import mar_mini
share = (time.process_time() - between) / (between - start)
print(share, *sorted({name.split(".")[0] for name in sys.modules}))
"""


def tracked() -> list[Path]:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True)
    return [REPO / name for name in out.stdout.decode().split("\0") if name]


@pytest.mark.slow
def test_import_is_light_and_quick():
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    share = min(float(run.stdout.split()[0]) for run in runs)
    loaded = set(runs[0].stdout.split()[1:])
    heavy = {"datasets", "matplotlib", "ipywidgets", "anywidget", "pandas", "pyarrow", "tyro"}
    assert not loaded & heavy
    assert share < 0.3, f"import mar_mini takes {share:.0%} longer than torch alone"


def test_tracked_files_are_small():
    megabytes = sum(path.stat().st_size for path in tracked() if path.exists()) / 1e6
    assert megabytes < 48, f"{megabytes:.1f} MB are tracked"


def test_one_set_of_pins():
    pins = (REPO / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in pins
    assert not re.search(r"^(torchvision|timm)\b", pins, re.MULTILINE)
    names = re.findall(r'"([A-Za-z_-]+)>=', (REPO / "pyproject.toml").read_text())
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", pins, re.M)}
    assert len(names) > 15
    assert {n.lower().replace("_", "-") for n in names} - {"setuptools"} <= pinned


def test_unknown_preset_says_which_exist():
    with pytest.raises(ValueError, match="unknown preset 'cifar'; expected one of: digits"):
        get_config("cifar")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name):
    from dataclasses import asdict

    import torch

    config = get_config(name)
    with torch.device("meta"):
        vae = AutoencoderKL(**asdict(config.vae)) if config.vae else None
        mar = MAR(**asdict(config.mar)) if config.mar else None
    assert vae is not None or mar is not None
    if vae is not None and mar is not None:
        assert vae.stride == config.mar.vae_stride
        assert vae.z_channels == mar.vae_embed_dim
        assert config.vae.resolution == config.mar.img_size
    if mar is not None:
        assert 1 <= config.sampling.num_iter <= mar.seq_len
        # a small budget needs the bound on x0, which for latents is measured when they are there;
        # the published models were sampled without
        in_pixels_for_a_small_budget = config.training.max_seconds is not None and vae is None
        assert (config.sampling.clip is not None) == in_pixels_for_a_small_budget


# In a wheel, without the repository --------------------------------------------------------------

USE = """
import sys
from dataclasses import asdict, replace
from pathlib import Path
import mar_mini
from mar_mini import MAR, Pipeline, data, get_config, load_pretrained, train_mar
from mar_mini.course.chapters import JUPYTER

assert Path(mar_mini.__file__).parent == Path(sys.argv[1], "mar_mini")
for name, shape in (("digits", (2, 1, 16, 16)), ("cifar10", (2, 3, 32, 32))):
    pipeline = load_pretrained(name)
    images = pipeline.generate([1, 7], num_iter=2, num_sampling_steps=2)
    assert images.shape == shape and pipeline.encode(images).shape[0] == 2
config = get_config("digits")
images, labels = data.to_tensors(data.load_images("digits"))
model = MAR(**asdict(config.mar))
training = replace(config.training, max_steps=2, max_seconds=None)
steps = list(train_mar(model, data.normalise(images), labels, training))
Pipeline(steps[-1].ema, clip=1.0, defaults=config.sampling).save("mine", config)
assert load_pretrained("./mine").generate([3], num_iter=2).shape == (1, 1, 16, 16)
assert (JUPYTER / "voila" / "templates" / "mar_mini" / "index.html.j2").is_file()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds nothing but what a wheel installs."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(listed, cwd=REPO, capture_output=True, check=True).stdout.decode()
    for name in out.split("\0"):
        if (REPO / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, source / name)
    build = "wheel . --no-deps --no-build-isolation --disable-pip-version-check -q -w".split()
    subprocess.run([sys.executable, "-m", "pip", *build, source / "out"], cwd=source, check=True)
    (wheel,) = (source / "out").iterdir()
    assert wheel.stat().st_size < 20e6
    zipfile.ZipFile(wheel).extractall(folder)
    shutil.rmtree(source)
    return folder


def python(installed, tmp_path, *arguments):
    """Run Python with that package, in an empty folder."""
    environment = {k: v for k, v in os.environ.items() if k != "MAR_MINI_DATA"}
    environment["PYTHONPATH"] = str(installed)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_wheel_trains_samples_and_knows_the_bundled_models(installed, tmp_path):
    done = python(installed, tmp_path, "-c", USE, installed)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_commands_of_a_wheel(installed, tmp_path):
    done = python(installed, tmp_path, "-m", "mar_mini", "info", "digits")
    assert done.returncode == 0 and "digits" in done.stdout, done.stderr
    done = python(installed, tmp_path, "-m", "mar_mini", "sample", "digits", "--out", "a.png")
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr
    done = python(installed, tmp_path, "-m", "mar_mini", "sample", "digit")
    assert "expected one of: cifar10, digits, or the path" in done.stderr
    done = python(installed, tmp_path, "-m", "mar_mini", "doctor")
    for name in ("digits/train.parquet", "weights/cifar10/config.json", "symptoms/evidence.json"):
        assert f"ok   {name}: whole" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [["course"], ["lab"], ["lab-reset", "06"], ["test"]])
def test_what_needs_the_repository_says_so_in_one_line(installed, tmp_path, command):
    done = python(installed, tmp_path, "-m", "mar_mini", *command)
    assert done.returncode == 1
    assert done.stderr.startswith("mar-mini: there are no notebooks beside the package in ")
    assert "this command needs a clone of the repository" in done.stderr
    assert done.stderr.count("\n") == 1
