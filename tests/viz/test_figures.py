"""Figures say in words what they show, and show what they are given."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mar_mini import MAR, masking
from mar_mini.checkpoints import Pipeline
from mar_mini.viz import figures as fig


def pixels(figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(fig.png(figure))).convert("RGB"))


def colours(figure) -> set[str]:
    flat = pixels(figure).reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*colour) for colour in np.unique(flat, axis=0)}


def test_states_have_the_colours_of_the_course():
    order = masking.spiral(4, 4, 1)
    first, second = (masking.mask_by_order(order, n)[0] for n in (12, 8))
    assert {fig.KNOWN, fig.MASKED} <= colours(fig.token_states([first], 4, 4))
    assert fig.PREDICTED not in colours(fig.token_states([first], 4, 4))
    assert {fig.KNOWN, fig.MASKED, fig.PREDICTED} <= colours(
        fig.token_states([first, second], 4, 4)
    )


def test_image_grid_shows_its_images_in_their_places():
    images = torch.stack([torch.full((3, 8, 8), v) for v in (0.0, 1.0)])
    shown = pixels(fig.image_grid(images, columns=2))
    height, width = shown.shape[:2]
    assert (shown[height // 2, width // 4] == 0).all()
    assert (shown[height // 2, 3 * width // 4] == 255).all()


@pytest.fixture(scope="module")
def frames():
    mar = MAR(
        img_size=16,
        vae_stride=1,
        patch_size=4,
        vae_embed_dim=1,
        class_num=10,
        encoder_embed_dim=16,
        encoder_depth=1,
        encoder_num_heads=2,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2,
        buffer_size=1,
        diffloss_d=1,
        diffloss_w=16,
    )
    pipeline = Pipeline(mar, clip=1.0, classes=[str(i) for i in range(10)])
    arguments = {"num_iter": 16, "num_sampling_steps": 2}
    return list(pipeline.sample([3, 4], generator=torch.Generator().manual_seed(0), **arguments))


def test_every_figure_has_alternative_text_and_is_small(frames):
    order = {"spiral": masking.spiral(8, 8, 1)}
    figures = [
        fig.filmstrip(frames),
        fig.image_grid(frames[-1].images().repeat(20, 1, 1, 1), titles=["cat"] * 40),
        fig.order_maps(order, 8, 8),
        fig.token_states([torch.ones(16, dtype=torch.bool)], 4, 4),
        fig.bars({"steps": [1, 2, 3]}, xlabel="step", ylabel="tokens"),
        fig.breakdown({"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}, xlabel="bytes"),
        fig.curves({"loss": ([1, 2], [3, 4])}, xlabel="step", ylabel="loss"),
        fig.error_bars([{"label": "patch 4", "seeds": [1, 2]}], xlabel="size", ylabel="distance"),
        fig.ranking({"real": [1.0], "samples": [3.0]}, xlabel="distance"),
        fig.trade_off({"steps": [("10", 1.0, 2.0)]}, xlabel="seconds", ylabel="distance"),
    ]
    for figure in figures:
        assert len(figure.get_label()) > 10
        image = fig.png(figure)
        assert len(image) < 80 * 1024
        assert pixels(figure).shape[1] <= 700


def test_filmstrip_keeps_the_first_and_the_last_frame(frames):
    titles = [ax.get_title() for ax in fig.filmstrip(frames, columns=5).axes]
    steps = [title for title in titles if title]
    assert steps[0] == "step 1" and steps[-1] == "step 16" and len(steps) == 5
    few = [ax.get_title() for ax in fig.filmstrip(frames[:3], columns=8).axes]
    assert [title for title in few if title] == ["step 1", "step 2", "step 3"]


def test_parts_of_a_bar_follow_each_other():
    rows = {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}
    bars = fig.breakdown(rows, xlabel="bytes").axes[0].patches
    placed = [(bar.get_x(), bar.get_width()) for bar in bars]
    assert placed == [(0.0, 1.0), (0.0, 0.0), (1.0, 2.0), (0.0, 3.0)]  # x of a and b, y of a and b


def test_a_logarithmic_axis_has_dots_as_it_has_no_zero_for_bars():
    (axes,) = fig.breakdown({"a": {"": 10.0}, "b": {"": 1e6}}, xlabel="FLOPs", log=True).axes
    (dots,) = axes.lines
    assert not axes.patches and dots.get_marker() == "o"
    assert list(dots.get_xdata()) == [10.0, 1e6] and axes.get_xscale() == "log"


def test_whole_steps_have_no_tick_between_two():
    whole = fig.curves({"loss": (range(1, 19), range(18))}, xlabel="step", ylabel="loss").axes[0]
    parts = fig.curves({"loss": ([0.5, 9, 18], [1, 2, 3])}, xlabel="t", ylabel="loss").axes[0]
    assert all(tick == int(tick) for tick in whole.get_xticks())
    assert any(tick != int(tick) for tick in parts.get_xticks())


def test_error_bars_show_mean_and_spread_of_the_seeds():
    rows = [{"label": "one", "seeds": [1.0, 3.0]}, {"label": "two", "seeds": [5.0]}]
    (axes,) = fig.error_bars(rows, xlabel="runs", ylabel="distance", floor=0.5).axes
    ((bar,), none) = ([lines.get_segments()[0] for lines in c[2]] for c in axes.containers)
    assert np.allclose(bar[:, 1], [2 - 2**0.5, 2 + 2**0.5]) and not none
    assert [c[0].get_ydata()[0] for c in axes.containers] == [2, 5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "two"]
    assert fig.TARGET in colours(axes.figure)


def test_a_ranking_has_a_bar_for_each_series_of_a_row_and_the_first_on_top():
    rows = {"cat": [0.5, 0.75], "dog": [0.25, 1.0]}
    figure = fig.ranking(rows, xlabel="share", series=("real", "samples"), floor=0.1)
    (axes,) = figure.axes
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [
        [0.5, 0.25],
        [0.75, 1.0],
    ]
    assert axes.yaxis_inverted() and [t.get_text() for t in axes.get_yticklabels()] == list(rows)
    assert [text.get_text() for text in axes.texts] == ["0.5", "0.25", "0.75", "1"]
    assert [t.get_text() for t in figure.legends[0].texts] == ["floor", "real", "samples"]
    assert figure.get_label() == "share: cat 0.5 and 0.75, dog 0.25 and 1"


def test_rows_of_a_grid_have_their_names_beside_them():
    figure = fig.image_grid(torch.rand(6, 3, 8, 8), columns=3, row_titles=["few", "many"])
    assert [ax.get_ylabel() for ax in figure.axes] == ["few", "", "", "many", "", ""]
    assert "few, many" in figure.get_label() and pixels(figure).shape[1] <= 700


def test_a_trade_off_shows_each_point_its_bar_and_the_floor():
    lines = {"a": [("few", 1.0, 9.0), ("many", 2.0, 5.0)], "b": [("other", 1.5, 7.0)]}
    figure = fig.trade_off(lines, xlabel="seconds", ylabel="distance", error=2.0, floor=1.0)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["few", "many", "other"]
    first, second = axes.containers
    assert first[0].get_xydata().tolist() == [[1, 9], [2, 5]]
    assert second[2][0].get_segments()[0][:, 1].tolist() == [5, 9]
    assert axes.get_ylim()[0] == 0 and [1, 1] in [list(x.get_ydata()) for x in axes.lines]
    assert "few, many; b: other" in figure.get_label()


def test_save_figure_leaves_the_old_file_if_drawing_fails(tmp_path, monkeypatch):
    path = fig.save_figure(fig.new_figure(1, "an empty figure"), tmp_path / "a.png")
    before = path.read_bytes()
    monkeypatch.setattr(fig, "png", lambda figure: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fig.save_figure(fig.new_figure(2, "another"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_attention_shows_who_asks_what_is_known_and_the_heaviest_weight():
    mask = masking.mask_by_order(masking.spiral(4, 4, 1), 8)[0]
    weights = torch.zeros(18)
    weights[0] = 1.0  # a buffer token gets all
    figure = fig.attention(torch.zeros(1, 16, 16), mask, 6, {"block 1": weights}, 4, 4)
    assert {fig.PREDICTED, fig.TARGET, fig.MASKED} <= colours(figure)
    assert [text.get_text() for text in figure.axes[1].texts] == ["100"] + ["0"] * 17
    assert figure.get_label() == "Attention weights of token 6: block 1"
