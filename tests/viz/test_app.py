"""The page of the widgets, up to where Voila takes over."""

from pathlib import Path

import nbformat

from mar_mini.viz import app


def test_voila_gets_the_page_and_the_options(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(app, "run_jupyter", lambda *arguments: started.append(arguments) or 7)
    monkeypatch.chdir(tmp_path)
    assert app.app(("--no-browser",), ip="0.0.0.0", port=8877, theme="dark") == 7
    assert app.app(token=False) == 7
    (command, folder), (without_token, _) = started
    page = Path(command[1])
    assert page.is_absolute() and page == folder / "app.ipynb"  # Voila is started in that folder
    assert "GenerationTheatre" in nbformat.read(page, as_version=4).cells[5].source
    assert command[0] == "voila"
    wanted = {"--template=mar_mini", "--Voila.ip=0.0.0.0", "--port=8877", "--theme=dark"}
    assert wanted | {"--token", "--no-browser"} <= set(command)
    assert "--token" not in without_token and "--Voila.ip=127.0.0.1" in without_token
