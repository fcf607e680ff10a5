"""Module for module and key for key the published models: printed trees, state dict shapes."""

import re
from dataclasses import asdict
from itertools import takewhile

import pytest
import torch
from golden_values import GOLDEN, SHAPES
from torch import nn

from mar_mini import MAR, AutoencoderKL, get_config

TEXT = (GOLDEN / "module_trees.md").read_text(encoding="utf-8")
PRESETS = {"AutoencoderKL": "kl16", "MAR": "mar_large_12x1536"}
COUNTS = {
    "kl16": 66_456_019,
    "seed_mar_large": 556_909_600,
    "mar_base": 207_924_768,
    "mar_large": 478_326_304,
    "mar_huge": 942_403_104,
}
WITH_PARAMETERS = {"Conv2d", "GroupNorm", "Linear", "LayerNorm", "Embedding"}
LINE = re.compile(
    r"(?P<indent> *)(?:\((?P<name>[\w-]+)\): |\w+ = )?(?:(?P<count>\d+) x )?"
    r"(?P<shown>(?P<kind>\w+)\(.*)"
)


def build(preset: str) -> nn.Module:
    """A preset's model without memory for its weights: the autoencoder if it has no MAR."""
    config = get_config(preset)
    with torch.device("meta"):
        return MAR(**asdict(config.mar)) if config.mar else AutoencoderKL(**asdict(config.vae))


@pytest.fixture(scope="module")
def models():
    return {root: build(preset) for root, preset in PRESETS.items()}


def printed(text: str, root: str) -> dict[str, str]:
    """Path -> what is printed there, from the tree of that root; repeated modules one by one.

    A module with others in it is shown by its class alone.
    """
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(rf"(\w+ = )?{root}\($", line))
    found: dict[str, str] = {}
    open_at: list[list[str]] = []  # for each level of indentation the paths that are open there
    for line in takewhile(lambda line: line != "```", lines[first:]):
        if line.strip() == ")":
            continue
        match = LINE.fullmatch(line)
        assert match, f"cannot read {line!r}"
        del open_at[len(match["indent"]) // 2 :]
        if match["name"] is None:
            open_at.append([""])
            continue
        ends = [int(n) for n in re.findall(r"^(\d+)-(\d+)$", match["name"]) for n in n]
        names = range(ends[0], ends[1] + 1) if ends else [match["name"]]
        assert len(names) == int(match["count"] or 1), f"{line!r} counts otherwise than it names"
        paths = [f"{above}.{name}".lstrip(".") for above in open_at[-1] for name in names]
        shown = match["kind"] if match["shown"] == match["kind"] + "(" else match["shown"]
        found.update(dict.fromkeys(paths, shown))
        open_at.append(paths)
    return found


def built(model: nn.Module) -> dict[str, str]:
    """The same of a model, as the PyTorch that printed the trees would show it."""
    shown = {}
    for path, module in model.named_modules():
        text = type(module).__name__ if any(module.children()) else repr(module)
        # newer PyTorch also prints whether a norm has a bias: as a rule, if it has a weight
        shown[path] = re.sub(r"(Norm\(.*affine=(True|False)), bias=\2\)$", r"\1)", text)
    del shown[""]
    return shown


def with_parameters(tree: dict[str, str]) -> dict[str, str]:
    return {path: text for path, text in tree.items() if text.split("(")[0] in WITH_PARAMETERS}


def differences(want: dict[str, str], got: dict[str, str]) -> list[str]:
    return [
        f"{path}: {got.get(path)} instead of {want.get(path)}"
        for path in sorted(want.keys() | got.keys())
        if want.get(path) != got.get(path)
    ]


def compare(text: str, models: dict[str, nn.Module]) -> list[str]:
    """How the models differ from both trees in a text, in modules that hold parameters."""
    return [
        difference
        for root, model in models.items()
        for difference in differences(
            with_parameters(printed(text, root)), with_parameters(built(model))
        )
    ]


@pytest.mark.parametrize("root", PRESETS)
def test_modules_with_parameters_are_those_printed(models, root):
    assert compare(TEXT, {root: models[root]}) == []


@pytest.mark.parametrize("root", PRESETS)
def test_no_parameter_is_elsewhere(models, root):
    """All but the bare parameters of MAR belong to a module that the tree prints."""
    owners = {name.rpartition(".")[0] for name, _ in models[root].named_parameters()}
    assert owners - {""} == {
        path
        for path, text in with_parameters(printed(TEXT, root)).items()
        if "affine=False" not in text
    }
    bare = {name for name, _ in models[root].named_parameters() if "." not in name}
    assert bare == (
        {
            "fake_latent",
            "mask_token",
            "encoder_pos_embed_learned",
            "decoder_pos_embed_learned",
            "diffusion_pos_embed_learned",
        }
        if root == "MAR"
        else set()
    )


@pytest.mark.parametrize("root", PRESETS)
def test_modules_that_hold_others_are_of_the_printed_class(models, root):
    """Where the tree has a class of its own for them; it calls five levels just `Module`."""
    tree, model = printed(TEXT, root), built(models[root])
    parents = {path: text for path, text in tree.items() if re.fullmatch(r"\w+", text)}
    nameless = {path: text for path, text in model.items() if parents.get(path) == "Module"}
    assert set(nameless.values()) == ({"Level", "Middle"} if root == "AutoencoderKL" else set())
    assert (
        differences(
            parents,
            {k: v for k, v in model.items() if k in parents}
            | {path: "Module" for path in nameless},
        )
        == []
    )


@pytest.mark.parametrize(("root", "count"), [("AutoencoderKL", 29), ("MAR", 4 * 32)])
def test_dropouts_and_activations_are_those_printed(models, root, count):
    """Modules without parameters, where we have a module and not a function."""
    tree, model = printed(TEXT, root), built(models[root])
    ours = {
        path: text
        for path, text in model.items()
        if text.split("(")[0] not in WITH_PARAMETERS and re.fullmatch(r"\w+\(.*\)", text)
    }
    assert sum(text.startswith("Dropout") for text in ours.values()) == count
    assert differences({path: tree.get(path, "nothing") for path in ours}, ours) == []


def test_how_much_the_parser_reads():
    """Counted by hand: what the comparisons above go over is the whole of the two trees."""
    vae, mar = (with_parameters(printed(TEXT, root)) for root in PRESETS)
    # encoder: 12 blocks of 4, 2 more with a shortcut, 4 downsamplings, 3 attentions of 5, ends 3;
    # decoder: 17 blocks of 4, 2 shortcuts, 4 upsamplings, 1 attention, ends 3; 2 convolutions
    assert len(vae) == (12 * 4 + 2 + 4 + 3 * 5 + 3) + (17 * 4 + 2 + 4 + 5 + 3) + 2
    # 32 blocks of 6; 6 beside them; head: 12 blocks of 4, time MLP 2, 2 projections, final 3
    assert len(mar) == 32 * 6 + 6 + (12 * 4 + 2 + 2 + 3)
    assert mar["encoder_blocks.15.attn.qkv"].endswith("out_features=3072, bias=True)")
    assert vae["decoder.up.1.block.2.conv2"].startswith("Conv2d(128, 128, kernel_size=(3, 3)")


ALTERATIONS = {
    "eps": ("LayerNorm((1536,), eps=1e-06, elementwise_affine=True)", "1e-06", "1e-05"),
    "affine": ("LayerNorm((1536,), eps=1e-06, elementwise_affine=False)", "False", "True"),
    "width": ("(qkv): Linear(in_features=1024, out_features=3072", "3072", "3071"),
    "padding": (
        "(conv): Conv2d(128, 128, kernel_size=(3, 3), stride=(2, 2))",
        "(2, 2)",
        "(2, 2), padding=(1, 1)",
    ),
    "groups": ("(norm_out): GroupNorm(32, 128", "32", "16"),
    "class": ("(q): Conv2d(512", "Conv2d", "Linear"),
    "name": ("(nin_shortcut)", "nin_shortcut", "shortcut"),
    "repetitions": ("(0-11): 12 x ResBlock", "(0-11): 12", "(0-10): 11"),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_an_altered_tree_is_noticed(models, what):
    """One line of the text changed, and the comparison names what differs."""
    line, old, new = ALTERATIONS[what]
    assert line in TEXT and old in line
    found = compare(TEXT.replace(line, line.replace(old, new), 1), models)
    assert set(found) - set(compare(TEXT, models)), f"{new} for {old} was not noticed"


def test_a_missing_line_is_noticed(models):
    line = "  (decoder_embed): Linear(in_features=1024, out_features=1024, bias=True)\n"
    assert line in TEXT
    assert compare(TEXT.replace(line, ""), models) == [
        "decoder_embed: Linear(in_features=1024, out_features=1024, bias=True) instead of None"
    ]


@pytest.mark.parametrize("name", COUNTS)
def test_state_dict(name):
    """Every key and shape of the published weights, and no other."""
    model = build("mar_large_12x1536" if name == "seed_mar_large" else name)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert differences(SHAPES[name], shapes) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[name]
    assert set(SHAPES) == set(COUNTS)
