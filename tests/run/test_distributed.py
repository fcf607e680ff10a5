"""Many processes train what one does, go on from each other's checkpoints, and survive a death.

All processes are real ones on CPUs, talking over gloo.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_worker import IDENTITY, Posteriors, losses, start

from mar_mini import configs, load_pretrained
from mar_mini.data import InMemory, fetch
from mar_mini.run.distributed import DistributedTraining, join, own_device
from mar_mini.run.images import ImageSet, open_images
from mar_mini.run.state import Checkpoints
from mar_mini.run.train import MASKED, TrainingRun, watch
from mar_mini.training import Training, step_seed

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (REPO, TESTS, TESTS.parent))),
}


def saved(folder: Path, steps: int, identity: dict = IDENTITY) -> Checkpoints:
    """A folder with the last two states of so many steps."""
    training, checkpoints = start(), Checkpoints(folder, identity)
    for step in training:
        checkpoints.save(training)
        if step.step == steps:
            return checkpoints
    raise AssertionError("the training is shorter")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


# The same losses ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict:
    """The plain training: 20 steps."""
    training = start()
    rows = losses(training)
    average = training.ema.module.state_dict()
    return {"losses": rows, "average": {k: v.flatten().tolist() for k, v in average.items()}}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """What groups of processes made of their jobs, by name."""
    folder = tmp_path_factory.mktemp("distributed")
    chain, one, bad, foreign = (str(folder / name) for name in ("chain", "one", "bad", "foreign"))
    training = start()
    losses(training, 4)
    Checkpoints(Path(one), IDENTITY).save(training)
    latest = saved(Path(bad), 3).paths()[0]
    flip_a_bit(next(latest.glob("*.safetensors")))
    saved(Path(foreign), 1, {"config": "another"})
    groups = [
        (
            2,
            "ddp",
            {
                "2 ddp": {},
                "2 ddp, 2 micro batches": {"accumulate": 2},
                "foreign": {"folder": foreign},
                "bad": {"folder": bad, "until": 5},
            },
        ),
        (
            2,
            "fsdp",
            {
                "2 fsdp": {},
                "2 fsdp, 4 micro batches": {"accumulate": 4},
                "1 to 2 fsdp": {"folder": one, "until": 6},
                "chain 1: 2 fsdp": {"folder": chain, "until": 5, "full": [0, 1]},
            },
        ),
        (
            4,
            "fsdp",
            {
                "4 fsdp, 2 micro batches": {"accumulate": 2},
                "chain 2: 4 fsdp": {"folder": chain, "until": 8},
            },
        ),
        (
            4,
            "ddp",
            {
                "4 ddp, 5 micro batches": {"accumulate": 5},
                "chain 3: 4 ddp": {"folder": chain, "until": 11},
            },
        ),
        (2, "fsdp", {"chain 4: 2 fsdp": {"folder": chain, "until": 14}}),
    ]
    names = [name for *_, jobs in groups for name in jobs]
    paths = {name: folder / f"{i}.json" for i, name in enumerate(names)}
    jobs = [
        (count, strategy, [{**spec, "result": str(paths[name])} for name, spec in jobs.items()])
        for count, strategy, jobs in groups
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-W", "error", TESTS / "distributed_worker.py", folder / "jobs.json"],
        capture_output=True,
        text=True,
        timeout=500,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return {
        "folders": {"chain": Path(chain), "bad": Path(bad), "foreign": Path(foreign)},
        **{name: json.loads(path.read_text()) for name, path in paths.items()},
    }


def agree(got: list[list[float]], want: list[list[float]]) -> None:
    """Loss, its first part and the gradient's norm, before clipping, of each step."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


WHOLE = [
    "2 ddp",
    "2 ddp, 2 micro batches",
    "2 fsdp",
    "2 fsdp, 4 micro batches",
    "4 fsdp, 2 micro batches",
    "4 ddp, 5 micro batches",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_many_processes_have_the_losses_of_one(name, results, alone):
    agree(results[name]["losses"], alone["losses"])
    want = alone["average"]
    assert results[name]["average"].keys() == want.keys()
    for key, values in results[name]["average"].items():
        if not key.endswith("qkv.bias"):  # the keys' has no gradient but rounding errors
            assert values == pytest.approx(want[key], rel=1e-3, abs=1e-5), key


def test_micro_batches_have_the_losses_of_one_batch(alone):
    agree(losses(start(accumulate=5)), alone["losses"])


def test_the_losses_are_not_all_alike(alone):
    """The comparison has something to see: each step, and each other seed, has its own."""
    assert len({row[0] for row in alone["losses"]}) == 20
    other = start()
    other.seed = 4
    for a, b in zip(losses(other), alone["losses"], strict=True):
        assert abs(a[0] / b[0] - 1) > 1e-3


def test_a_batch_that_cannot_be_divided_is_refused():
    """40 images for 3 micro batches; the message has a size that works."""
    with pytest.raises(
        ValueError,
        match=r"batch_size is 40; expected a multiple of 3 .1 processes "
        "with 3 micro batches each., such as 39",
    ):
        start(accumulate=3)
    with pytest.raises(ValueError, match="accumulate is 0; expected 1 or more"):
        start(accumulate=0)


def one_of_four(rank: int, accumulate: int = 1) -> Training:
    """What a training of four processes knows of itself before it talks to the others."""
    training = start(accumulate=accumulate)
    training.rank, training.world_size = rank, 4
    training.slices = training.micro_batches()
    return training


def test_every_row_is_somebodys():
    rows = []
    for rank in range(4):
        for part in one_of_four(rank, accumulate=5).slices:
            rows.extend(range(40)[part])
    assert rows == list(range(40))


def test_dropout_is_each_processs_own():
    seeds = []
    for rank in range(4):
        with torch.random.fork_rng():
            next(one_of_four(rank).batches())
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 4 and seeds[0] == step_seed(3, 0)


# Data --------------------------------------------------------------------------------------------


def test_rows_are_the_same_whoever_asks():
    """Random latents too: any part of a batch is that part of the whole."""
    images, picked = Posteriors(), torch.randperm(60)[:40].repeat(2)
    flip = torch.arange(80) % 3 == 0
    whole = fetch(images, picked, flip, slice(0, 80), 9)
    assert whole.shape == (80, 1, 16, 16)
    for first, last in ((0, 1), (0, 40), (31, 33), (32, 64), (50, 80), (79, 80)):
        assert torch.equal(fetch(images, picked, flip, slice(first, last), 9), whole[first:last])
    means = images.means[flip.long(), picked]
    assert float((whole - means).std()) == pytest.approx(0.3, rel=0.03)
    # two draws of one image, in different blocks and in different steps
    noise = whole - means
    assert not torch.equal(noise[0], noise[40])
    assert not torch.equal(fetch(images, picked, flip, slice(0, 80), 10), whole)


def test_images_in_memory():
    latents = torch.arange(24.0).reshape(3, 1, 2, 4)
    flip = torch.tensor([True, False])
    got = InMemory(latents, torch.arange(3)).batch(torch.tensor([2, 0]), flip)
    assert got.tolist() == [
        [[[19.0, 18.0, 17.0, 16.0], [23.0, 22.0, 21.0, 20.0]]],
        [[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]],
    ]
    got = InMemory(latents, torch.arange(3), -latents).batch(torch.tensor([2, 0]), flip)
    assert torch.equal(got, torch.stack([-latents[2], latents[0]]))


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_go_on_across_processes_and_strategies(results, alone):
    """From one process to 2 and 4, FSDP and DDP, and back to one process."""
    agree(results["1 to 2 fsdp"]["losses"], alone["losses"][4:6])
    places = [
        ("chain 1: 2 fsdp", 0, 5),
        ("chain 2: 4 fsdp", 5, 8),
        ("chain 3: 4 ddp", 8, 11),
        ("chain 4: 2 fsdp", 11, 14),
    ]
    for name, first, last in places:
        assert results[name]["from"] == first and not results[name]["refused"]
        agree(results[name]["losses"], alone["losses"][first:last])
    training = start()
    checkpoints = Checkpoints(results["folders"]["chain"], IDENTITY)
    assert {p.name for p in checkpoints.paths()} == {"state-000000011", "state-000000014"}
    checkpoints.restore(training)
    assert training.step == 14
    agree(losses(training), alone["losses"][14:])
    checkpoints.save(training)
    assert [p.name for p in checkpoints.paths()] == ["state-000000020", "state-000000014"]


@pytest.mark.slow
def test_many_processes_agree_on_what_is_damaged_and_foreign(results, alone):
    bad, folders = results["bad"], results["folders"]
    (message,) = bad["refused"]
    assert message.startswith(str(folders["bad"] / "state-000000003"))
    assert "damaged (its checksum does not fit)" in message
    assert bad["from"] == 2
    agree(bad["losses"], alone["losses"][2:5])
    assert re.search(
        r"state-000000001 is of another run \(config is another there and tiny here\)",
        results["foreign"]["error"],
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES = {
    "a bit": (lambda state, file: flip_a_bit(file), "its checksum does not fit"),
    "truncated": (lambda state, file: cut(file), "its checksum does not fit"),
    "a file is missing": (lambda state, file: file.unlink(), "missing, or not of this"),
    "a file too many": (
        lambda state, file: (state / "other.safetensors").write_bytes(file.read_bytes()),
        "other.safetensors: missing, or not of this checkpoint",
    ),
    "not finished": (lambda state, file: (state / "run.json").unlink(), "no complete checkpoint"),
    "half a description": (lambda state, file: cut(state / "run.json"), "no complete checkpoint"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_named_and_the_one_before_is_used(tmp_path, how):
    damage, message = DAMAGES[how]
    checkpoints = saved(tmp_path, 3)
    latest, before = checkpoints.paths()
    damage(latest, next(latest.glob("*.safetensors")))
    again = start()
    restored = checkpoints.restore(again)
    assert restored.path == before and again.step == 2
    (refused,) = restored.refused
    assert str(latest) in refused and message in refused


def test_nothing_is_unpickled(tmp_path):
    """A pickle where PyTorch's usual storage would look for one stays where it is."""
    checkpoints = saved(tmp_path / "state", 1)
    (path,) = checkpoints.paths()
    trap = tmp_path / "sprung"
    pickle = f"cos\nmkdir\n(S'{trap}'\ntR.".encode()
    assert not list(path.glob(".metadata")) and len(list(path.iterdir())) == 2
    (path / ".metadata").write_bytes(pickle)
    (path / "__0_0.distcp").write_bytes(pickle)
    again = start()
    assert checkpoints.restore(again).path == path and again.step == 1
    assert not trap.exists()


@pytest.mark.slow
def test_a_write_that_fails_in_one_process_fails_in_all(results):
    for errors in results["chain 1: 2 fsdp"]["errors"]:
        assert len(errors) == 2 and len(set(errors)) == 1
        assert errors[0].endswith(
            "state-000000005 could not be written: [Errno 28] No space left on device"
        )


# Recipes -----------------------------------------------------------------------------------------


def test_the_learning_rate_follows_the_batch():
    """blr 1e-4: 8e-4 for 2048 images, 4e-4 for 1024; 400 epochs either way."""
    published = configs.get_config("mar_large").training
    half = configs.for_batch_size(published, 1024)
    assert (published.batch_size, published.learning_rate) == (2048, 8e-4)
    assert half.learning_rate == pytest.approx(1e-4 * 1024 / 256)
    assert half.max_steps * 1024 == pytest.approx(400 * 1_281_167, rel=1e-5)
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        configs.for_batch_size(published, 0)


def test_the_effective_batch():
    """All of micro batches times their number times processes makes one step."""
    given = {"images": 1000, "epochs": 3}
    assert configs.scaled_recipe(8, 2, 4, **given) == (64, pytest.approx(1e-4 / 4), 46)
    assert configs.scaled_recipe(4, 8, 2, **given) == configs.scaled_recipe(8, 2, 4, **given)
    batch, rate, _ = configs.scaled_recipe(256, 1, 1, images=1000, epochs=1.5, blr=3e-4)
    assert (batch, rate) == (256, 3e-4)


def tiny_preset(**changes) -> configs.Config:
    digits = configs.get_config("digits")
    training = replace(digits.training, max_steps=3, max_seconds=None, precision="float32")
    return replace(digits, training=training, **changes)


def test_latents_that_are_there_already(tmp_path):
    """Trained and resumed; the pipeline knows their scale and classes."""
    run = TrainingRun(tiny_preset(), Posteriors(), folder=tmp_path)
    assert [(stage, step.step) for stage, step, _ in run] == [(MASKED, i) for i in (1, 2, 3)]
    pipeline = run.pipeline
    assert pipeline.latent_scale == 0.5 and pipeline.classes == [str(i) for i in range(10)]
    assert pipeline.card["steps"] == 3
    assert list(TrainingRun(tiny_preset(), Posteriors(), folder=tmp_path)) == []
    another = Posteriors()
    another.labels = another.labels.flip(0)
    with pytest.raises(ValueError, match="is of another run .data is"):
        next(TrainingRun(tiny_preset(), another, folder=tmp_path))


def test_latents_of_other_classes_are_refused(tmp_path):
    three = Posteriors()
    three.classes = ["a", "b", "c"]
    with pytest.raises(ValueError, match="3 classes, but preset 'digits' is made for 10"):
        TrainingRun(tiny_preset(), three)
    with pytest.raises(ValueError, match="preset 'kl16' has no MAR to train"):
        TrainingRun(configs.get_config("kl16"), three)


def test_many_processes_need_a_trained_autoencoder(tmp_path):
    images = open_images("cifar10_mini")
    images = ImageSet(images.images[:64], images.labels[:64], images.classes)
    config = configs.get_config("cifar10")
    run = TrainingRun(config, images, folder=tmp_path, kind=DistributedTraining)
    with pytest.raises(ValueError, match="no trained autoencoder in .*give the command without"):
        next(run)


def test_without_torchrun_one_process_is_alone(monkeypatch):
    assert not torch.distributed.is_torchelastic_launched()
    with join("fsdp") as kind:
        assert kind is Training
    with pytest.raises(ValueError, match="unknown strategy 'fdsp'; expected one of: ddp, fsdp"):
        with join("fdsp"):
            pass
    assert own_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device("auto") == torch.device("cuda")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("auto") == own_device("cuda") == torch.device("cuda:3")
    assert own_device("cpu") == torch.device("cpu")


# A death -----------------------------------------------------------------------------------------

STEPS = 16


def torchrun(out: Path, count: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={count}",
        "--standalone",
        "-m",
        "mar_mini",
        "train",
        *("--config", "digits", "--out", str(out), "--max-steps", str(STEPS)),
        *("--strategy", "fsdp", "--precision", "float32", "--device", "cpu"),
        *("--save-minutes", "0", "--accumulate", "2", "--no-samples"),
    ]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT
    )


def worker_of(agent: int, rank: int) -> int:
    """The process of that rank among torchrun's children."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
            status = (path.parent / "status").read_text()
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and f"PPid:\t{agent}\n" in status:
            return int(path.parent.name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_process_is_killed_and_the_same_command_goes_on(tmp_path):
    """The others end, the message names it, and the run ends with the losses of an undisturbed one.

    The losses of all steps are in the history that the command writes.
    """
    out, whole = tmp_path / "out", tmp_path / "whole"
    agent = torchrun(out, 2)
    lines = []
    for line in agent.stdout:
        lines.append(line)
        if "step 7," in line:
            os.kill(worker_of(agent.pid, 1), signal.SIGKILL)
            break
    killed = time.monotonic()
    rest, _ = agent.communicate(timeout=60)
    text = "".join(lines) + rest
    assert time.monotonic() - killed < 60 and agent.returncode != 0
    message = r"rank +: 1 .*\n +exitcode +: -9 .*\n(.*\n)?.*Signal 9 \(SIGKILL\)"
    assert re.search(message, text), text
    assert not (out / "mar.safetensors").exists()

    agent = torchrun(out, 2)
    text, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0, text
    started = int(re.search(r"training the masked .* from step (\d+)", text).group(1))
    assert 6 <= started <= 9  # the step after the last one that was saved
    config = configs.get_config("digits")
    config = replace(
        config,
        training=replace(config.training, max_steps=STEPS, max_seconds=None, precision="float32"),
    )
    watch(TrainingRun(config, open_images("digits")), whole, moments=())
    got, want = (
        json.loads((folder / "history_masked.json").read_text()) for folder in (out, whole)
    )
    assert [row["step"] for row in want] == list(range(1, STEPS + 1))
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for a, b in zip(got, want, strict=True):
        for term in ("loss", "mse", "vb", "grad_norm"):
            assert a[term] == pytest.approx(b[term], rel=1e-4)
    pipeline = load_pretrained(out)
    assert pipeline.card["processes"] == 2 and pipeline.card["steps"] == STEPS
    assert pipeline.generate([3], num_iter=2).shape == (1, 1, 16, 16)
