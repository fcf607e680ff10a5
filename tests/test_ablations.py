"""The ablations go on where they stopped, and write what chapters read."""

import json
from concurrent.futures import ThreadPoolExecutor

import ablations
import pytest

MACHINE = {"machine": {}, "date": "", "commit": "", "command": ""}


def stub(calls, stop_after=None):
    """A training that takes no time; its value says which it was."""

    def train(job):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(job.row.key(job.seed))
        return {"value": 10.0 * job.seed, "steps": 5, "seconds_per_step": 0.5, "kl": 0.1}

    return train


def run(path, train, scale=1.0, samples=100):
    with ThreadPoolExecutor(1) as pool:
        return ablations.run(path, scale, samples, MACHINE, 1.5, pool, train)


def test_finished_trainings_are_skipped(tmp_path):
    path, first, second = tmp_path / "results" / "ablations.json", [], []
    with pytest.raises(KeyboardInterrupt):
        run(path, stub(first, stop_after=4))
    assert set(json.loads(path.read_text())["trainings"]) == set(first)
    result = run(path, stub(second))
    jobs = ablations.all_jobs(1.0, 100)
    assert len(first) == 4 and first + second == list(jobs)
    assert set(result["trainings"]) == set(jobs)
    third = []
    assert run(path, stub(third)) == result and not third
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_trainings_of_another_budget_are_done_again(tmp_path):
    path, again = tmp_path / "ablations.json", []
    run(path, stub([]), scale=0.1)
    result = run(path, stub(again))
    assert len(again) == len(result["trainings"])
    seconds = ablations.EXPERIMENTS["buffers"]["seconds"]
    assert result["buffers"]["seconds"] == seconds


def test_results_have_what_chapters_read(tmp_path):
    result = run(tmp_path / "ablations.json", stub([]))
    assert MACHINE.keys() <= result.keys()
    for name in ablations.EXPERIMENTS:
        assert result[name]["measure"] and result[name]["seconds"] > 0
        for row in result[name]["rows"]:
            assert row["label"] and row["seeds"] == [0.0, 10.0, 20.0] and len(row["steps"]) == 3
    widths = result["token_width"]
    assert widths["floor"] == 1.5 and "100 samples" in widths["measure"]
    third = widths["rows"][2]
    assert third["label"] == "patch 4: 16 tokens of 16"
    assert (third["patch"], third["tokens"], third["width"]) == (4, 16, 16)
    assert [row["channels"] for row in result["latent_channels"]["rows"]] == [2, 4, 8, 16]
    assert [row["kl_weight"] for row in result["kl_weight"]["rows"]] == [1e-6, 1e-4, 0.01, 0.1, 1]
    assert all(len(row["kl"]) == 3 for row in result["kl_weight"]["rows"])
    assert [row["buffer_size"] for row in result["buffers"]["rows"]] == [1, 2, 4, 16]
    depths = result["encoder_decoder"]["rows"]
    assert [(row["encoder"], row["decoder"]) for row in depths] == [(0, 3), (1, 2), (2, 1)]
    assert all(row["seconds_per_step"] == 0.5 for row in depths)


def test_the_same_training_is_done_once():
    """The preset itself is a row of three experiments."""
    rows = [row for e in ablations.EXPERIMENTS.values() for row in e["rows"]]
    preset = [row.facts["label"] for row in rows if row.changes == ablations.digits()]
    assert preset == ["patch 4: 16 tokens of 16", "2", "1 + 2"]
    assert len(ablations.all_jobs(1.0, 100)) == 3 * (len(rows) - 2)
