"""Trained models in and out: what is saved comes back, what is damaged is said plainly."""

import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from golden_values import fill
from safetensors.torch import load_file

from mar_mini import MAR, AutoencoderKL, Pipeline, checkpoints, get_config, load_pretrained
from mar_mini.checkpoints import load_weights, save_weights, write_atomically
from mar_mini.configs import MARConfig, SamplingConfig, VAEConfig
from mar_mini.transformer import Block

WIDTHS = {
    "class_num": 10,
    "encoder_embed_dim": 32,
    "encoder_depth": 1,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "buffer_size": 2,
    "diffloss_d": 1,
    "diffloss_w": 32,
    "num_sampling_steps": 4,
}
PIXELS = MARConfig(img_size=16, vae_stride=1, patch_size=4, vae_embed_dim=1, **WIDTHS)
LATENTS = MARConfig(img_size=16, vae_stride=4, patch_size=1, vae_embed_dim=4, **WIDTHS)
VAE = VAEConfig(
    ch=8,
    ch_mult=(1, 1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    resolution=16,
    z_channels=4,
    num_groups=4,
)
CONFIGS = {
    "pixels": replace(get_config("digits"), name="tiny", mar=PIXELS, vae=None),
    "latents": replace(get_config("cifar10"), name="tiny_latents", mar=LATENTS, vae=VAE),
}


def make(kind: str) -> Pipeline:
    """An untrained pipeline in which every field differs from its default."""
    config = CONFIGS[kind]
    return Pipeline(
        mar=fill(MAR(**asdict(config.mar)), 7),
        vae=fill(AutoencoderKL(**asdict(config.vae)), 8) if config.vae else None,
        latent_scale=0.7 if config.vae else 1.0,
        clip=1.5,
        classes=[f"class {i}" for i in range(10)],
        defaults=SamplingConfig(
            num_iter=3, num_sampling_steps=5, cfg=1.7, cfg_schedule="constant", temperature=0.9
        ),
        card={"steps": 123, "data": "made up"},
    )


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved pipeline of pixels."""
    return make("pixels").save(tmp_path / "model", CONFIGS["pixels"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def equal_states(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# There and back ----------------------------------------------------------------------------------


def test_round_trip(kind, tmp_path):
    pipeline = make(kind)
    folder = pipeline.save(tmp_path / "deep" / kind, CONFIGS[kind], dtype=torch.float32)
    assert folder == tmp_path / "deep" / kind
    names = {"config.json", "mar.safetensors"} | ({"vae.safetensors"} if pipeline.vae else set())
    assert {path.name for path in folder.iterdir()} == names
    loaded = load_pretrained(folder)
    assert equal_states(loaded.mar, pipeline.mar)
    assert (loaded.vae is None) == (pipeline.vae is None)
    for name in ("latent_scale", "clip", "classes", "defaults", "card"):
        assert getattr(loaded, name) == getattr(pipeline, name), name
    assert not loaded.mar.training
    if pipeline.vae:
        assert equal_states(loaded.vae, pipeline.vae)
        assert not loaded.vae.training
    images = pipeline.generate([1, 2], generator=generator())
    assert torch.equal(loaded.generate([1, 2], generator=generator()), images)
    assert torch.equal(load_pretrained(str(folder)).generate([1, 2], generator=generator()), images)


def test_round_trip_in_bfloat16(kind, tmp_path):
    """The file holds 16 bits a weight; the model that comes back computes in float32."""
    pipeline = make(kind)
    folder = pipeline.save(tmp_path, CONFIGS[kind])
    loaded = load_pretrained(folder)
    for name in ("mar", "vae") if pipeline.vae else ("mar",):
        on_disk = load_file(folder / f"{name}.safetensors")
        assert {value.dtype for value in on_disk.values()} == {torch.bfloat16}
        got = getattr(loaded, name).state_dict()
        for key, want in getattr(pipeline, name).state_dict().items():
            assert got[key].dtype == torch.float32
            assert ((got[key] - want).abs() <= 2**-8 * want.abs()).all(), key
        assert not equal_states(getattr(loaded, name), getattr(pipeline, name))


def test_saving_does_not_change_the_model(kind, tmp_path):
    pipeline = make(kind)
    pipeline.mar.train()
    pipeline.save(tmp_path, CONFIGS[kind])
    assert equal_states(pipeline.mar, make(kind).mar)
    assert pipeline.mar.training


def test_the_card_is_for_people(saved):
    card = json.loads((saved / "config.json").read_text())
    assert card["config"] == "tiny"
    assert card["mar"]["patch_size"] == 4 and card["vae"] is None
    assert card["card"] == {"steps": 123, "data": "made up"}


@pytest.mark.parametrize("part", ["mar", "vae", "no vae"])
def test_a_preset_of_other_models_is_refused_before_anything_is_written(tmp_path, part):
    wrong = {
        "mar": {"mar": replace(LATENTS, diffloss_w=48)},
        "vae": {"vae": replace(VAE, ch=16)},
        "no vae": {"vae": None},
    }
    kind = "MAR" if part == "mar" else "AutoencoderKL"
    with pytest.raises(ValueError, match=f"'tiny_latents' does not describe this {kind}; pass the"):
        make("latents").save(tmp_path / "out", replace(CONFIGS["latents"], **wrong[part]))
    assert not (tmp_path / "out").exists()


# Pictures ----------------------------------------------------------------------------------------


def test_frames_know_their_pictures(kind):
    pipeline = make(kind)
    frames = list(pipeline.sample([1, 2, 3], generator=generator()))
    assert len(frames) == 3  # the number of steps of `defaults`
    channels = 3 if pipeline.vae else 1
    for frame in frames:
        images = frame.images()
        assert images.shape == (3, channels, 16, 16) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert torch.equal(images, pipeline.decode(frame.tokens))
    assert not torch.equal(frames[0].images(), frames[-1].images())
    final = pipeline.generate([1, 2, 3], generator=generator())
    assert torch.equal(final, frames[-1].images())


def test_what_is_masked_shows_as_grey():
    """The mean token of pixels, 0 in [-1, 1], is 0.5."""
    first = next(make("pixels").sample([1], num_iter=16, order="raster", generator=generator()))
    images = first.images()[0, 0]
    assert (images[4:] == 0.5).all() and (images[:4, 4:] == 0.5).all()
    assert not (images[:4, :4] == 0.5).all()


@pytest.mark.parametrize("name", ["num_iter", "cfg", "cfg_schedule", "temperature", "clip"])
def test_defaults_are_used_and_can_be_overridden(monkeypatch, name):
    asked = []
    monkeypatch.setattr(checkpoints, "sample", lambda *a, **k: asked.append((a, k)) or iter(()))
    pipeline = make("pixels")
    list(pipeline.sample([4]))
    list(pipeline.sample([4], **{name: "mine"}))
    (positional, default), (_, other) = asked
    assert positional == (pipeline.mar, [4])
    assert default == {**asdict(pipeline.defaults), "clip": 1.5}
    assert other == {**default, name: "mine"}


@pytest.mark.parametrize("latent_scale", [1.0, 0.5, 3.0])
def test_pixels_to_tokens_and_back(latent_scale):
    pipeline = replace(make("pixels"), latent_scale=latent_scale)
    images = torch.rand(5, 1, 16, 16)
    tokens = pipeline.encode(images)
    assert tokens.shape == (5, 16, 16)
    assert torch.allclose(tokens, pipeline.mar.patchify((2 * images - 1) * latent_scale))
    torch.testing.assert_close(pipeline.decode(tokens), images, rtol=0, atol=1e-6)
    back = pipeline.encode(pipeline.decode(tokens))
    torch.testing.assert_close(back, tokens, rtol=0, atol=1e-5)


def test_latents_are_scaled_means():
    pipeline = make("latents")
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mean = pipeline.vae.encode(2 * images - 1).mean
        decoded = pipeline.vae.decode(mean)
    tokens = pipeline.encode(images)
    torch.testing.assert_close(pipeline.mar.unpatchify(tokens), 0.7 * mean)
    torch.testing.assert_close(pipeline.decode(tokens), ((decoded + 1) / 2).clamp(0, 1))


def test_pictures_are_cut_off_outside_of_their_range():
    pipeline = make("pixels")
    images = pipeline.decode(torch.tensor([-3.0, 3.0]).repeat(1, 16, 8))
    assert set(images.flatten().tolist()) == {0.0, 1.0}


# Bundled names -----------------------------------------------------------------------------------


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A data folder with two trained models."""
    for name in ("faces", "ants"):
        make("pixels").save(tmp_path / "weights" / name, CONFIGS["pixels"])
    monkeypatch.setenv("MAR_MINI_DATA", str(tmp_path))
    return tmp_path


def test_by_name(bundled):
    assert Pipeline.load(bundled / "weights" / "faces").card == load_pretrained("faces").card
    assert load_pretrained("faces").card == {"steps": 123, "data": "made up"}


@pytest.mark.parametrize("name", ["bees", "weights/faces", ""])
def test_an_unknown_name_lists_those_there_are(bundled, name):
    with pytest.raises(ValueError, match=f"model '{name}'; expected one of: ants, faces, or the"):
        load_pretrained(name)


def test_a_folder_without_a_card(bundled, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no trained model .*/empty'.*folder with config.json"):
        load_pretrained(tmp_path / "empty")


def test_a_folder_that_is_loaded_without_a_look(tmp_path):
    with pytest.raises(ValueError, match=r"config.json is damaged \(.*No such file.*; restore it"):
        Pipeline.load(tmp_path)


# Damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0.0, 1e-4, 0.01, 0.5, 0.999])
def test_truncated_weights(saved, left):
    file = saved / "mar.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(ValueError, match=r"mar\.safetensors is damaged \(.*\); restore it"):
        load_pretrained(saved)


@pytest.mark.parametrize("content", ["noise", "text"])
def test_weights_that_are_something_else(saved, content):
    noise = random.Random(0).randbytes(5000)
    (saved / "mar.safetensors").write_bytes(noise if content == "noise" else b"<html>" * 900)
    with pytest.raises(ValueError, match=r"mar\.safetensors is damaged"):
        load_pretrained(saved)


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_card(saved, left):
    file = saved / "config.json"
    text = file.read_text()
    file.write_text(text[: int(left * len(text))])
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*\); restore it"):
        load_pretrained(saved)


def edit_card(folder, edit) -> None:
    card = json.loads((folder / "config.json").read_text())
    edit(card)
    (folder / "config.json").write_text(json.dumps(card))


KEYS = ["mar", "vae", "defaults", "latent_scale", "clip", "classes", "card"]


@pytest.mark.parametrize("key", KEYS)
def test_a_card_without_an_entry(saved, key):
    edit_card(saved, lambda card: card.pop(key))
    with pytest.raises(ValueError, match=rf"config\.json is damaged \('{key}'\); restore it"):
        load_pretrained(saved)


def test_a_card_with_a_setting_that_does_not_exist(saved):
    edit_card(saved, lambda card: card["mar"].update(depht=3))
    with pytest.raises(ValueError, match=r"config\.json is damaged.* argument 'depht'"):
        load_pretrained(saved)


@pytest.mark.parametrize("name", ["mar", "vae"])
def test_missing_weights(tmp_path, name):
    folder = make("latents").save(tmp_path, CONFIGS["latents"])
    (folder / f"{name}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is missing; restore it"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffloss_w": 48}, r"of another shape \(.*diffloss\.net\.\S+ \(32.*\) instead of \(48"),
        ({"encoder_depth": 2}, r"12 missing \(encoder_blocks\.1\.norm1\.weight, .*, \.\.\.\)"),
        ({"class_num": 11}, r"class_emb\.weight \(10, 32\) instead of \(11, 32\)"),
        ({"diffloss_d": 0}, r"unexpected \(diffloss\.net\.res_blocks\.0\."),
    ],
)
def test_weights_of_another_model(saved, changes, message):
    """The message names keys and shapes, and the model is not filled by half."""
    other = MAR(**{**asdict(PIXELS), **changes})
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=rf"mar\.safetensors does not fit this MAR: .*{message}"):
        load_weights(other, saved / "mar.safetensors")
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    edit_card(saved, lambda card: card["mar"].update(changes))
    with pytest.raises(ValueError, match="does not fit this MAR"):
        load_pretrained(saved)


def test_weights_of_another_kind_of_model(saved):
    with pytest.raises(ValueError, match="fit this AutoencoderKL: .* missing .* unexpected"):
        load_weights(AutoencoderKL(**asdict(VAE)), saved / "mar.safetensors")


# Writing -----------------------------------------------------------------------------------------


def test_writing(tmp_path):
    file = tmp_path / "file.txt"
    write_atomically(file, lambda path: path.write_text("first"))
    write_atomically(file, lambda path: path.write_text("second"))
    assert file.read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["whole", None])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, error, before):
    file = tmp_path / "file.txt"
    if before:
        file.write_text(before)

    def fail_half_way(path):
        assert path.parent == tmp_path and path != file  # else the rename would be a copy
        path.write_text("ha")
        assert not before or file.read_text() == before
        raise error("disk full")

    with pytest.raises(error, match="disk full"):
        write_atomically(file, fail_half_way)
    assert [path.name for path in tmp_path.iterdir()] == ([file.name] if before else [])
    assert not before or file.read_text() == before


def test_a_save_that_fails_leaves_the_old_weights(saved, monkeypatch):
    files = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail_half_way(state, path):
        path.write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        make("pixels").save(saved, CONFIGS["pixels"], dtype=torch.float32)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files


def test_a_card_that_cannot_be_written_leaves_the_old_weights(saved):
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    pipeline = replace(make("pixels"), card={"loss": torch.tensor(1.0)})
    with pytest.raises(TypeError, match="not JSON serializable"):
        pipeline.save(saved, CONFIGS["pixels"], dtype=torch.float32)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files


def test_weights_as_they_are(tmp_path):
    """Without a dtype nothing is converted."""
    model = MAR(**asdict(PIXELS)).double()
    save_weights(model, tmp_path / "mar.safetensors")
    on_disk = load_file(tmp_path / "mar.safetensors")
    assert all(torch.equal(on_disk[key], value) for key, value in model.state_dict().items())


# Hugging Face ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [(MAR, PIXELS), (MAR, LATENTS), (AutoencoderKL, VAE)],
    ids=["pixels", "latents", "vae"],
)
def test_hub_round_trip(tmp_path, kind, config):
    """Weights and configuration, through a folder, without the network."""
    model = fill(kind(**asdict(config)), 3)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == json.loads(json.dumps(asdict(config)))
    loaded = kind.from_pretrained(tmp_path)
    assert type(loaded) is kind and not loaded.training
    assert equal_states(loaded, model)


def test_hub_round_trip_with_a_part_of_ones_own(tmp_path):
    """A class has no place in JSON: it is named again when loading."""

    class Mine(Block):
        pass

    model = MAR(**asdict(PIXELS), block=Mine)
    model.save_pretrained(tmp_path)
    loaded = MAR.from_pretrained(tmp_path, block=Mine)
    assert type(loaded.encoder_blocks[0]) is Mine
    assert equal_states(loaded, model)
    assert type(MAR.from_pretrained(tmp_path).encoder_blocks[0]) is Block
