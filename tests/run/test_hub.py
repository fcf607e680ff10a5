"""Published weights: stand-ins of the same form load to the bit; what is wrong is said plainly."""

import argparse
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from golden_values import SHAPES, fill, golden, relative_error, rnd
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from mar_mini import (
    MAR,
    AutoencoderKL,
    get_config,
    load_autoencoder,
    load_pretrained,
    load_published,
)
from mar_mini.checkpoints import empty
from mar_mini.configs import VAEConfig, transformer
from mar_mini.configs import published as full_size
from mar_mini.run import hub
from mar_mini.run.hub import HubFile, convert

VAE = VAEConfig(
    ch=8,
    ch_mult=(1, 1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    resolution=16,
    z_channels=4,
    num_groups=4,
)
TINY = replace(
    full_size(
        "tiny",
        transformer(
            32,
            2,
            2,
            img_size=16,
            vae_stride=4,
            vae_embed_dim=4,
            class_num=10,
            buffer_size=2,
            diffloss_d=1,
            diffloss_w=32,
        ),
        cfg=2.0,
    ),
    vae=VAE,
)
FULL_SIZE = ["mar_base", "mar_large", "mar_huge", "kl16"]


def tiny_mar(seed: int = 7) -> MAR:
    return fill(MAR(**asdict(TINY.mar)), seed)


def tiny_vae() -> AutoencoderKL:
    return fill(AutoencoderKL(**asdict(VAE)), 8)


def checkpoint(**changes) -> dict:
    """In the form of the authors' checkpoint-last.pth."""
    mar = tiny_mar()
    optimizer = torch.optim.AdamW(mar.parameters(), lr=1e-3)
    sum(parameter.sum() for parameter in mar.parameters()).backward()
    optimizer.step()
    mar = tiny_mar()
    whole = {
        "model": tiny_mar(9).state_dict(),
        "model_ema": mar.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="mar_tiny", lr=8e-4, grad_clip=3.0, resume=None, gpu=0),
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


@pytest.fixture
def files(tmp_path):
    """Stand-ins in all published forms."""
    save_file(tiny_mar().state_dict(), tmp_path / "mar.safetensors")
    torch.save(checkpoint(), tmp_path / "checkpoint-last.pth")
    save_file(tiny_vae().state_dict(), tmp_path / "kl16.safetensors")
    torch.save({"model": tiny_vae().state_dict()}, tmp_path / "kl16.ckpt")
    return tmp_path


def equal_states(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def images(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline.generate(
        [1, 2], num_iter=3, num_sampling_steps=4, clip=1.0, generator=generator
    )


# What is there loads ------------------------------------------------------------------------------


@pytest.mark.parametrize("vae", ["kl16.safetensors", "kl16.ckpt"])
@pytest.mark.parametrize("mar", ["mar.safetensors", "checkpoint-last.pth"])
def test_every_form_to_the_bit(files, mar, vae):
    pipeline = load_published(files / mar, TINY, vae=files / vae)
    assert equal_states(pipeline.mar, tiny_mar()) and equal_states(pipeline.vae, tiny_vae())
    assert not pipeline.mar.training and not pipeline.vae.training
    assert (pipeline.latent_scale, pipeline.clip) == (0.2325, None)
    assert pipeline.defaults == TINY.sampling and len(pipeline.classes) == 10
    from_scratch = replace(pipeline, mar=tiny_mar(), vae=tiny_vae())
    assert torch.equal(images(pipeline), images(from_scratch))


def test_the_authors_numbers_from_the_authors_form(tmp_path):
    """Golden weights through a checkpoint give z as the authors' code computes it."""
    config = replace(
        TINY,
        mar=replace(
            TINY.mar,
            img_size=32,
            encoder_embed_dim=48,
            encoder_num_heads=4,
            decoder_embed_dim=48,
            decoder_num_heads=4,
            buffer_size=5,
            diffloss_d=2,
            diffloss_w=64,
        ),
    )
    state = fill(MAR(**asdict(config.mar)), 40).state_dict()
    torch.save(checkpoint(model_ema=state), tmp_path / "checkpoint-last.pth")
    mar, found = hub.load(tmp_path / "checkpoint-last.pth", config, "mar")
    assert found == config
    mask, labels = golden("mar/mask").bool(), torch.tensor([1, 7, 3])
    encoded = mar.forward_encoder(mar.patchify(rnd(41, 3, 4, 8, 8)), mask, labels)
    z = mar.forward_decoder(encoded, mask)
    assert relative_error(z, golden("mar/decoder")) < 1e-5


def test_the_raw_weights(files):
    pipeline = load_published(
        files / "checkpoint-last.pth", TINY, vae=files / "kl16.ckpt", raw=True
    )
    assert equal_states(pipeline.mar, tiny_mar(9))
    with pytest.raises(ValueError, match="holds one set of weights; leave out raw"):
        load_published(files / "mar.safetensors", TINY, vae=files / "kl16.ckpt", raw=True)


def test_a_loaded_model_trains(files):
    """All that is computed while a model is built is there, not only what was loaded."""
    mar = load_published(files / "mar.safetensors", TINY, vae=files / "kl16.ckpt").mar.train()
    other = tiny_mar().train()
    losses = []
    for model in (mar, other):
        torch.manual_seed(0)
        losses.append(model(torch.ones(2, 4, 4, 4), torch.tensor([1, 2])))
        losses[-1].backward()
    assert torch.equal(*losses) and losses[0] > 0
    assert torch.equal(mar.mask_token.grad, other.mask_token.grad)


def test_the_file_may_go(files):
    """Weights are copied: a file that changes does not change the model."""
    path = files / "mar.safetensors"
    pipeline = load_published(path, TINY, vae=files / "kl16.ckpt")
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert equal_states(pipeline.mar, tiny_mar())


@pytest.mark.parametrize("name", ["plain.pth", "cuda.pth", "half.safetensors"])
def test_other_ways_to_save(files, name, monkeypatch):
    """A state dict with nothing around it, one from a GPU, and one of 16 bits."""
    state = tiny_mar().state_dict()
    if name == "half.safetensors":
        save_file({key: value.bfloat16() for key, value in state.items()}, files / name)
        state = {key: value.bfloat16().float() for key, value in state.items()}
    else:
        if name == "cuda.pth":
            monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state if name == "plain.pth" else {"model_ema": state}, files / name)
    loaded = load_published(files / name, TINY, vae=files / "kl16.ckpt").mar.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert {value.dtype for value in loaded.values()} == {torch.float32}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_an_average_of_parameters_is_a_whole_model(name):
    config = get_config(name)
    model = empty(config.mar or config.vae)
    assert {key for key, _ in model.named_parameters()} == set(model.state_dict())


# Full size, without weights -----------------------------------------------------------------------


def header(name: str) -> tuple[bytes, int]:
    """Of a float32 safetensors file with the published names and shapes; and the bytes behind."""
    entries, end = {}, 0
    for key, shape in sorted(SHAPES[name].items()):
        start, end = end, end + 4 * math.prod(shape)
        entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def stand_in(folder: Path, name: str) -> Path:
    """A full-size file of zeros that takes no room on the disk."""
    start, length = header(name)
    path = folder / f"{name}.safetensors"
    path.write_bytes(start)
    os.truncate(path, len(start) + length)
    return path


@pytest.mark.parametrize("name", ["mar_base", "kl16"])
def test_the_published_sizes_are_those_of_our_names_and_shapes(name):
    """To the byte: a name, a shape or a number type that differs would change the size."""
    start, length = header(name)
    assert hub.FILES[name].size == len(start) + length


def without_memory(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in SHAPES[name].items()}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_weights_say_which_preset_they_are(name):
    path, part = Path("file"), "vae" if name == "kl16" else "mar"
    assert hub.identify(without_memory(name), path, part=part) == get_config(name)
    assert hub.identify(without_memory(name), path, name, part) == get_config(name)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "mar_base",
            "mar_large",
            r"not the MAR of preset 'mar_large': its weights are of "
            r"'mar_base', which load_published\(path\) loads; 112 missing \(encoder_blocks\.12\.",
        ),
        ("mar_large", "mar_base", "its weights are of 'mar_large'.*112 unexpected"),
        ("mar_large", "mar_large_12x1536", r"are of 'mar_large'.*32 missing \(diffloss\.net\."),
        ("kl16", None, r"not the MAR of.*are of 'kl16', which load_autoencoder\(path\) loads"),
        ("kl16", "mar_base", r"are of 'kl16'.*364 missing \(.*312 unexpected \("),
        ("mar_base", "kl16", "not the MAR of preset 'kl16': its weights are of 'mar_base'"),
        ("mar_base", "digits", "unknown published preset 'digits'; expected one of: mar_base"),
    ],
)
def test_another_preset_than_asked_for(name, config, message):
    with pytest.raises(ValueError, match=message):
        hub.identify(without_memory(name), Path("file"), config)


def test_a_model_where_the_autoencoder_should_be():
    message = "not the autoencoder of preset 'kl16': its weights are of 'mar_huge', which load_pub"
    with pytest.raises(ValueError, match=message):
        hub.identify(without_memory("mar_huge"), Path("file"), "kl16", "vae")


def test_full_size_files_that_were_mixed_up(tmp_path):
    vae = stand_in(tmp_path, "kl16")
    with pytest.raises(ValueError, match="not the MAR .* of 'kl16', which load_autoencoder"):
        load_published(vae)
    with pytest.raises(ValueError, match="not the MAR of preset 'mar_base': its .* of 'kl16'"):
        load_published(vae, "mar_base")
    assert not load_autoencoder(vae).decoder.conv_out.weight.any()


def test_another_image_size(tmp_path):
    state = without_memory("mar_base")
    for key, length in (("encoder", 1088), ("decoder", 1088), ("diffusion", 1024)):
        state[f"{key}_pos_embed_learned"] = torch.empty(1, length, 768, device="meta")
    path = tmp_path / "checkpoint-last.pth"
    with pytest.raises(
        ValueError,
        match=(
            r"3 of another shape \(.*\(1, 1088, 768\) instead of \(1, 320, 768\).*for 1024 "
            r"tokens, 512x512 pixels: pass config=replace\(preset, "
            r"mar=replace\(preset.mar, img_size=512\)\)"
        ),
    ):
        hub.identify(state, path, "mar_base")
    preset = get_config("mar_base")
    larger = replace(preset, mar=replace(preset.mar, img_size=512))
    assert hub.identify(state, path, larger) == larger


# Damage and deceit --------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["mar.safetensors", "checkpoint-last.pth"])
def test_half_of_a_download(files, name, left):
    size = int(left * (files / name).stat().st_size)
    os.truncate(files / name, size)
    message = rf"{name} \({size:,} bytes\) is damaged or half of a download \(.*\); fetch it again"
    if size == 0 and name.endswith("pth"):
        message = "neither .safetensors nor a checkpoint"
    with pytest.raises(ValueError, match=message):
        load_published(files / name, TINY)


def test_a_page_in_place_of_a_file(tmp_path):
    (tmp_path / "kl16.ckpt").write_text("<html>sign in</html>")
    with pytest.raises(ValueError, match="neither .safetensors nor a checkpoint of torch.save"):
        load_autoencoder(tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match="no file .*gone.pth; expected .safetensors, .pth or"):
        load_autoencoder(tmp_path / "gone.pth")


class Evil:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("call", [os.system, eval, subprocess.check_output])
@pytest.mark.parametrize("where", ["args", "model_ema", "epoch"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, call, where, protocol):
    trace = tmp_path / "trace"
    argument = f"open({str(trace)!r}, 'w').close()" if call is eval else f"touch {trace}"
    arguments = (argument,) if call is not subprocess.check_output else (["touch", str(trace)],)
    path = tmp_path / "checkpoint-last.pth"
    torch.save(checkpoint(**{where: Evil(call, *arguments)}), path, pickle_protocol=protocol)
    with pytest.raises(ValueError, match="is refused: .* would run code.*nothing of it was run"):
        load_published(path, TINY)
    assert not trace.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False)
    assert trace.exists()  # the file is what it claims to be


def test_the_refusal_names_what_would_be_called(tmp_path):
    torch.save(checkpoint(args=Evil(os.system, "true")), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"would run code \((posix|nt)\.system\)"):
        load_published(tmp_path / "a.pth", TINY)


def test_a_second_look(tmp_path, monkeypatch):
    """What the list of names would miss, the reading itself refuses."""
    torch.save(checkpoint(args=Evil(os.system, f"touch {tmp_path}/trace")), tmp_path / "a.pth")
    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda path: [])
    with pytest.raises(ValueError, match=r"is refused: .*would run code \(.*posix.*nothing of it"):
        load_published(tmp_path / "a.pth", TINY)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("old", [True, False])
def test_a_bare_pickle_is_not_opened(tmp_path, old):
    path, trace = tmp_path / "kl16.ckpt", tmp_path / "trace"
    evil = {"model": Evil(os.system, f"touch {trace}")}
    if old:
        torch.save(evil, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match="not opened any further, as a bare pickle may run code"):
        load_autoencoder(path)
    assert not trace.exists()


def test_the_permission_ends_with_the_reading(files):
    load_published(files / "checkpoint-last.pth", TINY, vae=files / "kl16.ckpt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: checkpoint(model_ema=None),
            r"no weights called 'model_ema', only: model, optim"
            r".*; raw=True \(--raw\) takes those of 'model'",
        ),
        (lambda: {"state_dict": {"w": torch.ones(1)}}, "'model_ema', only: state_dict$"),
        (lambda: checkpoint(model_ema={"w": 1}), "no weights called 'model_ema'"),
        (lambda: [torch.ones(1)], "no weights called 'model_ema', only: nothing$"),
        (lambda: {"w": torch.ones(1)}, r"1 unexpected \(w\); pass config=, the Config that it was"),
    ],
)
def test_a_checkpoint_without_the_weights(tmp_path, content, message):
    torch.save(content(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path / "a.pth", TINY)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("mask_token"), r"of preset 'tiny': 1 missing \(mask_token\); "),
        (lambda state: state.update(extra=torch.ones(1)), r"'tiny': 1 unexpected \(extra\); pass"),
        (
            lambda state: state.update({"z_proj.bias": torch.ones(7)}),
            r"1 of another shape \(z_proj.bias \(7,\) instead of \(32,\)\); pass config=",
        ),
    ],
)
def test_keys_that_do_not_fit(tmp_path, edit, message):
    state = tiny_mar().state_dict()
    edit(state)
    torch.save({"model_ema": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_published(tmp_path / "a.pth", TINY)


# From the Hub -------------------------------------------------------------------------------------


@pytest.fixture
def asked(files, monkeypatch):
    """What the Hub was asked for; it hands out the stand-ins."""
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(files / name)

    (files / "mar.safetensors").rename(files / "mar-base.safetensors")
    monkeypatch.setattr(hub, "hf_hub_download", download)
    for name, file in hub.FILES.items():
        monkeypatch.setitem(hub.FILES, name, HubFile(file.name))
    monkeypatch.setitem(hub.CONFIGS, "mar_base", replace(TINY, name="mar_base"))
    return asked


def publish_autoencoder(monkeypatch):
    monkeypatch.setitem(hub.CONFIGS, "kl16", replace(get_config("kl16"), vae=VAE))


def test_by_name(asked, monkeypatch):
    publish_autoencoder(monkeypatch)
    pipeline = load_pretrained("mar_base")
    assert asked == [
        ("jadechoghari/mar", "mar-base.safetensors"),
        ("jadechoghari/mar", "kl16.safetensors"),
    ]
    assert equal_states(pipeline.mar, tiny_mar()) and equal_states(pipeline.vae, tiny_vae())
    assert equal_states(load_autoencoder(), tiny_vae())
    assert pipeline.card == {"preset": "mar_base", "source": "mar-base.safetensors", "raw": False}


def test_the_autoencoder_is_no_pipeline(asked):
    with pytest.raises(ValueError, match=r"autoencoder and paints nothing; use load_autoencoder"):
        load_pretrained("kl16")
    assert not asked


def test_bundled_names_come_first(asked, files, tiny, monkeypatch):
    file, out, vae = (
        files / "mar-base.safetensors",
        files / "weights" / "mar_base",
        files / "kl16.ckpt",
    )
    convert(file, out=out, config=tiny, vae=vae)
    monkeypatch.setenv("MAR_MINI_DATA", str(files))
    assert load_pretrained("mar_base").card["preset"] == "tiny"
    assert not asked


@pytest.mark.parametrize("name", ["mar_huge", "kl16"])
def test_without_a_network(name):
    """The real function, which the tests' environment keeps from the network."""
    with pytest.raises(FileNotFoundError) as raised:
        hub.fetch(name)
    assert isinstance(raised.value.__cause__, LocalEntryNotFoundError)
    message, file = str(raised.value), hub.FILES[name].name
    assert f"https://huggingface.co/jadechoghari/mar/resolve/main/{file}" in message
    assert ("load_autoencoder(path)" if name == "kl16" else "load_published(path") in message
    assert "HF_HUB_OFFLINE=1" in message and "mar-mini convert" in message


def test_a_wrong_size_or_sum(asked, files, monkeypatch):
    path = files / "kl16.safetensors"
    size, digest = path.stat().st_size, hub.digest(path)
    shell = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert shell.startswith(digest + " ")
    for file in (HubFile(path.name, size, digest), HubFile(path.name, size), HubFile(path.name)):
        monkeypatch.setitem(hub.FILES, "kl16", file)
        assert hub.fetch("kl16") == path
    monkeypatch.setitem(hub.FILES, "kl16", HubFile(path.name, size + 1, digest))
    with pytest.raises(ValueError, match=rf"{size:,} bytes, the published .* {size + 1:,}: half"):
        hub.fetch("kl16")
    monkeypatch.setitem(hub.FILES, "kl16", HubFile(path.name, size, "0" * 64))
    with pytest.raises(
        ValueError, match=f"sha256 {digest}, the .* has {'0' * 64}: half of .*; remove it"
    ):
        hub.fetch("kl16")


def test_what_is_to_be_removed_is_the_file_not_the_link(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(b"half")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_: tmp_path / "link")
    with pytest.raises(ValueError, match="/blob has 4 bytes"):
        hub.fetch("kl16")


# Converting ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The name of the stand-ins' preset."""
    monkeypatch.setitem(hub.CONFIGS, "tiny", TINY)
    return "tiny"


@pytest.mark.parametrize("name", ["mar.safetensors", "checkpoint-last.pth"])
def test_convert(files, tiny, name, capsys):
    out, vae = files / "deep" / "out", files / "kl16.ckpt"
    assert convert(files / name, out=out, config=tiny, vae=vae) == 0
    assert capsys.readouterr().out.startswith(f"saved in {out}: config.json, mar.safe")
    loaded = load_pretrained(out)
    direct = load_published(files / name, TINY, vae=files / "kl16.ckpt")
    assert equal_states(loaded.mar, tiny_mar()) and equal_states(loaded.vae, tiny_vae())
    assert torch.equal(images(loaded), images(direct))
    assert (loaded.latent_scale, loaded.clip, loaded.defaults) == (0.2325, None, TINY.sampling)
    assert loaded.card == {
        "preset": "tiny",
        "source": name,
        "raw": False,
        "vae": "kl16.ckpt",
        "sha256": hub.digest(files / name),
        "vae_sha256": hub.digest(files / "kl16.ckpt"),
    }
    with pytest.raises(ValueError, match="out holds a model already; choose another folder"):
        convert(files / name, out=out, config=tiny, vae=vae)


def test_convert_to_16_bits_and_raw(files, tiny):
    file, out, vae = files / "checkpoint-last.pth", files / "out", files / "kl16.ckpt"
    convert(file, out=out, config=tiny, vae=vae, raw=True, dtype="bfloat16")
    on_disk = load_file(out / "mar.safetensors")
    assert all(
        torch.equal(on_disk[key], value.bfloat16())
        for key, value in tiny_mar(9).state_dict().items()
    )
    assert load_pretrained(out).card["raw"] is True


def test_a_conversion_that_stops_leaves_no_model(files, tiny, monkeypatch):
    def full(*arguments):
        raise OSError("disk full")

    file, out, vae = files / "mar.safetensors", files / "out", files / "kl16.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr("mar_mini.checkpoints.save_file", full)
        with pytest.raises(OSError, match="disk full"):
            convert(file, out=out, config=tiny, vae=vae)
    with pytest.raises(ValueError, match="no trained model"):
        load_pretrained(out)
    convert(file, out=out, config=tiny, vae=vae)


@pytest.mark.slow
def test_mar_base_on_the_command_line(tmp_path):
    """Full size, all zeros: about 1.1 GB are written, and one image of 256x256 is made."""
    file, vae = stand_in(tmp_path, "mar_base"), stand_in(tmp_path, "kl16")
    python = [sys.executable, "-m", "mar_mini"]
    done = subprocess.run(
        [*python, "convert", file, "--out", tmp_path / "model", "--vae", vae],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for path, part in ((file, "mar"), (vae, "vae")):
        written = tmp_path / "model" / f"{part}.safetensors"
        assert hub.digest(written) == hub.digest(path)  # the same form
        path.unlink()
    done = subprocess.run(
        [
            *python,
            "sample",
            tmp_path / "model",
            "--labels",
            "207",
            "--num-iter",
            "1",
            "--cfg",
            "1",
            "--num-sampling-steps",
            "2",
            "--out",
            tmp_path / "a.png",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "a.png: 207" in done.stdout
