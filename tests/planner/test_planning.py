"""What a model takes: counts against other counters and sums by hand, predictions against runs."""

import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import scaling
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mar_mini import MAR, AutoencoderKL, generate, get_config, transformer
from mar_mini.checkpoints import untrained
from mar_mini.configs import PRESETS, SamplingConfig, TrainingConfig, VAEConfig
from mar_mini.masking import mean_mask_ratio, sample_mask_ratio
from mar_mini.planner.memory import (
    block_parameters,
    check_fits,
    largest_batch,
    parameters,
    parts,
    plan_run,
    plan_sampling,
    sampling_memory,
    training_memory,
)
from mar_mini.planner.report import Rates, describe, device_rates, info, measure_rates, si
from mar_mini.planner.work import (
    Counter,
    Work,
    autoencoder_work,
    empty,
    meta,
    sampling_work,
    total_flops,
    training_work,
)
from mar_mini.run.generate import sample
from mar_mini.training import train_mar

# unlike in every size that a formula could mix up
MAR_ = replace(
    get_config("cifar10_latents").mar,
    encoder_embed_dim=48,
    encoder_depth=3,
    encoder_num_heads=3,
    decoder_embed_dim=64,
    decoder_depth=2,
    decoder_num_heads=2,
    diffloss_w=80,
    diffloss_d=2,
    mlp_ratio=3.0,
    buffer_size=5,
    diffusion_batch_mul=3,
)
VAES = {
    "kl16": VAEConfig(ch=32, num_groups=8, resolution=64, attn_resolutions=(4,)),
    "linear_path": get_config("cifar10").vae,
    "attention": VAEConfig(
        ch=16,
        ch_mult=(1, 3),
        num_groups=4,
        resolution=16,
        num_res_blocks=1,
        attn_resolutions=(16, 8),
        z_channels=4,
        in_channels=1,
    ),
}


# Parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "model", "expected"),
    [
        ("mar_base", "mar", 207_924_768),
        ("mar_large", "mar", 478_326_304),
        ("mar_huge", "mar", 942_403_104),
        ("mar_large_12x1536", "mar", 556_909_600),
        ("mar_base", "autoencoder", 66_456_019),
        ("kl16", "autoencoder", 66_456_019),
        ("kl16", "mar", 0),
        ("digits", "autoencoder", 0),
    ],
)
def test_parameters(preset, model, expected):
    assert parameters(get_config(preset), model) == expected


def test_parts_of_a_head():
    """By hand, for width W, depth 6, z of D, tokens of 16: see figure and text of MAR section 4."""
    w, d = 1024, 768
    time = 257 * w + (w + 1) * w
    blocks = 6 * (2 * w + 2 * (w + 1) * w + 3 * (w + 1) * w)
    last = 2 * (w + 1) * w + (w + 1) * 32
    assert parts(get_config("mar_base"))["mar"]["head"] == (
        time + (d + 1) * w + 17 * w + blocks + last
    )


@pytest.mark.parametrize("mlp_ratio", [4.0, 2.5])
@pytest.mark.parametrize("heads", [1, 4])
def test_parameters_of_a_block(heads, mlp_ratio):
    block = transformer.Block(20, heads, mlp_ratio)
    assert block_parameters(20, mlp_ratio) == sum(p.numel() for p in block.parameters())
    assert block_parameters(768) == 12 * 768**2 + 13 * 768


# FLOPs -------------------------------------------------------------------------------------------


def counted(function) -> int:
    """FLOPs by torch's counter, which does not know the CPU's fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("num_iter", [1, 5])
def test_flops_of_sampling(cfg, num_iter):
    model = MAR(**asdict(MAR_))
    got = counted(lambda: generate(model, [1, 2], num_iter=num_iter, num_sampling_steps=4, cfg=cfg))
    config = replace(get_config("cifar10_pixels"), mar=MAR_)
    work = sampling_work(config, 2, SamplingConfig(num_iter, 4, cfg))
    assert total_flops(work) == got
    assert {name: len(part.flops) for name, part in work.items()} == dict.fromkeys(
        ("encoder", "decoder", "head"), num_iter
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("batch", [2, 9])  # of the head fewer and more rows than timesteps
def test_flops_of_training(checkpointing, batch):
    config = replace(MAR_, grad_checkpointing=checkpointing, attn_dropout=0.1, proj_dropout=0.1)
    model = MAR(**asdict(config)).train()
    mask = torch.arange(64).expand(batch, -1) < 45
    labels, latents = torch.zeros(batch, dtype=torch.long), torch.randn(batch, 16, 8, 8)
    got = counted(lambda: model(latents, labels, model.draw(batch, mask=mask)).backward())
    work = training_work(config, batch, 45)
    assert total_flops(work) == got
    assert ("again" in work) == checkpointing
    assert work["update"].other_bytes == 13 * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("vae", VAES.values(), ids=VAES)
def test_flops_of_the_autoencoder(vae):
    model, side = AutoencoderKL(**asdict(vae)).eval(), 2 * vae.resolution
    small = side // model.stride
    with torch.no_grad():
        encode = counted(lambda: model.encode(torch.zeros(2, vae.in_channels, side, side)))
        decode = counted(lambda: model.decode(torch.zeros(2, vae.z_channels, small, small)))
    work, _ = autoencoder_work(vae, 2, side)
    assert (work["encoding"].flops, work["decoding"].flops) == (encode, decode)


def test_the_mean_of_the_mask_ratio():
    drawn = [sample_mask_ratio(0.3) for _ in range(3000)]
    assert mean_mask_ratio(0.3) == pytest.approx(sum(drawn) / 3000, abs=0.012)
    assert mean_mask_ratio(0.7) == pytest.approx(0.867, abs=5e-4)  # the published setting
    assert mean_mask_ratio(1.0) == 1.0


# Time --------------------------------------------------------------------------------------------


def test_seconds():
    rates = Rates(flops=100.0, bytes=10.0, start=0.5)
    assert rates.seconds(Work(flops=300, product_bytes=20)) == 3.0  # computing takes longer
    assert rates.seconds(Work(flops=300, product_bytes=70)) == 7.0  # moving does
    assert rates.seconds(Work(other_bytes=20, operations=3)) == 3.5
    two = Work(np.array([100, 0]), np.array([0, 20]))  # one after the other, not at once
    assert rates.seconds(two) == 3.0
    assert total_flops({"a": two, "b": Work(300)}) == 400


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL_BASE = {"encoder_depth": 2, "decoder_depth": 2, "diffloss_d": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes", "batch", "num_iter", "num_sampling_steps"),
    [("cifar10_latents", {}, 16, 6, 12), ("mar_base", SMALL_BASE, 1, 2, 3)],
)
def test_time_of_sampling(preset, changes, batch, num_iter, num_sampling_steps, one_thread):
    """In processor time, the rates measured before and after: others may use the machine too."""
    config = get_config(preset)
    config = replace(config, mar=replace(config.mar, **changes))
    pipeline, settings = (
        untrained(config),
        {"num_iter": num_iter, "num_sampling_steps": num_sampling_steps, "cfg": 3.0},
    )
    _, work = plan_sampling(config, batch, "float32", float("inf"), **settings)
    predicted, seconds = [], []
    for _ in range(3):
        rates = measure_rates(clock=time.process_time)
        predicted.append(sum(map(rates.seconds, work.values())))
        begin = time.process_time()
        pipeline.generate([0] * batch, **settings)
        seconds.append(time.process_time() - begin)
    predicted, measured = sorted(predicted)[1], sorted(seconds)[1]
    print(f"\n{preset}: predicted {predicted:.2f} s, measured {measured:.2f} s")
    assert 1 / 1.5 < predicted / measured < 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changes", "batch"),
    [
        ("cifar10_latents", {}, 32),
        ("mar_base", {"encoder_depth": 1, "decoder_depth": 1, "diffloss_d": 1}, 2),
    ],
)
def test_time_of_training(preset, changes, batch, one_thread):
    mar = replace(get_config(preset).mar, **changes)
    model, side = MAR(**asdict(mar)), mar.img_size // mar.vae_stride
    work = training_work(mar, batch)
    training = train_mar(
        model,
        torch.randn(batch, mar.vae_embed_dim, side, side),
        torch.zeros(batch, dtype=torch.long),
        TrainingConfig(batch_size=batch, max_steps=5, precision="float32"),
    )
    predicted, seconds = [], []
    for _ in range(5):
        if len(predicted) < 3:
            rates = measure_rates(clock=time.process_time)
            predicted.append(sum(map(rates.seconds, work.values())))
        begin = time.process_time()
        next(training)
        seconds.append(time.process_time() - begin)
    predicted, measured = sorted(predicted)[1], sorted(seconds)[2]
    print(f"\n{preset}: predicted {predicted:.2f} s, measured {measured:.2f} s")
    assert 1 / 1.5 < predicted / measured < 1.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1.0, None, 5.0, False), "times need both --tflops and --gb-per-s"),
        ((None, 1.0, 5.0, False), "times need both --tflops and --gb-per-s"),
        ((0.0, 1.0, 5.0, False), "tflops is 0.0; expected more than 0"),
        ((1.0, -3.0, 5.0, False), "gb-per-s is -3.0; expected more than 0"),
        ((1.0, 1.0, -1.0, False), "us-per-operation is -1.0; expected 0 or more"),
        ((1.0, 1.0, 5.0, True), "--here measures the rates; leave out --tflops and --gb-per-s"),
    ],
)
def test_rates_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        device_rates(*given)


def test_rates_as_given():
    assert device_rates(2.0, 3.0, 4.0, False) == Rates(2e12, 3e9, 4e-6)
    assert device_rates(None, None, 5.0, False) is None


# Memory ------------------------------------------------------------------------------------------


def kept_by_autograd(mar, batch: int, masked: int) -> int:
    """Bytes of all that a forward pass keeps for the backward pass, weights not counted."""
    model = MAR(**asdict(mar)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(x)  # so that no address comes twice
        return x

    length = model.seq_len
    mask = torch.arange(length).expand(batch, -1) < masked
    side = mar.img_size // mar.vae_stride
    latents = torch.randn(batch, mar.vae_embed_dim, side, side)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(latents, torch.zeros(batch, dtype=torch.long), model.draw(batch, mask=mask))
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [{"encoder_depth": 4}, {"decoder_depth": 4}, {"diffloss_d": 5}])
def test_activations(dropout, checkpointing, sizes):
    mar = replace(
        MAR_,
        encoder_embed_dim=192,
        decoder_embed_dim=128,
        diffloss_w=256,
        diffusion_batch_mul=4,
        attn_dropout=dropout,
        proj_dropout=dropout,
        grad_checkpointing=checkpointing,
        **sizes,
    )
    predicted = training_memory(mar, 4, masked=52, gpu=False)["activations"]
    assert predicted == pytest.approx(kept_by_autograd(mar, 4, 52), rel=0.03)


def test_activations_of_a_block_on_a_gpu():
    """By hand: bfloat16, width 10, hidden 40, dropout; the attention weights are nowhere.

    For each row two sums of the residual stream, mean and deviation of two norms, and one number
    for each head's softmax in float32; norms' results, q, k, v, heads' results, both sides of the
    GELU in bfloat16; in one byte each which values dropout let through.
    """
    mar = replace(MAR_, encoder_embed_dim=10, encoder_num_heads=2, mlp_ratio=4.0)
    for dropout in (0.0, 0.1):
        mar = replace(mar, attn_dropout=dropout, proj_dropout=dropout)
        block, x = empty(mar, "bfloat16", True).train().encoder_blocks[0], meta(3, 99, 10)
        counter = Counter()
        result, _ = counter.run(lambda block=block, x=x: block(x.requires_grad_()))
        float32 = 4 * (10 + 10) + 4 * (2 * 2 + 2)
        bfloat16 = 2 * (10 + 30 + 10 + 10 + 40 + 40)
        masks = 10 + 40 + 10 if dropout else 0
        assert counter.live == pytest.approx(3 * 99 * (float32 + bfloat16 + masks), abs=32)
        assert result.dtype == torch.float32


def test_checkpointing_holds_one_block_at_a_time():
    """In the backward pass: what blocks keep, and one more of the largest, with its gradients."""
    wide = replace(MAR_, encoder_embed_dim=192, encoder_depth=4, diffloss_w=16)
    less = replace(wide, grad_checkpointing=True)
    deep, flat = (training_memory(replace(less, encoder_depth=n), 4, masked=52) for n in (4, 2))
    assert deep["at work"] == pytest.approx(flat["at work"], rel=0.02)
    assert deep["activations"] - flat["activations"] == 2 * 4 * (4 * 17 * 192)  # inputs alone
    assert 4 * deep["at work"] < training_memory(wide, 4, masked=52)["activations"]


def test_state_of_training():
    """Twenty bytes a parameter: weights, gradients, two moments, average; an eighth of it in FSDP.

    What training.Training keeps is counted in a real one.
    """
    mar = get_config("mar_base").mar
    count = 207_924_768
    whole = training_memory(mar, 1)
    state = ("weights", "gradients", "moments", "average")
    assert sum(whole[name] for name in state) == 20 * count
    assert whole["bfloat16 copies"] == 0
    assert training_memory(mar, 1, dtype="bfloat16")["bfloat16 copies"] == 2 * count
    shared = training_memory(mar, 1, dtype="bfloat16", shards=8)
    gathered = 2 * 2 * (12 * 768**2 + 13 * 768)
    assert sum(shared[name] for name in state) == pytest.approx(20 * count / 8 + gathered)

    model = MAR(**asdict(MAR_))
    training = train_mar(
        model,
        torch.randn(4, 16, 8, 8),
        torch.zeros(4, dtype=torch.long),
        TrainingConfig(batch_size=4, max_steps=2),
    )
    next(training)
    size = sum(p.numel() for p in model.parameters())
    kept = [p.numel() for p in training.ema.module.parameters()]
    kept += [p.grad.numel() for p in model.parameters()]
    kept += [
        x.numel()
        for state in training.optimizer.state.values()
        for name, x in state.items()
        if name != "step"
    ]
    assert 4 * (sum(kept) + size) == sum(training_memory(MAR_, 4)[name] for name in state)


def test_the_autoencoder_at_its_peak():
    """KL-16 at 256x256: five maps of 128 channels, of one image and of each of many."""
    for batch in (1, 3):
        _, peak = autoencoder_work(VAEConfig(), batch, 256)
        assert peak == pytest.approx(5 * batch * 4 * 128 * 256 * 256, rel=0.01)


@pytest.mark.parametrize("limit, expected", [(99, 0), (199, 0), (200, 1), (499, 3), (12_345, 122)])
def test_the_largest_batch(limit, expected):
    """100 bytes stay, 100 are of each image."""
    assert largest_batch({"weights": 100, "activations": 150, "at work": 50}, 2, limit) == expected


def test_a_plan_for_a_device():
    """1 GB is 10^9 bytes; 22 bytes of state for 10^7 parameters leave 78 images of 10 MB."""
    assert plan_run(10**7, 1e7, 1.0, 2048) == (64, 32)
    assert plan_run(10**7, 1e7, 1.0, 2048, 32) == (64, 1)
    assert plan_run(10**7, 1e7, 1.0, 240, 3) == (40, 2)
    assert plan_run(10**7, 1e7, 1.0, 78) == (78, 1)
    assert plan_run(10**7, 1e7, 0.2299, 2048) == (0, 0)
    assert plan_run(10**7, 1e7, 1.0, 80) == (40, 2)
    assert plan_run(10**7, 1e7, 1.0, 80, size=4) == (80, 1)  # no copies: 20 bytes of state
    with pytest.raises(ValueError, match="batch is 10 for 3 processes; expected a multiple"):
        plan_run(10**7, 1e7, 1.0, 10, 3)
    with pytest.raises(ValueError, match="image -1.0, .* expected a count from 0"):
        plan_run(10**7, -1.0, 1.0, 10)


def test_a_plan_takes_the_state_of_a_training():
    """The same bytes as `training_memory`, and the largest batch that divides."""
    mar, count = get_config("mar_base").mar, 207_924_768
    need = training_memory(mar, 64, dtype="bfloat16")
    image = (need["activations"] + need["at work"]) / 64
    most = largest_batch(need, 64, 24e9)
    assert sum(training_memory(mar, most, dtype="bfloat16").values()) == pytest.approx(
        24e9, rel=0.01
    )
    micro, accumulate = plan_run(count, image, 24, 2048)
    assert micro * accumulate == 2048 and micro <= most < 2 * micro


# what a process was before it became this one counts in its ru_maxrss, so not that for the start
PEAK = """
import resource
import psutil
from mar_mini.checkpoints import untrained
from mar_mini.configs import get_config
before = psutil.Process().memory_info().rss
pipeline = untrained(get_config("mar_large_12x1536"))
pipeline.generate([0], num_iter=1, num_sampling_steps=2, cfg=3.0)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit there")
def test_peak_memory_of_sampling():
    config = get_config("mar_large_12x1536")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    needed = sum(sampling_memory(config, 1, SamplingConfig(1, 2, 3.0)).values())
    print(
        f"\npredicted {needed / 1e9:.2f} GB, measured {(peak - before) / 1e9:.2f} GB and "
        f"{before / 1e9:.2f} GB of the process before"
    )
    assert 1 / 1.5 < needed / (peak - before) < 1.5
    assert 4 * (556_909_600 + 66_456_019) < needed


# What fits ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_what_would():
    """mar_huge: 942,403,104 + 66,456,019 weights of four bytes are 4.04 GB, of two 2.02 GB."""
    config = get_config("mar_huge")
    with pytest.raises(
        ValueError,
        match=(
            r"sampling 1 at a time from 'mar_huge' in float32 needs 4\.2\d GB of memory, 4\.00 GB "
            r"are available; what would fit: bfloat16 \(--bf16\); one of the presets digits, "
            r".*mar_large_12x1536$"
        ),
    ):
        plan_sampling(config, 1, "float32", 4e9)
    with pytest.raises(ValueError, match=r"sampling 64 .* would fit: \d+ at a time;") as error:
        plan_sampling(config, 64, "float32", 6e9)
    fits = int(re.findall(r"(\d+) at a time", str(error.value))[1])
    assert plan_sampling(config, fits, "float32", 6e9)[0] <= 6e9
    with pytest.raises(ValueError, match=f"would fit: {fits} at a time"):
        plan_sampling(config, fits + 1, "float32", 6e9)
    with pytest.raises(ValueError, match="what would fit: nothing here"):
        plan_sampling(config, 1, "float32", 1e3)
    with pytest.raises(ValueError, match="num_iter is 257; expected 1 to 256"):
        plan_sampling(config, 1, "float32", 1e12, num_iter=257)
    with pytest.raises(ValueError, match="preset 'kl16' has no MAR to sample"):
        plan_sampling(get_config("kl16"), 1, "float32", 1e12)


def test_training_is_planned_before_it_starts():
    """MAR-B by the published recipe on one device of 80 or 24 GB, in bfloat16."""
    config = get_config("mar_base")
    with pytest.raises(
        ValueError,
        match=(
            r"training on 2048 images at a time with 'mar_base' in bfloat16 needs 6\d\d\.\d+ "
            r"GB of memory, 80\.00 GB are available; what would fit: --accumulate 16; "
            r"--checkpoint-activations --accumulate 2; --batch-size \d+$"
        ),
    ) as error:
        check_fits(config, 2048, 80e9)
    fits = int(re.findall(r"--batch-size (\d+)", str(error.value))[0])
    assert 70e9 < check_fits(config, fits, 80e9) <= 80e9
    with pytest.raises(ValueError, match=f"--batch-size {fits}$"):
        check_fits(config, fits + 1, 80e9)
    for memory in (80, 24):
        for less in (False, True):
            way = replace(config.mar, grad_checkpointing=less)
            need = training_memory(way, 64, dtype="bfloat16")
            image = (need["activations"] + need["at work"]) / 64
            micro, accumulate = plan_run(207_924_768, image, memory, 2048)
            assert micro * accumulate == 2048
            assert check_fits(replace(config, mar=way), micro, 1e9 * memory) <= 1e9 * memory
            with pytest.raises(ValueError, match=f"fit: --accumulate {accumulate};"):
                half = replace(config.training, accumulate=accumulate // 2)
                check_fits(replace(config, mar=way, training=half), 2 * micro, 1e9 * memory)


def test_what_shared_state_saves():
    """The state of MAR-H is 21 GB, and an eighth of it in FSDP; alone there is nothing to share."""
    config = get_config("mar_huge")
    with pytest.raises(ValueError, match="with 'mar_huge' in bfloat16 .*fit: --strategy fsdp$"):
        check_fits(config, 4, 16e9, world_size=8)
    assert check_fits(config, 4, 16e9, world_size=8, strategy="fsdp") < 16e9
    with pytest.raises(ValueError, match="in float32 needs .* what would fit: nothing here"):
        check_fits(config, 4, 16e9, "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_without_training(dtype):
    config = get_config("cifar10_latents")
    first, again, other = (untrained(config, seed, dtype) for seed in (1, 1, 2))
    assert {p.dtype for p in (*first.mar.parameters(), *first.vae.parameters())} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    states = [pipeline.mar.state_dict() for pipeline in (first, again, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["z_proj.weight"], states[2]["z_proj.weight"])
    images = first.generate(
        [3], num_iter=2, num_sampling_steps=3, generator=torch.Generator().manual_seed(0)
    )
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all() and images.std() > 0.02


def test_a_pipeline_without_training_leaves_the_random_state():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    untrained(get_config("digits"), seed=1)
    assert torch.equal(torch.rand(3), expected)


# The report --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_described(preset):
    config = get_config(preset)
    text = "\n".join(describe(config, rates=Rates(1e12, 1e11), memory=8e10))
    for model, found in parts(config).items():
        for number in (*found.values(), sum(found.values())):
            assert f" {number:,}" in text, model
    assert ("a training step" in text) == ("sampling, " in text) == (config.mar is not None)
    assert "together" in text and " s\n" in text


def test_the_report_plans_the_recipe():
    """On one device of 24 GB the published batch has to be cut into micro batches."""
    text = "\n".join(describe(get_config("mar_base"), memory=24e9))
    plans = re.findall(r"batch (\d+) fits in 24.0 GB \(2048 as (\d+) x (\d+)\)", text)
    assert len(plans) == 4
    for most, accumulate, micro in (map(int, plan) for plan in plans):
        assert accumulate * micro == 2048 and micro <= most


def test_the_report_follows_the_use():
    config = get_config("mar_base")
    text = "\n".join(describe(config, batch_size=2, num_iter=3, num_sampling_steps=9, cfg=1.0))
    assert "sampling, 2 images (3 iterations, 9 diffusion steps, no guidance)" in text
    assert "fits in" not in text and " s\n" not in text
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        list(describe(config, batch_size=0))
    with pytest.raises(ValueError, match="num_sampling_steps is 0; expected 2 to 1000"):
        list(describe(config, num_sampling_steps=0))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.00 "), (999.4, "999 "), (999.6, "1.00 k"), (9.996, "10.0 "), (1.3166e12, "1.32 T")],
)
def test_numbers_with_prefixes(number, text):
    assert si(number) == text


# The page ----------------------------------------------------------------------------------------


def test_the_page_is_what_is_counted():
    assert scaling.PAGE.read_text() == scaling.page(), "run: python tools/scaling.py"


def test_hours_of_the_page_by_hand():
    """MAR-L: 512,466,800 images; all but a percent of the work are the products of the blocks.

    A block has 24 D^2 FLOPs a row and 4 N D for the attention; N is 64 + 34 and 64 + 256. A head
    block has 10 W^2 a row, 888 rows an image. The last decoder block computes 222 rows of all.
    """
    d, w, masked = 1024, 1280, 256 * mean_mask_ratio(0.7)
    encoder = 16 * (320 - masked) * (24 * d**2 + 4 * (320 - masked) * d)
    decoder = 15 * 320 * (24 * d**2 + 4 * 320 * d) + 320 * 4 * d**2 + masked * 20 * d**2
    head = 4 * masked * (8 * 10 * w**2 + 4 * w**2)
    seconds = 3 * (encoder + decoder + head) * 1_281_167 * 400 / (0.4 * 989e12)
    (hours,) = re.findall(r"`mar_large` \| 478.*\| (\d+) \| \d+ \|\n", scaling.page())
    assert int(hours) == pytest.approx(seconds / 3600, rel=0.02)


# The command line --------------------------------------------------------------------------------


def command(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "mar_mini", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_sampling_with_random_weights(tmp_path):
    few = ["--random-weights", "--num-iter", 2, "--num-sampling-steps", 2]
    done = command("sample", "--config", "cifar10", *few, "--out", tmp_path / "noise.png")
    assert done.returncode == 0, done.stderr
    assert re.match(
        r"cifar10 with random weights, a batch of 1 in float32: predicted [\d.]+ s and "
        r"[\d.]+ MB\n",
        done.stdout,
    )
    assert "the picture is noise" in done.stdout and "noise.png: class 0" in done.stdout
    assert (tmp_path / "noise.png").exists()


def test_a_trained_model_in_bfloat16(tmp_path, capsys):
    """Of the same seed almost the same picture, and not the same to the bit."""
    pictures = []
    for bf16 in (False, True):
        path = tmp_path / f"{bf16}.png"
        assert sample("digits", labels=(3,), num_iter=4, bf16=bf16, out=path) == 0
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("L"), dtype=float))
    difference = abs(pictures[0] - pictures[1])
    assert 0 < difference.max() < 128 and difference.mean() < 4


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: sample(), "expected a trained model .*, or, without one"),
        (lambda: sample(config="digits"), "the word that its weights are random"),
        (lambda: sample("digits", random_weights=True), "expected a trained model"),
        (lambda: sample(config="digits", random_weights=True, fast=True), "without --fast"),
        (lambda: sample(config="kl16", random_weights=True), "'kl16' has no MAR to sample"),
        (
            lambda: sample(config="mar_huge", random_weights=True, labels=(0,) * 20_000),
            "sampling 20000 at a time from 'mar_huge' in float32 needs",
        ),
        (lambda: info("mar_hug"), "unknown preset 'mar_hug'; expected one of: digits"),
        (lambda: info("mar_huge", num_iter=300), "num_iter is 300; expected 1 to 256"),
        (lambda: info("mar_huge", memory_gb=-1), "memory-gb is -1; expected more than 0"),
    ],
)
def test_commands_that_cannot_be(run, message, capsys):
    with pytest.raises(ValueError, match=message):
        run()
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_info_measures_this_machine():
    done = command("info", "digits", "--here", "--batch-size", 3)
    assert done.returncode == 0, done.stderr
    assert "a training step, 3 images" in done.stdout and "fits in" in done.stdout
    assert re.search(r"together +[\d.]+ MFLOP +\d\.\d{3} s\n", done.stdout)
