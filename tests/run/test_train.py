"""One command trains, plans itself, and goes on when it is given again."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_imagenet import recipe

from mar_mini import cli, get_config, load_pretrained
from mar_mini.data import class_names, load_images, to_tensors
from mar_mini.planner.memory import training_memory
from mar_mini.run import train as module
from mar_mini.run.images import ImageSet, open_images, write_arrays
from mar_mini.run.train import MOMENTS, TrainingRun, TrainOptions, train


@pytest.fixture
def begun(monkeypatch):
    """What `train` begins, instead of training: the run and the moments that it keeps."""

    class Begun(Exception):
        pass

    def watch(run, folder, moments, tensorboard):
        raise Begun(run, moments)

    def run(config, images, **settings):
        return SimpleNamespace(config=config, images=images, **settings)

    def begin(**options):
        with pytest.raises(Begun) as begun:
            train(options=TrainOptions(**options))
        return begun.value.args

    monkeypatch.setattr(module, "TrainingRun", run)
    monkeypatch.setattr(module, "LatentShards", lambda folder: SimpleNamespace(folder=folder))
    monkeypatch.setattr(module, "watch", watch)
    begin.Begun = Begun
    return begin


def on_gpu(monkeypatch, memory: float) -> None:
    """As if there were a GPU with so many bytes that multiplies bfloat16."""
    monkeypatch.setattr(module, "own_device", lambda kind: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))
    monkeypatch.setattr(module, "multiplies_bf16", lambda device: True)


def needed(config) -> float:
    """Bytes of a training step under bfloat16 autocast on one GPU."""
    micro = config.training.batch_size // config.training.accumulate
    return sum(training_memory(config.mar, micro, dtype="bfloat16").values())


# Whether it fits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [80e9, 24e9])
def test_the_documented_command_fits_into_one_card(monkeypatch, begun, memory):
    """The ImageNet command of recipes/README.md, to the letter, with the preset that it names."""
    on_gpu(monkeypatch, memory)
    (words,) = (words for words in recipe(smaller={}) if words[0] == "train")
    monkeypatch.setattr(sys, "argv", ["mar-mini", *words])
    with pytest.raises(begun.Begun) as caught:
        cli.main()
    run, moments = caught.value.args
    preset = get_config("mar_base")
    assert run.config.mar.encoder_depth == preset.mar.encoder_depth == 12
    assert run.config.training.batch_size == 2048 and run.config.training.learning_rate == 8e-4
    assert needed(preset) > 600e9  # in one piece
    assert needed(run.config) <= memory
    assert moments == ()  # 13 times 128 samples and 0.8 GB would take longer than the training


def test_a_run_that_cannot_fit_is_refused_before_it_starts(monkeypatch, begun, tmp_path):
    on_gpu(monkeypatch, 80e9)
    large = {"config": "mar_base", "latents": tmp_path / "latents", "out": tmp_path / "out"}
    message = "21.60 GB are available; what would fit: .*--accumulate"
    with pytest.raises(ValueError, match=message):
        train(options=TrainOptions(**large, accumulate=2, memory_gb=24))
    with pytest.raises(ValueError, match="3.60 GB are available; what would fit: nothing here"):
        train(options=TrainOptions(**large, memory_gb=4))
    assert not (tmp_path / "out").exists()
    run, _ = begun(**large, accumulate=64)  # more than it takes
    assert run.config.training.accumulate == 64 and not run.config.mar.grad_checkpointing
    checkpointed, _ = begun(**large, checkpoint_activations=True)
    assert checkpointed.config.mar.grad_checkpointing
    assert checkpointed.config.training.accumulate < 64
    tight, _ = begun(**large, memory_gb=5.3)  # not even one image without checkpointing
    assert tight.config.mar.grad_checkpointing and needed(tight.config) <= 5.3e9


def test_a_cpu_is_planned_for_where_it_is_asked_to(begun, tmp_path):
    run, _ = begun(device="cpu", out=tmp_path)
    assert run.config.training.accumulate == 1 and not run.config.mar.grad_checkpointing
    run, _ = begun(device="cpu", out=tmp_path, memory_gb=0.02, precision="float32")
    assert run.config.training.accumulate > 1


def test_a_run_goes_on_in_other_micro_batches(tmp_path):
    """On another card, say: that changes how a step is cut, not what is trained."""
    config, images = get_config("digits"), open_images("digits")
    mar = replace(config.mar, grad_checkpointing=True)
    steps = replace(config.training, max_steps=2, max_seconds=None)
    list(TrainingRun(replace(config, training=steps), images, folder=tmp_path))
    more = replace(steps, max_steps=3, accumulate=2)
    run = TrainingRun(replace(config, mar=mar, training=more), images, folder=tmp_path)
    assert [progress.step.step for progress in run] == [3]
    other = replace(config, training=replace(more, learning_rate=1e-3))
    with pytest.raises(ValueError, match="learning_rate is 0.003 there and 0.001 here"):
        next(TrainingRun(other, images, folder=tmp_path))


# What it trains on, and keeps ---------------------------------------------------------------------


def test_an_image_folder_has_the_presets_size(begun, tmp_path):
    for label in range(10):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        Image.new("RGB", (100, 80)).save(tmp_path / "pictures" / str(label) / "a.png")
    run, _ = begun(config="imagenette64", data=f"imagefolder:{tmp_path / 'pictures'}")
    assert run.images.images.shape == (10, 3, 64, 64)


def test_small_models_keep_moments_others_if_asked(begun, tmp_path):
    assert begun()[1] == MOMENTS
    assert begun(samples=False)[1] == ()
    assert begun(samples=False, moments=True)[1] == MOMENTS
    large = {"config": "mar_base", "latents": tmp_path}
    assert begun(**large)[1] == ()
    assert begun(**large, moments=True)[1] == MOMENTS


def test_options_change_the_preset(begun, tmp_path):
    run, _ = begun(config="cifar10", max_minutes=3, vae_minutes=2, vae_steps=9, batch_size=64)
    training, first = run.config.training, run.config.vae_training
    assert (training.max_seconds, training.max_steps, training.batch_size) == (180, None, 64)
    assert (first.max_seconds, first.max_steps, first.batch_size) == (120, 9, 16)
    assert training.learning_rate == get_config("cifar10").training.learning_rate
    run, _ = begun(config="mar_large", latents=tmp_path, batch_size=1024, precision="float32")
    assert run.config.training.learning_rate == pytest.approx(4e-4)  # the rate follows the batch
    assert run.config.training.precision == "float32"
    assert run.config.training.max_steps == 2 * get_config("mar_large").training.max_steps
    run, _ = begun(config="mar_large", latents=tmp_path, learning_rate=1e-4, max_steps=7)
    assert (run.config.training.learning_rate, run.config.training.max_steps) == (1e-4, 7)


# Going on -----------------------------------------------------------------------------------------


def command(*arguments) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "mar_mini", "train", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_one_command_trains_and_goes_on(tmp_path):
    out = tmp_path / "run"
    # so many steps that the part ends first, however fast the machine is
    stopped = command("--out", out, "--max-steps", 1_000_000, "--part-minutes", 0.001)
    assert stopped.returncode == 75, stopped.stderr
    assert "the same command" in stopped.stdout and not (out / "mar.safetensors").exists()
    states = [path.name for path in (out / "state" / "masked").glob("state-*")]
    steps = 3 + max([int(name.removeprefix("state-")) for name in states], default=0)
    done = command("--out", out, "--max-steps", steps)
    assert done.returncode == 0, done.stderr
    card = json.loads((out / "config.json").read_text())["card"]
    rows = json.loads((out / "history_masked.json").read_text())
    assert card["steps"] == steps and card["data"] == "digits"
    assert card["command"] == f"mar-mini train --out {out} --max-steps {steps}"
    assert card["losses"]["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-4)
    assert len(list((out / "moments").glob("average-*.safetensors"))) >= 3
    with Image.open(out / "grids" / f"raw-{steps:07d}.png") as grid:
        assert grid.size == (8 * 16, 8 * 16) and grid.mode == "RGB"
    assert load_pretrained(out).generate([3], num_iter=2).shape == (1, 1, 16, 16)


@pytest.mark.slow
def test_a_trained_autoencoder_is_used_and_not_trained_again(tmp_path):
    few = {"config": "cifar10", "max_steps": 2, "out": tmp_path}
    for _ in range(2):
        assert train("vae", options=TrainOptions(**few)) == 0
        assert not (tmp_path / "history_masked.json").exists()
    history = (tmp_path / "history_autoencoder.json").read_text()
    weights = (tmp_path / "vae.safetensors").read_bytes()
    assert train(options=TrainOptions(**few, vae_steps=2, samples=False)) == 0
    assert (tmp_path / "history_autoencoder.json").read_text() == history
    assert (tmp_path / "vae.safetensors").read_bytes() == weights
    assert len(json.loads((tmp_path / "history_masked.json").read_text())) == 2


@pytest.mark.slow
def test_a_bare_machine_trains_without_the_libraries_of_the_course(tmp_path):
    """As recipes/README.md says: from arrays, with neither datasets, tyro nor matplotlib."""
    rows = load_images("digits", "train").select(range(100))
    write_arrays(ImageSet(*to_tensors(rows), class_names(rows)), tmp_path / "data" / "train")
    text = (
        "import sys\n"
        "for name in ('datasets', 'tyro', 'matplotlib', 'pandas', 'pyarrow', 'ipywidgets'):\n"
        "    sys.modules[name] = None\n"
        "from mar_mini.run.train import TrainOptions, train\n"
        f"options = TrainOptions(data={str(tmp_path / 'data')!r}, out={str(tmp_path / 'out')!r},\n"
        "    max_steps=2, samples=False)\n"
        "train(options=options)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mar.safetensors").exists()
