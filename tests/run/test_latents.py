"""Latents on disk are those of the pictures, whoever wrote them and however often they were killed;
nothing damaged, foreign or incomplete is trained on."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mar_mini import AutoencoderKL, load_pretrained
from mar_mini.configs import TrainingConfig, VAEConfig, get_config
from mar_mini.data import data_dir, load_images, normalise, to_tensors
from mar_mini.run.images import center_crop, open_pictures
from mar_mini.run.latents import LatentShards, open_vae, write_latents
from mar_mini.run.parts import parse_part, pieces
from mar_mini.run.train import TrainingRun

VAE = VAEConfig(
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=16,
    z_channels=4,
    num_groups=4,
)
NAMES = [f"shard-0000{i}-of-00003.safetensors" for i in range(3)]


def draw(path, size=(21, 16), seed=0, mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def source(tmp_path):
    """Eleven pictures of two classes, as lossless files."""
    for i in range(11):
        name = ("n01", "n02")[i % 2]
        draw(tmp_path / "source" / "train" / name / f"{i:02d}.png", (16 + i, 16 + i % 3), i)
    return tmp_path / "source"


@pytest.fixture
def vae():
    torch.manual_seed(1)
    return AutoencoderKL(**vars(VAE)).eval()


def encode(vae, source, out, **arguments) -> LatentShards | None:
    settings = {"side": 16, "shard_size": 4, "batch_size": 3, "command": "THE COMMAND"} | arguments
    done = sum(write_latents(vae, VAE, open_pictures(source), out, **settings))
    return done if "part" in arguments else LatentShards(out)


# Pictures -----------------------------------------------------------------------------------------


def test_the_crop_is_that_of_the_published_figures():
    """70x40 to 16: halved once with a box (35x20), bicubic to 28x16, then the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    halved = pixels.reshape(20, 2, 35, 2, 3).mean((1, 3))
    by_pil = Image.fromarray(pixels).resize((35, 20), Image.BOX)
    assert np.abs(np.asarray(by_pil) - halved).max() <= 1  # it rounds twice
    want = np.asarray(by_pil.resize((28, 16), Image.BICUBIC))[:, 6:22]
    got = center_crop(Image.fromarray(pixels), 16)
    assert got.shape == (3, 16, 16) and (got.permute(1, 2, 0).numpy() == want).all()


def test_a_picture_of_the_right_size_is_itself():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (center_crop(Image.fromarray(pixels), 16).numpy() == pixels.transpose(2, 0, 1)).all()


def test_small_pictures_are_enlarged():
    assert center_crop(Image.new("RGB", (9, 5), "red"), 16).shape == (3, 16, 16)


def test_folders_are_known_by_name(source):
    pictures = open_pictures(f"imagefolder:{source}")
    assert pictures.classes == ["n01", "n02"] and pictures.labels.tolist() == [0] * 6 + [1] * 5
    assert pictures.names[0] == "n01/00.png" and pictures.names[6] == "n02/01.png"


def test_parquet_is_read_by_row_across_files(tmp_path):
    import pyarrow.parquet as pq

    table = pq.read_table(data_dir() / "cifar10_mini" / "test.parquet").slice(0, 30)
    (tmp_path / "data").mkdir()
    for i, (first, number) in enumerate(((0, 7), (7, 23))):
        pq.write_table(
            table.slice(first, number),
            tmp_path / "data" / f"train-{i:05d}.parquet",
            row_group_size=5,
        )
    images, labels = to_tensors(load_images("cifar10_mini", "test").select(range(30)))
    pictures = open_pictures(tmp_path)
    assert torch.equal(pictures.labels, labels) and pictures.classes[0] == "airplane"
    for i in (29, 0, 6, 7, 12):
        assert (np.asarray(pictures.picture(i)) == images[i].permute(1, 2, 0).numpy()).all()
    assert pictures.names[12] == "train-00001.parquet, row 5"
    with pytest.raises(ValueError, match=r"no file called \*validation\*.parquet"):
        open_pictures(tmp_path, "validation")
    file = tmp_path / "data" / "train-00001.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="train-00001.parquet is damaged or not parquet"):
        open_pictures(tmp_path / "data")


def test_labels_that_are_none_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [{"bytes": b""}], "label": [-1]})
    pq.write_table(table, tmp_path / "test-00000.parquet")
    with pytest.raises(ValueError, match="got -1; the test split of ImageNet has no labels"):
        open_pictures(tmp_path, "test")


@pytest.mark.parametrize(("text", "want"), [("0/1", (0, 1)), ("3/4", (3, 4))])
def test_parts(text, want):
    assert parse_part(text) == want


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "a/b", "1/"])
def test_wrong_parts_are_refused(text):
    with pytest.raises(ValueError, match="expected I/N from 0/N to N-1/N"):
        parse_part(text)


def test_torchrun_says_which_part(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert parse_part() == (2, 3)
    assert pieces(5, 2) == [range(0, 2), range(2, 4), range(4, 5)]


# Encoding -----------------------------------------------------------------------------------------


def test_latents_are_those_of_the_pictures(source, vae, tmp_path):
    data = encode(vae, source, tmp_path / "out")
    pictures = open_pictures(source)
    images = torch.stack([center_crop(pictures.picture(i), 16) for i in range(11)])
    with torch.no_grad():
        straight, mirrored = (vae.encode(normalise(x)) for x in (images, images.flip(-1)))
    draws = torch.cat(
        [
            p.mean + torch.randn(500, *p.mean.shape) * (p.logvar / 2).exp()
            for p in (straight, mirrored)
        ]
    )
    assert data.latent_scale == pytest.approx(1 / float(draws.std()), rel=0.01)
    assert len(data) == 11 and data.labels.tolist() == [0] * 6 + [1] * 5
    assert data.shape == (4, 8, 8) and data.classes == ["n01", "n02"]
    picked, flip = torch.tensor([10, 0, 3, 3, 7]), torch.tensor([True, False, True, False, True])
    want = torch.where(flip[:, None, None, None], mirrored.mean[picked], straight.mean[picked])
    spread = (
        torch.where(flip[:, None, None, None], mirrored.logvar[picked], straight.logvar[picked])
        .div(2)
        .exp()
    )
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    got = data.batch(picked, flip, torch.Generator().manual_seed(5))
    want = (want + spread * noise) * data.latent_scale
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert got.abs().max() <= data.clip


def test_what_float16_loses():
    """Against the spread that latents are drawn with; bfloat16 loses eight times as much."""
    vae = load_pretrained("cifar10").vae
    images, _ = to_tensors(load_images("cifar10_mini", "test").select(range(50)))
    with torch.no_grad():
        posterior = vae.encode(normalise(images))
    spread = (posterior.logvar / 2).exp()
    lost = {
        dtype: float(((posterior.mean.to(dtype) - posterior.mean) / spread).square().mean().sqrt())
        for dtype in (torch.float16, torch.bfloat16)
    }
    assert lost[torch.float16] == pytest.approx(0.015, abs=0.003)
    assert lost[torch.bfloat16] == pytest.approx(0.12, abs=0.02)
    assert ((posterior.logvar.half().float() / 2).exp() / spread - 1).abs().max() < 0.004


def test_parts_make_what_one_process_makes(source, vae, tmp_path):
    one = encode(vae, source, tmp_path / "one")
    assert encode(vae, source, tmp_path / "two", part=(1, 2)) == 4
    with pytest.raises(ValueError, match="2 of 3 shards are missing .*them with: THE COMMAND"):
        LatentShards(tmp_path / "two")
    encode(vae, source, tmp_path / "two", part=(0, 2), workers=2)
    for name in NAMES:
        a, b = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    two = LatentShards(tmp_path / "two")
    assert two.manifest == one.manifest and two.checksum == one.checksum


def test_a_killed_run_goes_on(source, vae, tmp_path):
    out = tmp_path / "out"
    steps = write_latents(
        vae, VAE, open_pictures(source), out, side=16, command="", shard_size=4, batch_size=3
    )
    while not (out / NAMES[0]).exists():
        next(steps)
    steps.close()
    left_over = out / f".{NAMES[1]}.xyz"
    left_over.write_bytes(b"half")
    os.utime(out / NAMES[0], (1, 1))
    with pytest.raises(ValueError, match="2 of 3 shards are missing"):
        LatentShards(out)
    assert len(encode(vae, source, out)) == 11
    assert (out / NAMES[0]).stat().st_mtime == 1 and not left_over.exists()


def test_other_latents_are_not_mixed(source, vae, tmp_path):
    encode(vae, source, tmp_path / "out")
    with torch.no_grad():
        vae.quant_conv.bias += 1
    with pytest.raises(ValueError, match="holds other latents .weights is .* there and .* here"):
        encode(vae, source, tmp_path / "out")
    with pytest.raises(ValueError, match="image_size is 16 there and 32 here"):
        encode(vae, source, tmp_path / "out", side=32)


def test_unreadable_pictures_are_named_or_listed(source, vae, tmp_path):
    (source / "train" / "n01" / "02.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match=r"n01/02.png \(no image format that is known\); .*--skip"):
        encode(vae, source, tmp_path / "out")
    assert not (tmp_path / "out" / NAMES[0]).exists()
    data = encode(vae, source, tmp_path / "out", skip_unreadable=True)
    assert len(data) == 10 and data.labels.tolist() == [0] * 5 + [1] * 5
    assert len(data.skipped) == 1 and data.skipped[0].startswith("n01/02.png")


def test_latents_that_do_not_fit_float16_are_refused(source, vae, tmp_path):
    with torch.no_grad():
        vae.quant_conv.weight *= 1e9
    with pytest.raises(ValueError, match="are not finite in float16"):
        encode(vae, source, tmp_path / "out")


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "foreign", "other file"])
def test_a_wrong_shard_is_refused_by_name(source, vae, tmp_path, damage):
    encode(vae, source, tmp_path / "out")
    path = tmp_path / "out" / NAMES[1]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes((tmp_path / "out" / NAMES[0]).read_bytes())
    else:
        save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=rf"{NAMES[1]}( is |\); make them ).*with: THE COMMAND"):
        LatentShards(tmp_path / "out")


def test_a_changed_byte_is_found_by_the_checksum(source, vae, tmp_path):
    data = encode(vae, source, tmp_path / "out")
    assert list(data.check()) == NAMES
    path = tmp_path / "out" / NAMES[2]
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(ValueError, match=f"checksum does not fit in {NAMES[2]}; remove"):
        list(LatentShards(tmp_path / "out").check())


def test_a_damaged_manifest_and_no_latents(source, vae, tmp_path):
    with pytest.raises(ValueError, match="no latents in .*make them with: mar-mini latents"):
        LatentShards(tmp_path)
    encode(vae, source, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('{"format": "mar_mini lat')
    with pytest.raises(ValueError, match=r"manifest.json is damaged; remove it"):
        LatentShards(tmp_path / "out")


def test_the_autoencoder_is_that_of_the_latents(source, vae, tmp_path):
    data = encode(vae, source, tmp_path / "out")
    model, config = data.autoencoder()
    assert config == VAE and torch.equal(model.quant_conv.weight, vae.quant_conv.weight)
    state = load_file(tmp_path / "out" / "vae.safetensors")
    state["quant_conv.bias"] += 1
    save_file(state, tmp_path / "out" / "vae.safetensors")
    with pytest.raises(ValueError, match="vae.safetensors did not make these latents"):
        data.autoencoder()


def test_an_autoencoder_is_found(tmp_path):
    assert open_vae("cifar10")[1] == get_config("cifar10").vae
    with pytest.raises(ValueError, match="say which preset its vae.safetensors is of: --config"):
        open_vae(tmp_path)
    with pytest.raises(ValueError, match="digits has no autoencoder"):
        open_vae("digits")


# Training -----------------------------------------------------------------------------------------


def tiny():
    config = get_config("cifar10")
    mar = replace(config.mar, img_size=16, vae_stride=2, vae_embed_dim=4, class_num=2)
    training = TrainingConfig(batch_size=5, max_steps=3, flip=True, precision="float32")
    return replace(config, mar=mar, training=training)


def test_a_model_is_trained_on_latents(source, vae, tmp_path):
    data, losses = encode(vae, source, tmp_path / "out"), []
    for _ in range(2):
        run = TrainingRun(tiny(), data, seed=1)
        losses += [progress.step.loss for progress in run]
    pipeline = run.pipeline
    assert losses[:3] == losses[3:] and len(set(losses)) == 3  # all that is random has a seed
    assert (pipeline.latent_scale, pipeline.clip) == (data.latent_scale, data.clip)
    assert pipeline.generate([1], num_iter=2, num_sampling_steps=2).shape == (1, 3, 16, 16)
    path = pipeline.save(tmp_path / "model", replace(tiny(), vae=VAE))
    assert json.loads((path / "config.json").read_text())["classes"] == ["n01", "n02"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_float16_latents_are_trained_on_in_both_precisions(source, vae, tmp_path, precision):
    """Asked for, not found out: what "auto" chooses depends on the processor."""
    data, config = encode(vae, source, tmp_path / "latents"), tiny()
    config = replace(config, training=replace(config.training, precision=precision))
    losses = [progress.step.loss for progress in TrainingRun(config, data, seed=1)]
    assert len(losses) == 3 and all(map(math.isfinite, losses))


def test_latents_that_do_not_fit_the_preset(source, vae, tmp_path):
    data = encode(vae, source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"latents are \(4, 8, 8\); preset 'cifar10' is made for"):
        TrainingRun(get_config("cifar10"), data)
    config = tiny()
    with pytest.raises(ValueError, match="2 classes, but preset 'cifar10' is made for 10"):
        TrainingRun(replace(config, mar=replace(config.mar, class_num=10)), data)
