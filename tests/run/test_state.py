"""A run that is killed goes on to the same bits, whatever it was doing; nothing good is lost."""

import json
import os
import random
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
from mar_mini.run.state import KEPT, Checkpoints, History, Interrupted, resumable
from mar_mini.training import Training

TEN = changed(max_steps=10)
IDENTITY = {"config": "tiny", "seed": 0}


def start(config=TEN) -> Training:
    dropping = {**SIZES, "attn_dropout": 0.1, "proj_dropout": 0.1}
    return train_mar(fill(MAR(**dropping), 7), LATENTS, LABELS, config)


def same_state(a: dict, b: dict) -> bool:
    """All but the seconds."""
    a, b = ({k: v for k, v in x.items() if k != "counters"} for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def final() -> dict:
    training = start()
    list(training)
    return training.state()


def test_a_state_goes_on_to_the_same_bits(final):
    first = start()
    for _ in range(4):
        next(first)
    state = first.state()
    assert not same_state(state, final)
    second = start()
    second.load(state)
    assert [step.step for step in second] == [5, 6, 7, 8, 9, 10]
    assert same_state(second.state(), final)


def test_a_state_is_a_copy():
    training = start()
    next(training)
    state = training.state()
    before = {name: value.clone() for name, value in state.items()}
    next(training)
    assert same_state(state, before)


def test_a_state_of_another_model_changes_nothing():
    training = start()
    next(training)
    before = training.state()
    other = train_mar(fill(MAR(**{**SIZES, "encoder_depth": 2}), 7), LATENTS, LABELS, TEN)
    next(other)
    with pytest.raises(ValueError, match="the state is of another model"):
        training.load(other.state())
    assert same_state(training.state(), before)


def test_the_last_two_are_kept(tmp_path):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    for step in training:
        checkpoints.save(training)
        steps = [int(path.stem.removeprefix("state-")) for path in checkpoints.paths()]
        assert steps == list(range(step.step, 0, -1))[:KEPT]
    assert {p.name for p in tmp_path.iterdir()} == {
        "state-000000009.safetensors",
        "state-000000010.safetensors",
    }


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
    damage(latest, how)
    again = start()
    restored = checkpoints.restore(again)
    assert restored.path == before and again.step == 5
    assert len(restored.refused) == 1
    assert str(latest) in restored.refused[0] and "damaged" in restored.refused[0]
    list(again)
    assert same_state(again.state(), final)


def test_all_damaged_begins_anew(tmp_path):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    next(training)
    damage(checkpoints.save(training), "truncated")
    restored = checkpoints.restore(fresh := start())
    assert restored.path is None and len(restored.refused) == 1 and fresh.step == 0


def test_another_runs_checkpoints_are_refused_by_name(tmp_path):
    training = start()
    next(training)
    Checkpoints(tmp_path, {**IDENTITY, "seed": 1}).save(training)
    with pytest.raises(
        ValueError,
        match=r"state-000000001.safetensors is of another run \(seed is "
        "1 there and 0 here",
    ):
        Checkpoints(tmp_path, IDENTITY).restore(start())


def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch):
    training, checkpoints = start(), Checkpoints(tmp_path, IDENTITY)
    next(training)
    good = checkpoints.save(training)
    next(training)

    def full(state, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mar_mini.run.state.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(training)
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoints.restore(start()).path == good


def test_the_history_of_a_run_whose_budget_grew_goes_on_evenly(tmp_path):
    history = History(tmp_path / "history.json", entries=10)
    training = start()
    for step in training:
        history.add(step)
    history.save()
    history, longer = History(history.path, entries=10), start(changed(max_steps=40))
    longer.load(training.state())
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
    assert same_state(again.state(), final)


# A real process, killed for real ------------------------------------------------------------------

PROGRAM = """
import sys, time, json, torch
sys.path[:0] = json.loads(sys.argv[2])
import mar_mini.run.state as runs
from test_state import start, IDENTITY, TEN, changed
write = runs.save_file
def slow(state, path, metadata):
    half = dict(list(state.items())[: len(state) // 2])
    write(half, path, metadata)          # a kill in the pause leaves half a file behind
    print("writing", flush=True)
    time.sleep(0.05)
    write(state, path, metadata)
runs.save_file = slow
training = start(changed(max_steps=40))
checkpoints = runs.Checkpoints(sys.argv[1], IDENTITY)
for step in runs.resumable(training, checkpoints, every=0.0):
    print("step", step.step, flush=True)
print("done", runs.checksum({k: v for k, v in training.state().items() if k != "counters"}))
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
