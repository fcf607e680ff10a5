"""The three widgets as one page, for a class or visitors: a notebook that Voila serves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jupytext

from mar_mini.course.chapters import run_jupyter
from mar_mini.files import write_atomically

UNUSED = ["jupyterlab-jupytext", "jupyterlab_pygments"]  # extensions that are of no use to it
PAGE = """\
# %% [markdown]
# # MAR paints: any order, several tokens at a time
#
# A *masked autoregressive* model makes an image out of tokens. It can predict them in any order,
# and several in one step. Blue is known, orange is being predicted, grey is still masked.

# %%
from mar_mini.viz import GenerationTheatre, Inpainter, MaskOrderExplorer

# %% [markdown]
# ## Orders
#
# Choose an order, or draw one by hand, and play it. How many tokens does the first step predict,
# and how many the last?

# %%
MaskOrderExplorer()

# %% [markdown]
# ## A real generation
#
# A small model, trained on the CIFAR-10 photographs, paints what you ask for. Go back in time with
# the slider below the picture.

# %%
GenerationTheatre("cifar10", label=7, seed=1)

# %% [markdown]
# ## Fill a hole
#
# Brush over a part of the picture and let the model invent it, as the class that you choose.

# %%
Inpainter("cifar10")
"""


def write_page(path: Path) -> Path:
    """Write the page's notebook."""
    notebook = jupytext.reads(PAGE, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    text = jupytext.writes(notebook, fmt="ipynb")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))
    return path


def serve(
    page: Path,
    *,
    ip: str = "127.0.0.1",
    port: int = 8866,
    token: bool = True,
    theme: str = "light",
    arguments: Sequence[str] = (),
) -> int:
    """Serve the page until Ctrl-C; return the exit status.

    page       where its notebook is written
    ip         127.0.0.1 serves this machine alone, 0.0.0.0 every machine that reaches it
    token      only those who know the address that is printed may open it
    theme      "light" or "dark"
    arguments  further ones of Voila
    """
    page = write_page(page.resolve())  # Voila runs in its folder
    options = [f"--Voila.ip={ip}", f"--port={port}", f"--theme={theme}", *arguments]
    options += [f"--VoilaConfiguration.extension_denylist={UNUSED}", *["--token"] * token]
    return run_jupyter(["voila", str(page), "--template=mar_mini", *options], page.parent)


# The command -------------------------------------------------------------------------------------


def app(
    arguments: tuple[str, ...] = (),
    *,
    ip: str = "127.0.0.1",
    port: int = 8866,
    token: bool = True,
    theme: Literal["light", "dark"] = "light",
) -> int:
    """Serve the three widgets as one page, for a class or visitors.

    Args:
        arguments: further ones of Voila, behind a `--`.
        ip: 0.0.0.0 serves every machine that can reach this one.
        port: of the page.
        token: only those who know the printed address may open it.
        theme: of the page.
    """
    page = Path("build") / "app.ipynb"
    return serve(page, ip=ip, port=port, token=token, theme=theme, arguments=arguments)
