"""A run that is killed goes on to the same bits, whatever it was doing; nothing good is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from golden_values import fill
from test_training import CPU, FIVE, LABELS, LATENTS, SIZES, changed  # noqa: F401

from mar_mini import MAR, train_mar
from mar_mini.run.state import KEPT, Checkpoints, History, Interrupted, Restored, resumable, tensors
from mar_mini.training import Training

TEN = changed(max_steps=10)
IDENTITY = {"config": "tiny", "seed": 0}


def start(config=TEN) -> Training:
    dropping = {**SIZES, "attn_dropout": 0.1, "proj_dropout": 0.1}
    return train_mar(fill(MAR(**dropping), 7), LATENTS, LABELS, config)


def copied(training: Training) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in tensors(training).items()}


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def final() -> dict:
    training = start()
    list(training)
    return copied(training)


def test_a_state_goes_on_to_the_same_bits(tmp_path, final):
    """What the first training does after it was saved changes nothing."""
    first, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    for _ in range(4):
        next(first)
    path = checkpoints.save(first)
    saved, seconds = copied(first), first.seconds
    assert not same_state(saved, final)
    next(first)
    second = start()
    assert checkpoints.restore(second) == Restored(path, ())
    assert same_state(copied(second), saved) and second.seconds == seconds
    assert [step.step for step in second] == [5, 6, 7, 8, 9, 10]
    assert same_state(copied(second), final)


def test_a_state_is_of_all_that_a_step_changes():
    """Weights, average, moments and how many steps they have seen, each by its name."""
    training = start()
    before = copied(training)
    next(training)
    after = copied(training)
    names = {name for name, _ in training.model.named_parameters()}
    assert after.keys() == {
        "average.n_averaged",
        *(f"{part}.{name}" for part in ("model", "average.module") for name in names),
        *(f"optimizer.{n}.{x}" for n in names for x in ("step", "exp_avg", "exp_avg_sq")),
        *(f"model.{name}" for name, _ in training.model.named_buffers()),
        *(f"average.module.{name}" for name, _ in training.model.named_buffers()),
    }
    for state, steps in ((before, 0), (after, 1)):
        counted = {"average.n_averaged", *(f"optimizer.{name}.step" for name in names)}
        assert {int(state[name]) for name in counted} == {steps}


def test_a_look_at_the_state_before_the_first_step_changes_nothing(tmp_path, final):
    """Saving makes moments where there are none."""
    training = start()
    Checkpoints(tmp_path, IDENTITY).save(training)
    list(training)
    assert same_state(copied(training), final)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_depth": 2}, r"encoder_blocks.1.\S+ \(.*\), this model no such tensor"),
        ({"decoder_depth": 0}, r"decoder_blocks.0.\S+ no such tensor, this model \(.*\)"),
        ({"class_num": 11}, r"class_emb.weight \(11, 32\), this model \(10, 32\)"),
    ],
)
def test_a_state_of_another_model_changes_nothing(tmp_path, final, change, message):
    """Refused, and the training begins as if nothing had been there."""
    other = train_mar(fill(MAR(**{**SIZES, **change}), 7), LATENTS, LABELS, TEN)
    next(other)
    checkpoints = Checkpoints(tmp_path, IDENTITY)
    path = checkpoints.save(other)
    restored = checkpoints.restore(training := start())
    assert restored.path is None
    (refused,) = restored.refused
    assert re.search(
        f"{path} has (model|average.module).{message}: it is of another model", refused
    )
    assert training.step == 0
    list(training)
    assert same_state(copied(training), final)


def test_the_last_two_are_kept(tmp_path):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    for step in training:
        checkpoints.save(training)
        steps = [int(path.name.removeprefix("state-")) for path in checkpoints.paths()]
        assert steps == list(range(step.step, 0, -1))[:KEPT]
    assert {p.name for p in tmp_path.iterdir()} == {"state-000000009", "state-000000010"}


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        data = bytearray(data)
        data[-5] ^= 1
        path.write_bytes(bytes(data))
    elif how == "pickle":
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/no'\ntR.")


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "pickle"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, how, final):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    for _ in range(6):
        next(training)
        checkpoints.save(training)
    latest, before = checkpoints.paths()
    damage(next(latest.glob("*.safetensors")), how)
    again = start()
    restored = checkpoints.restore(again)
    assert restored.path == before and again.step == 5
    assert len(restored.refused) == 1
    assert str(latest) in restored.refused[0] and "damaged" in restored.refused[0]
    list(again)
    assert same_state(copied(again), final)


def test_all_damaged_begins_anew(tmp_path, final):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    next(training)
    damage(next(checkpoints.save(training).glob("*.safetensors")), "truncated")
    restored = checkpoints.restore(fresh := start())
    assert restored.path is None and len(restored.refused) == 1 and fresh.step == 0
    list(fresh)
    assert same_state(copied(fresh), final)


def test_damaged_ones_do_not_push_out_good_ones(tmp_path):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    for _ in range(6):
        next(training)
        checkpoints.save(training)
    for path in checkpoints.paths():
        damage(next(path.glob("*.safetensors")), "truncated")
    again = start()
    assert checkpoints.restore(again).path is None
    for step in again:
        path = checkpoints.save(again)
        assert checkpoints.restore(start()).path == path
        if step.step == 6:
            break
    assert [path.name for path in checkpoints.paths()] == ["state-000000006", "state-000000005"]


def test_no_bit_of_the_description_may_change(tmp_path):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    for _ in range(2):
        next(training)
        checkpoints.save(training)
    latest, before = checkpoints.paths()
    whole = (latest / "run.json").read_bytes()
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 0x80 if place % 2 else 1
        (latest / "run.json").write_bytes(bytes(changed))
        assert checkpoints.restore(start()).path == before, bytes(changed)


@pytest.mark.parametrize("earlier", ["file", "folder"])
def test_a_state_of_an_earlier_version_is_not_ignored(tmp_path, earlier):
    path = tmp_path / "state-000000003"
    if earlier == "file":
        path = path.with_suffix(".safetensors")
        path.write_bytes(b"tensors")
    else:
        path.mkdir()
        (path / "run.json").write_text(json.dumps({"identity": IDENTITY, "step": 3, "files": {}}))
    with pytest.raises(
        ValueError, match=f"{path.name} is of an earlier version of mar_mini; choose another"
    ):
        Checkpoints(tmp_path, IDENTITY).restore(start())
    assert path.exists()


def test_another_runs_checkpoints_are_refused_by_name(tmp_path):
    training = start()
    next(training)
    Checkpoints(tmp_path, {**IDENTITY, "seed": 1}).save(training)
    with pytest.raises(
        ValueError,
        match=r"state-000000001 is of another run \(seed is 1 there and 0 here\); choose another",
    ):
        Checkpoints(tmp_path, IDENTITY).restore(start())


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    next(training)
    good = checkpoints.save(training)
    next(training)

    def full(*_):
        raise OSError(28, "No space left on device")

    for place in (
        "torch.distributed.checkpoint.filesystem.os.fsync",
        "mar_mini.run.state.Path.rename",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(
                OSError, match="state-000000002 could not be written: .*No space left"
            ):
                checkpoints.save(training)
        assert list(tmp_path.iterdir()) == [good]
        assert checkpoints.restore(start()).path == good
    assert checkpoints.save(training) == checkpoints.paths()[0]
    assert checkpoints.save(training) == checkpoints.paths()[0]  # once more in its place


def test_the_history_of_a_run_whose_budget_grew_goes_on_evenly(tmp_path):
    history = History(tmp_path / "history.json", entries=10)
    training = start()
    for step in training:
        history.add(step)
    history.save()
    history, longer = History(history.path, entries=10), start(changed(max_steps=40))
    longer.resume(training.step, training.seconds)
    for step in longer:
        history.add(step)
    places = [(row["step"], row["progress"]) for row in history.rows]
    assert places[-1] == (40, 1.0)
    assert all(progress == pytest.approx(step / 40, abs=0.03) for step, progress in places)
    gaps = [after[0] - before[0] for before, after in zip(places, places[1:], strict=False)]
    assert max(gaps) <= 6  # a tenth of 40 steps, and what the growth rounded


@pytest.fixture
def ctrl_c():
    """SIGINT as in a terminal: a job started in the background inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, final):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    with pytest.raises(Interrupted, match="stopped after step 3; the state is saved in .*go on"):
        for step in resumable(training, checkpoints):
            if step.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = start()
    assert [step.step for step in resumable(again, checkpoints)] == [4, 5, 6, 7, 8, 9, 10]
    assert same_state(copied(again), final)


def test_a_deadline_is_a_ctrl_c(tmp_path, final):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    with pytest.raises(Interrupted, match="stopped after step 1; the state is saved in .*go on"):
        list(resumable(training, checkpoints, until=time.monotonic()))
    again = start()
    steps = resumable(again, checkpoints, until=time.monotonic() + 3600)
    assert [step.step for step in steps] == list(range(2, 11))
    assert same_state(copied(again), final)


# A real process, killed for real ------------------------------------------------------------------

PROGRAM = """
import sys, time, json, torch
sys.path[:0] = json.loads(sys.argv[2])
import mar_mini.run.state as runs
from test_state import start, IDENTITY, TEN, changed
write = runs.dcp.save
def slow(state, **how):
    half = dict(list(state.items())[: len(state) // 2])
    write(half, **how)                   # a kill in the pause leaves half a folder behind
    print("writing", flush=True)
    time.sleep(0.05)
    write(state, **how)
runs.dcp.save = slow
training = start(changed(max_steps=40))
checkpoints = runs.Checkpoints(sys.argv[1], IDENTITY)
for step in runs.resumable(training, checkpoints, every=0.0):
    print("step", step.step, flush=True)
print("done", runs.checksum(runs.tensors(training)))
"""


def run_until(folder: Path, stop: str, count: int, delay: float) -> list[str]:
    """Start the program, wait for that many lines of a kind, then kill -9; its lines."""
    paths = json.dumps(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), paths],
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines, seen = [], 0
    for line in process.stdout:
        lines.append(line.strip())
        seen += line.startswith(stop)
        if seen == count:
            time.sleep(delay)
            process.kill()
            break
    process.stdout.close()
    process.wait()
    return lines


@pytest.mark.slow
def test_killed_at_random_moments_twice_in_a_row(tmp_path):
    """6 kills, a third of them inside a write, each pair in a row without a whole run between.

    MAR_MINI_KILLS=50 in the environment for a longer test.
    """
    kills = int(os.environ.get("MAR_MINI_KILLS", "6"))
    want = run_until(tmp_path / "whole", "done", 1, 0.0)[-1]
    assert want.startswith("done")
    moments = random.Random(0)
    for pair in range(kills // 2):
        folder = tmp_path / str(pair)
        for kill in range(2):
            inside = (2 * pair + kill) % 3 == 0
            delay = 0.02 if inside else 0.06 + moments.random() * 0.02
            lines = run_until(folder, "writing", moments.randrange(2, 12), delay)
            assert not lines[-1].startswith("done")
            if inside:
                assert len(list(folder.glob(".state-*"))) == 1, "not killed inside a write"
        assert run_until(folder, "done", 1, 0.0)[-1] == want
        assert not list(folder.glob(".state-*"))
