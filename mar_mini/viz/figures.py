"""Figures of the course, one style for all; each function returns a matplotlib `Figure`.

A figure's label (`figure.get_label()`) is its alternative text. Figures belong to no window:
nothing is drawn until `show` (in a notebook) or `save_figure`.
"""

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from mar_mini.files import write_atomically

# safe for colour-blind readers (Okabe & Ito 2008); the same meaning in every figure and widget
KNOWN, PREDICTED, MASKED, TARGET = "#0072B2", "#E69F00", "#D9D9D9", "#009E73"
WIDTH = 7.0  # inches; at 100 dots an inch 700 pixels
HEAVY = 60 * 1024  # bytes
STATES = ListedColormap([MASKED, PREDICTED, KNOWN])


def new_figure(height: float, alt: str, width: float = WIDTH) -> Figure:
    """An empty figure with its alternative text."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    figure.set_label(alt)
    return figure


def show(figure: Figure) -> None:
    """Display a figure in a notebook, with alternative text.

    As HTML, since notebooks know no alternative text for a PNG; the PNG goes along for readers of
    stored notebooks.
    """
    from IPython.display import display

    alt, data = figure.get_label(), png(figure)
    source = base64.b64encode(data).decode()
    tag = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{source}">'
    display(
        {"text/html": tag, "image/png": data, "text/plain": alt},
        raw=True,
        metadata={"image/png": {"alt": alt}},
    )


def png(figure: Figure) -> bytes:
    """The figure as PNG; with 256 colours where more would make a notebook heavy."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    if buffer.tell() > HEAVY:
        image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG; the folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(png(figure)))
    return path


def draw_image(axes, image: Float[Tensor, "C H W"]) -> None:
    """One picture in [0, 1] on axes without ticks; grey if it has one channel."""
    pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def image_grid(
    images: Float[Tensor, "N C H W"],
    *,
    columns: int = 10,
    titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    alt: str = "",
) -> Figure:
    """Pictures (N, C, H, W) in [0, 1], row by row; titles go over the first of them.

    row_titles  what stands to the left of each row
    """
    rows = -(-len(images) // columns)
    aside = 0.2 + 0.065 * max(map(len, row_titles)) if row_titles else 0  # inches
    cell = (WIDTH - aside) / max(columns, 5)
    text = alt or f"{len(images)} images in {rows} rows" + "".join(
        f", titled {', '.join(dict.fromkeys(names))}" for names in (titles, row_titles) if names
    )
    titled = -(-len(titles) // columns) if titles else 0
    heading = min(0.22 * cell, 0.2)  # inches; titles do not grow with the pictures
    figure = new_figure(cell * rows + heading * titled, text, width=cell * columns + aside)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for i, ax in enumerate(axes):
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
        if row_titles and i % columns == 0:
            name = row_titles[i // columns]
            ax.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
        if i < len(images):
            draw_image(ax, images[i])
            if titles and i < len(titles):
                ax.set_title(titles[i], fontsize=8, pad=2)
    return figure


def draw_states(axes, states: Int[Tensor, "H W"]) -> None:
    """Tokens as fields: 0 masked, 1 predicted now, 2 known."""
    axes.imshow(states.cpu().numpy(), cmap=STATES, vmin=0, vmax=2, interpolation="nearest")
    draw_lines(axes, *states.shape)


def draw_lines(axes, height: int, width: int) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_xticks([x - 0.5 for x in range(width + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(height + 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)


def states_of(mask: Bool[Tensor, " L"], predicted: Bool[Tensor, " L"]) -> Int[Tensor, " L"]:
    """0 masked, 1 predicted now, 2 known, for one image of a `Frame`."""
    return torch.where(mask, 0, torch.where(predicted, 1, 2))


def filmstrip(frames: Sequence, row: int = 0, *, columns: int = 8, alt: str = "") -> Figure:
    """One image growing token by token: the picture above, the state of its tokens below.

    frames  frames with `.images()`, as a `Pipeline` yields them, from the first to the last; of
            more than `columns` some are left out, never the last
    row     which image of the batch
    """
    last, shown = len(frames) - 1, min(columns, len(frames))
    picked = [round(i * last / max(1, shown - 1)) for i in range(shown)]
    cell = WIDTH / columns
    figure = new_figure(
        2.45 * cell,
        alt or f"An image growing in {len(frames)} steps, and which of its tokens are known",
        width=cell * len(picked),
    )
    axes = figure.subplots(2, len(picked), squeeze=False)
    for column, index in enumerate(picked):
        frame = frames[index]
        image = frame.images()[row]
        height, width = grid_of(frame.mask.shape[1], image.shape[1], image.shape[2])
        hidden = frame.mask[row].reshape(height, width)
        scale = (image.shape[1] // height, image.shape[2] // width)
        shade = hidden.repeat_interleave(scale[0], 0).repeat_interleave(scale[1], 1)
        draw_image(axes[0, column], torch.where(shade, 0.85, image))  # the grey of MASKED
        draw_states(
            axes[1, column], states_of(frame.mask[row], frame.predicted[row]).reshape(height, width)
        )
        axes[0, column].set_title(f"step {frame.step + 1}", fontsize=8, pad=2)
        for side in (*axes[0, column].spines.values(), *axes[1, column].spines.values()):
            side.set_visible(False)
    return figure


def grid_of(length: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of L square tokens on a picture of that size."""
    rows = round((length * height / width) ** 0.5)
    return rows, length // rows


def order_maps(
    orders: dict[str, Int[Tensor, "B L"]], height: int, width: int, *, alt: str = ""
) -> Figure:
    """When each token's turn comes, first row of each order: dark first, light last."""
    columns = min(4, len(orders))
    rows = -(-len(orders) // columns)
    cell = WIDTH / 4
    figure = new_figure(
        rows * cell * 1.15,
        alt or f"Turn of each token in the orders {', '.join(orders)}",
        width=cell * columns,
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (name, order) in zip(axes, orders.items(), strict=False):
        turn = order[0].cpu().argsort().reshape(height, width)
        ax.imshow(turn.numpy(), cmap="viridis", interpolation="nearest")
        ax.set_title(name, fontsize=10)
        draw_lines(ax, height, width)
        if height * width <= 64:
            for y in range(height):
                for x in range(width):
                    late = turn[y, x] > 0.6 * turn.max()
                    ax.text(
                        x,
                        y,
                        int(turn[y, x]) + 1,
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="black" if late else "white",
                    )
    for ax in axes[len(orders) :]:
        ax.axis("off")
    return figure


def token_states(
    masks: Sequence[Bool[Tensor, " L"]],
    height: int,
    width: int,
    *,
    titles: Sequence[str] = (),
    alt: str = "",
) -> Figure:
    """Masks side by side; a token that the mask before still hid is drawn as predicted now."""
    cell = WIDTH / max(len(masks), 4)
    figure = new_figure(
        1.2 * cell, alt or f"{len(masks)} masks of {height}x{width} tokens", width=cell * len(masks)
    )
    axes = figure.subplots(1, len(masks), squeeze=False)[0]
    for i, (ax, mask) in enumerate(zip(axes, masks, strict=True)):
        before = masks[i - 1] if i else mask
        draw_states(ax, states_of(mask, before & ~mask).reshape(height, width))
        if i < len(titles):
            ax.set_title(titles[i], fontsize=8, pad=2)
    return figure


def bars(counts: dict[str, Sequence[int]], *, xlabel: str, ylabel: str, alt: str = "") -> Figure:
    """Whole numbers step by step, one panel for each name: tokens per step, for instance."""
    figure = new_figure(2.2, alt or f"{ylabel} for each {xlabel}: {', '.join(counts)}")
    axes = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for ax, (name, values) in zip(axes, counts.items(), strict=True):
        ax.bar(range(1, len(values) + 1), values, color=PREDICTED)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    return figure


def breakdown(
    rows: dict[str, dict[str, float]], *, xlabel: str, log: bool = False, alt: str = ""
) -> Figure:
    """What some things are made of: a bar for each name, its parts one after the other.

    log  a logarithmic axis, and dots: it has no zero that a bar could begin at, and parts do not
         add up on it
    """
    names = list(dict.fromkeys(part for parts in rows.values() for part in parts))
    figure = new_figure(
        0.8 + 0.32 * len(rows),
        alt
        or f"{xlabel} of {', '.join(rows)}"
        + (f", by part: {', '.join(names)}" if len(names) > 1 else ""),
    )
    axes = figure.subplots()
    colours = (KNOWN, PREDICTED, TARGET, "#CC79A7", "#56B4E9", "#7F7F7F", "#D55E00")
    for name, colour in zip(names, colours, strict=False):
        widths = [parts.get(name, 0.0) for parts in rows.values()]
        before = [
            sum(parts.get(n, 0.0) for n in names[: names.index(name)]) for parts in rows.values()
        ]
        if log:
            axes.plot(widths, range(len(rows)), "o", color=colour, label=name)
        else:
            axes.barh(range(len(rows)), widths, left=before, color=colour, label=name)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xscale="log" if log else "linear")
    if log:
        axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        figure.legend(
            loc="outside upper center", ncols=min(len(names), 6), frameon=False, fontsize=8
        )
    return figure


def histogram(
    values: Sequence[float], *, xlabel: str, ylabel: str = "draws", alt: str = ""
) -> Figure:
    """How often values fall into each of twelve bins."""
    figure = new_figure(2.2, alt or f"Histogram of {len(values)} values of {xlabel}")
    axes = figure.subplots()
    axes.hist(np.asarray(values), bins=12, color=PREDICTED, rwidth=0.85)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves(
    lines: dict[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    logy: bool = False,
    alt: str = "",
) -> Figure:
    """Named curves (x, y) in one panel."""
    figure = new_figure(2.6, alt or f"{ylabel} over {xlabel}: {', '.join(lines)}")
    axes = figure.subplots()
    for (name, (x, y)), colour in zip(
        lines.items(), (KNOWN, PREDICTED, TARGET, "#CC79A7"), strict=False
    ):
        axes.plot(np.asarray(x), np.asarray(y), label=name, color=colour, linewidth=1.4)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if logy else "linear")
    if all(float(value).is_integer() for x, _ in lines.values() for value in x):
        axes.xaxis.get_major_locator().set_params(integer=True)  # no tick between two steps
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False)
    return figure


def error_bars(
    rows: list[dict],
    *,
    key: str = "seeds",
    xlabel: str,
    ylabel: str,
    floor: float | None = None,
    alt: str = "",
) -> Figure:
    """Runs of an experiment, side by side: a dot for each seed, their mean and its spread.

    rows    each with a `label` and, under `key`, a number for each seed; the bar is one standard
            deviation of these to either side, left out for a single one
    floor   what the best possible run would reach, as a dashed line
    """
    figure = new_figure(
        2.8,
        alt or f"{ylabel} with error bars for {xlabel}: " + ", ".join(row["label"] for row in rows),
    )
    axes = figure.subplots()
    for x, row in enumerate(rows):
        values = np.asarray(row[key], dtype=float)
        spread = values.std(ddof=1) if len(values) > 1 else None
        axes.scatter(np.full(len(values), x + 0.12), values, s=12, color=PREDICTED)
        axes.errorbar(x, values.mean(), spread, fmt="o", color=KNOWN, capsize=4)
    width = max(8, 84 // max(1, len(rows)))  # characters that fit under a point
    parts = [row["label"].replace(": ", ":\n").split("\n") for row in rows]
    labels = ["\n".join(textwrap.fill(part, width) for part in lines) for lines in parts]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.5, len(rows) - 0.5))
    if floor is not None:
        axes.axhline(floor, color=TARGET, linestyle="--", linewidth=1, label="floor")
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def ranking(
    rows: dict[str, Sequence[float]],
    *,
    xlabel: str,
    series: Sequence[str] = ("",),
    floor: float | None = None,
    alt: str = "",
) -> Figure:
    """Named bars that lie, the first on top: one of each series in every row, its value behind it.

    floor   what the best possible would reach, as a dashed line
    """
    figure = new_figure(
        0.6 + 0.2 * len(rows) * (len(series) + 0.4),
        alt
        or f"{xlabel}: "
        + ", ".join(
            f"{name} {' and '.join(format(v, '.3g') for v in values)}"
            for name, values in rows.items()
        ),
    )
    axes = figure.subplots()
    thick = 0.8 / len(series)
    for i, (name, colour) in enumerate(zip(series, (KNOWN, PREDICTED, TARGET), strict=False)):
        values = [row[i] for row in rows.values()]
        places = np.arange(len(rows)) - 0.4 + thick * (i + 0.5)
        drawn = axes.barh(places, values, thick * 0.9, color=colour, label=name)
        axes.bar_label(drawn, [format(v, ".3g") for v in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(xlabel)
    if floor is not None:
        axes.axvline(floor, color=TARGET, linestyle="--", linewidth=1, label="floor")
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1 or floor is not None:
        figure.legend(frameon=False, loc="outside upper right", ncols=3, fontsize=8)
    return figure


def trade_off(
    lines: dict[str, Sequence[tuple[str, float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    error: float | None = None,
    floor: float | None = None,
    alt: str = "",
) -> Figure:
    """What is gained for what it costs: points (label, cost, gain), joined along each named line.

    The axis of the cost begins at 0.

    error  half the length of the bar on each point
    floor  what the best possible point would reach: a dashed line, and the axis begins at 0
    """
    figure = new_figure(
        3.2,
        alt
        or f"{ylabel} over {xlabel}: "
        + "; ".join(
            f"{name}: {', '.join(label for label, *_ in points)}" for name, points in lines.items()
        ),
    )
    axes = figure.subplots()
    for (name, points), colour in zip(
        lines.items(), (KNOWN, PREDICTED, TARGET, "#CC79A7"), strict=False
    ):
        labels, x, y = zip(*points, strict=True)
        axes.errorbar(
            x,
            y,
            error,
            fmt="o-",
            markersize=4,
            linewidth=1,
            elinewidth=0.8,
            alpha=0.9,
            color=colour,
            label=name,
        )
        for label, at, height in zip(labels, x, y, strict=True):
            axes.annotate(
                label,
                (at, height),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xlim(0, 1.12 * max(x for points in lines.values() for _, x, _ in points))
    if floor is not None:
        axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="floor")
        axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1 or floor is not None:
        axes.legend(frameon=False, fontsize=8)
    return figure


def planes(
    points: dict[str, Float[Tensor, "N 2"]],
    *,
    limit: float = 1.1,
    columns: int | None = None,
    density: Tensor | None = None,
    arrows: dict[str, Float[Tensor, "N 2"]] | None = None,
    size: float = 3,
    colour: str = PREDICTED,
    alt: str = "",
) -> Figure:
    """Points (x, y) in named panels of -limit to limit, over a density, with arrows from them.

    density  (H, W), the target under every panel, rows from bottom to top; or (P, H, W), one for
             each panel
    columns  panels in a row, all of them by default
    size     area of a dot
    colour   of the dots
    """
    columns = min(columns or len(points), len(points))
    rows, cell = -(-len(points) // columns), WIDTH / max(columns, 3)
    figure = new_figure(
        1.12 * cell * rows, alt or f"Points in the plane: {', '.join(points)}", width=cell * columns
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[len(points) :]:
        spare.axis("off")
    green = LinearSegmentedColormap.from_list("target", ["white", TARGET])
    for i, (ax, (name, xy)) in enumerate(zip(axes, points.items(), strict=False)):
        if density is not None:
            shade = (density[i] if density.ndim == 3 else density).cpu().numpy()
            ax.imshow(shade, cmap=green, origin="lower", extent=(-limit, limit) * 2)
        x, y = xy.detach().cpu().numpy().T
        if arrows and name in arrows:
            u, v = arrows[name].detach().cpu().numpy().T
            ax.quiver(x, y, u, v, color=KNOWN, angles="xy", width=0.008)
        else:
            alone = len(xy) <= 2
            ax.scatter(
                x,
                y,
                s=60 if alone else size,
                marker="X" if alone else "o",
                color=colour,
                alpha=1 if alone else 0.5,
                linewidths=0,
            )
        ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        ax.set_title(name, fontsize=9)
    return figure


def attention(
    image: Float[Tensor, "C H W"],
    mask: Bool[Tensor, " L"],
    asks: int,
    maps: dict[str, Float[Tensor, " N"]],
    height: int,
    width: int,
    *,
    alt: str = "",
) -> Figure:
    """Where one masked token looks: the picture as it is known, then a map for each name.

    asks    the place of the token that looks
    maps    weights that sum to 1, of the buffer tokens (drawn above the grid) and the L places
    """
    cell = WIDTH / max(len(maps) + 1, 4)
    buffers = len(next(iter(maps.values()))) - height * width
    above = -(-buffers // width)
    figure = new_figure(
        cell * (1 + above / height) + 0.3,
        alt or f"Attention weights of token {asks}: {', '.join(maps)}",
        width=cell * (len(maps) + 1),
    )
    first, *axes = figure.subplots(1, len(maps) + 1)
    patch = (image.shape[1] // height, image.shape[2] // width)
    hidden = mask.reshape(height, width).repeat_interleave(patch[0], 0)
    draw_image(first, torch.where(hidden.repeat_interleave(patch[1], 1), 0.85, image))
    outline(first, asks // width * patch[0], asks % width * patch[1], *patch, PREDICTED)
    first.set_title("orange asks", fontsize=9)
    top = max(float(weights.max()) for weights in maps.values())
    for ax, (name, weights) in zip(axes, maps.items(), strict=True):
        field = torch.full((above + height, width), torch.nan)
        field.view(-1)[:buffers] = weights[:buffers]
        field[above:] = weights[buffers:].reshape(height, width)
        ax.imshow(field.numpy(), cmap="cividis", vmin=0, vmax=top)
        for y, x in (~field.isnan()).nonzero().tolist():
            value = float(field[y, x])
            ax.text(
                x,
                y,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="black" if value > 0.6 * top else "white",
            )
        outline(ax, above + asks // width, asks % width, 1, 1, PREDICTED)
        for known in (~mask).nonzero().flatten().tolist():
            outline(ax, above + known // width, known % width, 1, 1, TARGET)
        ax.axhline(above - 0.5, color="white", linewidth=3)
        ax.set(xticks=[], yticks=[])
        ax.set_title(name, fontsize=9)
        ax.spines[:].set_visible(False)
    if above:
        axes[0].set_yticks([(above - 1) / 2], ["buffer"], rotation=90, va="center", fontsize=8)
        axes[0].tick_params(length=0, pad=1)
    return figure


def outline(axes, y: int, x: int, height: int, width: int, colour: str) -> None:
    """A frame around some fields or pixels of a picture, on white to stand out on any colour."""
    inside = 0.06 * width
    axes.add_patch(
        Rectangle(
            (x - 0.5 + inside, y - 0.5 + inside),
            width - 2 * inside,
            height - 2 * inside,
            fill=False,
            edgecolor=colour,
            linewidth=2,
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )
    )
