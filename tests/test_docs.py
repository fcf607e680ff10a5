"""The documents: links lead somewhere, and the code that they name exists."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import textwrap
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import pytest

import mar_mini
from mar_mini.configs import PRESETS, MARConfig, VAEConfig
from mar_mini.fast import Reuse

REPO = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"[a-z]+:", re.IGNORECASE)  # https:, mailto:, attachment:
SETTINGS = {  # what the two models are built from
    mar_mini.MAR: MARConfig.__dataclass_fields__,
    mar_mini.AutoencoderKL: VAEConfig.__dataclass_fields__,
}
COMMANDS = ("mar-mini ", "make ", "python ")


def documents() -> list[Path]:
    """All markdown files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    out = subprocess.run(command, cwd=REPO, capture_output=True, check=True).stdout.decode()
    return [REPO / name for name in out.split("\0") if name and (REPO / name).exists()]


def chapters() -> list[Path]:
    return sorted((REPO / "notebooks" / "src").glob("*.py"))


def prose(text: str) -> str:
    """Without code, in which `[a](b)` may be an index and a call."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def markdown_of(source: str) -> str:
    """The markdown cells of a py:percent source."""
    cells = re.split(r"^(?=# %%)", source, flags=re.MULTILINE)
    texts = [cell for cell in cells if cell.startswith("# %% [markdown]")]
    return "\n".join(re.sub(r"^# ?", "", text, flags=re.MULTILINE) for text in texts)


def links(text: str) -> list[str]:
    """Targets of links and images, in markdown or HTML, that are not on the web."""
    text = prose(text)
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", text)  # [text](target "title")
    found += re.findall(r"^\[[^\]]+\]:\s*<?(\S+?)>?\s*$", text, re.MULTILINE)  # [name]: target
    found += re.findall(r"<(?:a|img)\b[^>]*?(?:href|src)=[\"']([^\"']+)", text)
    return [target for target in found if not OUTSIDE.match(target)]


def anchors(text: str) -> set[str]:
    """The headings as GitHub makes anchors of them, and those given in HTML."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    seen: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)? *$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
    made = {f"{slug}-{i}" if i else slug for slug, n in seen.items() for i in range(n + 1)}
    return made | set(re.findall(r"<a\b[^>]*?(?:id|name)=[\"']([^\"']+)", text))


def broken_link(target: str, folder: Path, own: str) -> str | None:
    """What is wrong with a link in a text of that folder; None for nothing."""
    name, _, anchor = unquote(target).partition("#")
    path = folder / name if name else None
    if path is not None and not path.exists():
        return f"{target}: no such file"
    if not anchor:
        return None
    if path is not None and path.suffix == ".py":
        return f"{target}: an anchor in a file that is not markdown"
    text = own if path is None else path.read_text()
    return None if anchor in anchors(text) else f"{target}: no such heading"


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPO)))
def test_links_of_documents(document):
    text = document.read_text()
    faults = [broken_link(target, document.parent, text) for target in links(text)]
    assert not [fault for fault in faults if fault]


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_links_of_chapters(chapter):
    """As seen from `notebooks/`, where the built chapter is, and from `my/` beside it."""
    text = markdown_of(chapter.read_text())
    faults = [broken_link(target, REPO / "notebooks", text) for target in links(text)]
    assert not [fault for fault in faults if fault]


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "there.md").write_text("# The `x0` bound, and why?\n## Twice\n## Twice\n")
    text = "# Own\n[a](there.md) ![b](gone.png) `[c](code)` <img src='gone.svg'> [d](https://x.y)\n"
    assert links(text) == ["there.md", "gone.png", "gone.svg"]
    for fine in ("there.md", "#own", "there.md#the-x0-bound-and-why", "there.md#twice-1"):
        assert broken_link(fine, tmp_path, text) is None
    for wrong in ("gone.png", "#other", "there.md#other", "there.md#twice-2"):
        assert broken_link(wrong, tmp_path, text)


@lru_cache
def assigned(kind: type) -> set[str]:
    """Names that the methods of a class, and of those it inherits from here, set on `self`."""
    names = set()
    for base in kind.__mro__:
        if base.__module__.split(".")[0] != "mar_mini":
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
    return names


def resolve(name: str) -> object:
    """What a dotted name stands for, within `mar_mini`. Raises LookupError if for nothing."""
    found: object = mar_mini
    parts = name.removeprefix("mar_mini.").split(".")
    for i, part in enumerate(parts):
        if inspect.ismodule(found) and not hasattr(found, part):
            try:
                found = importlib.import_module(f"{found.__name__}.{part}")
                continue
            except ModuleNotFoundError as error:
                raise LookupError(f"{name}: {found.__name__} has no {part}") from error
        if inspect.ismodule(found) and i < len(parts) - 1:  # sample is a function and sampling not
            module = f"{found.__name__}.{part}"
            found = importlib.import_module(module) if importable(module) else getattr(found, part)
        elif hasattr(found, part):
            found = getattr(found, part)
        elif (
            inspect.isclass(found)
            and i == len(parts) - 1
            and (part in assigned(found) or part in getattr(found, "__dataclass_fields__", {}))
        ):
            return None  # an attribute of its instances
        else:
            raise LookupError(f"{name}: no {part}")
    return found


def importable(module: str) -> bool:
    path = REPO / Path(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def unknown_code(span: str) -> str | None:
    """What is wrong with a piece of code in a document: a path, a name, or `name(argument)`."""
    if span == "mar_mini" or span.startswith(COMMANDS):
        return None
    if "/" in span or re.search(r"\.(py|md|json|npz|ipynb|toml|txt)$", span):
        return None if (REPO / span).exists() else f"{span}: no such file"
    match = re.fullmatch(r"([A-Za-z_][\w.]*)(?:\(([\w, ]*)\)|\[\"(\w+)\"\])?", span)
    if not match:
        return f"{span}: neither a path, a name nor name(argument)"
    name, arguments, key = match.groups()
    if name in PRESETS:
        return None
    try:
        found = resolve(name)
    except LookupError as error:
        return str(error)
    if key is not None:
        return None if key in found else f"{span}: {name} has no {key}"
    if arguments:
        known = {*inspect.signature(found).parameters, *SETTINGS.get(found, {})}
        missing = [a for a in re.split(r", *", arguments) if a not in known]
        return f"{span}: {name} takes no {', '.join(missing)}" if missing else None
    return None


@pytest.mark.parametrize("document", ["glossary.md", "paper_map.md"])
def test_code_named_in_documents_exists(document):
    text = (REPO / "docs" / document).read_text()
    spans = re.findall(r"`([^`\n]+)`", text)
    assert len(spans) > 50
    assert not [fault for fault in map(unknown_code, spans) if fault]


@pytest.mark.parametrize("document", ["faq.md", "teaching.md", "beyond.md"])
def test_code_that_looks_like_ours_exists(document):
    """In running text code is anything; of it, what is a file or begins with a module of ours."""
    text = re.sub(r"^```.*?^```", "", (REPO / "docs" / document).read_text(), flags=re.M | re.S)
    spans = [re.sub(r"=[^,)]*", "", span) for span in re.findall(r"`([^`\n]+)`", text)]  # f(x=...)
    ours = [span for span in spans if importable("mar_mini." + span.split(".")[0]) and "." in span]
    paths = [span for span in spans if span.startswith(("mar_mini/", "tests/", "docs/"))]
    assert not [fault for fault in map(unknown_code, ours + paths) if fault]


def test_questions_have_links():
    sections = re.split(r"^## ", (REPO / "docs" / "faq.md").read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) > 14
    assert not [text.splitlines()[0] for text in sections[:14] if "](" not in text]


def rows_of_ideas() -> list[tuple[str, str]]:
    """Of each idea that came after MAR, what of it is here and what was measured of it."""
    text = (REPO / "docs" / "beyond.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 12 and all(len(row) == 5 for row in rows)
    return [(row[3], row[4]) for row in rows[1:]]


MEASURED = {  # argument -> names in the results for CIFAR-10 and for digits
    "num_sampling_steps": ("50 to 5 diffusion steps", "25 to 5 diffusion steps"),
    "solver": ("dpm_solver, 10 steps", "dpm_solver, 10 steps"),
    "guidance_interval": ("guidance from 1/4 known", "guidance from 1/4 known"),
    "refresh_features": ("features each 4th iteration", "features each 4th iteration"),
    "refresh_guidance": ("guidance each 4th iteration", "guidance each 4th iteration"),
    "order": ("checkerboard order", None),
}


def test_ideas_after_mar_are_quoted_as_measured():
    """If benchmarks were run again, the figures in docs/beyond.md want to be written again."""
    results = REPO / "benchmarks" / "results"
    cifar10 = json.loads((results / "cifar10.json").read_text())["rows"]
    digits = json.loads((results / "quality.json").read_text())["rows"]
    seen = set()
    for here, measured in rows_of_ideas():
        argument = re.findall(r"(?:`|\()(\w+)=", here)[-1:]
        if not argument:
            assert not re.search(r"\d", measured), here
            continue
        known = {*inspect.signature(mar_mini.sampling.sample).parameters, *vars(Reuse())}
        assert argument[0] in known
        if measured.startswith("not measured"):
            continue
        seen.add(argument[0])
        in_cifar10, in_digits = MEASURED[argument[0]]
        row = cifar10[in_cifar10]
        times = cifar10["default"]["seconds"] / row["seconds"]
        expected = f": {row['distance']:.0f}, {times:.1f}x"
        if in_digits is not None:
            expected += f"; digits: {digits[in_digits]['cost']:+.0%}"
        assert re.sub(r"CIFAR-10| \([^)]*\)| \|$", "", measured) == expected
    assert seen == set(MEASURED)


def sentences(path: Path) -> str:
    """All texts of a module, those that are written in several pieces put together."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            pieces = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
            texts.append("".join(pieces))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return "\n".join(texts)


def quoted_messages() -> list[tuple[str, str]]:
    """Of each chapter in the plan for teachers, what its check is said to say."""
    text = (REPO / "docs" / "teaching.md").read_text()
    parts = re.split(r"^### \[Chapter (\d+)\].*$", text, flags=re.MULTILINE)
    assert len(parts) > 6, "the headings have changed"
    found = []
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        quotes = re.findall(r'\| "(.*)" \|$', text, flags=re.MULTILINE)
        assert quotes, f"chapter {number}"
        found += [(number, quote) for quote in quotes]
    return found


def test_checks_say_what_teachers_are_told():
    said, missing = {}, []
    for chapter in chapters():
        modules = re.findall(r"^from mar_mini\.checks import (\w+)", chapter.read_text(), re.M)
        paths = [REPO / "mar_mini" / "checks" / f"{name}.py" for name in modules]
        paths.append(REPO / "mar_mini" / f"{chapter.stem[3:]}.py")
        said[chapter.stem[:2]] = "".join(sentences(path) for path in paths if path.exists())
    assert "06" in said
    for number, quote in quoted_messages():
        if quote not in said[f"{int(number):02d}"]:
            missing.append(f"chapter {number}: {quote}")
    assert not missing


@pytest.mark.parametrize(
    "span",
    [
        "masking.mask_by_ordr",
        "masking.Mask",
        "MAR(buffers)",
        "Diffusion.gammas",
        "tests/gone.py",
        "sampling.sample(cfg, gone)",
        'masking.ORDERS["knight"]',
        "cfg = 3",
    ],
)
def test_code_that_does_not_exist_is_found(span):
    assert unknown_code(span)


@pytest.mark.parametrize(
    "span",
    [
        "masking",
        "mar_mini.masking.mask_by_order",
        "MAR(buffer_size)",
        "mar.MAR.seq_len",
        "mar_huge",
        "Diffusion.alpha_bars",
        "sampling.sample(cfg, num_iter)",
        "tests/test_docs.py",
        "mar_mini/mar.py",
        'masking.ORDERS["spiral"]',
        "judge.statistics.Reference.cov",
    ],
)
def test_code_that_exists_is_known(span):
    assert unknown_code(span) is None
