"""`mar-mini doctor` sees what is broken, and says so by name."""

import shutil

import pytest
import torch

from mar_mini import data
from mar_mini.course import doctor


@pytest.fixture
def copied(tmp_path, monkeypatch):
    for path in ("digits", "reference", "symptoms", "weights/digits"):
        shutil.copytree(data.data_dir() / path, tmp_path / path)
    for module in (data, doctor):
        monkeypatch.setattr(module, "data_dir", lambda: tmp_path)
    return tmp_path


def test_what_is_bundled_is_whole(copied):
    found = list(doctor.bundled())
    assert len(found) == 5 and all(fine for fine, _ in found), found


@pytest.mark.parametrize(
    "name",
    [
        "digits/test.parquet",
        "reference/cifar10.safetensors",
        "symptoms/evidence.json",
        "weights/digits/mar.safetensors",
        "weights/digits/config.json",
    ],
)
def test_a_truncated_file_is_named(copied, name):
    path = copied / name
    path.write_bytes(path.read_bytes()[:-100])
    bad = [line for fine, line in doctor.bundled() if not fine]
    assert len(bad) == 1 and str(path) in bad[0]


def test_findings_of_this_machine():
    lines = [line for _, line in doctor.findings()]
    for what in ("Python 3", "torch 2", " cores, torch uses ", "bfloat16", "GiB free in", "GPU"):
        assert any(what in line for line in lines), what


@pytest.mark.parametrize(
    "amx, avx512, said",
    [
        (True, True, "CPU: AMX, units"),
        (False, True, "CPU: avx512_bf16, no AMX: float32"),
        (False, False, "CPU: neither AMX nor avx512_bf16: float32"),
    ],
)
def test_what_multiplies_bfloat16(monkeypatch, amx, avx512, said):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert any(said in line for _, line in doctor.findings())


def test_what_is_missing_is_named(copied):
    (copied / "symptoms" / "evidence.json").unlink()
    (copied / "weights" / "digits" / "mar.safetensors").unlink()
    bad = [line for fine, line in doctor.bundled() if not fine]
    assert len(bad) == 2 and "evidence.json is missing" in bad[0]
    assert "mar.safetensors is missing" in bad[1]
