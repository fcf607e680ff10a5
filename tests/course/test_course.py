"""Running the course, and lending chapters to a learner without writing over their work."""

import base64
import errno
import io
import os
import signal
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mar_mini.course import chapters as course

DRAW = """
import base64, os
from IPython.display import Image, display
display(Image(data=base64.b64decode(%r), format="png"))
print(os.environ["MAR_MINI_STRICT"], os.path.basename(os.getcwd()))
"""


WAIT = """
import os, time
while not os.path.exists('{}'):
    time.sleep(0.1)
"""


def picture(content):
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + content).decode()


def write_chapter(repo, stem, *cells):
    """A solved chapter of cells (source, tags)."""
    notebook = new_notebook(
        cells=[
            new_code_cell(source, id=f"{stem}-{index:03d}", metadata={"tags": tags})
            for index, (source, tags) in enumerate(cells)
        ]
    )
    nbformat.write(notebook, repo / "notebooks" / "solutions" / f"{stem}.ipynb")


@pytest.fixture
def repo(tmp_path):
    """A repository with three chapters; 01 draws a sample grid, 02 fails, 03 must not run."""
    sources = {
        "01_draw": [(DRAW % picture(b"grid"), ["sample-grid"]), (DRAW % picture(b"other"), [])],
        "02_fail": [("fine = 1", []), ("fine / 0", []), ("print('not reached')", [])],
        "03_after": [("1", [])],
    }
    (tmp_path / "notebooks" / "solutions").mkdir(parents=True)
    for stem, cells in sources.items():
        write_chapter(tmp_path, stem, *cells)
        (tmp_path / "notebooks" / f"{stem}.ipynb").write_text(f"fresh {stem}")
    return tmp_path


def test_run_course_stops_at_a_chapter_that_fails(repo, monkeypatch):
    monkeypatch.setattr(course, "AT_ONCE", 1)
    monkeypatch.setitem(course.BUDGETS, "01", 0)
    build = repo / "build"
    runs = course.run_course(repo, build)
    seen = [next(runs) for _ in range(4)]
    with pytest.raises(course.CourseFailed, match="02_fail: cell 1 .*ZeroDivisionError"):
        next(runs)
    assert [(run.stem, run.finished) for run in seen] == [
        ("01_draw", False),
        ("01_draw", True),
        ("02_fail", False),
        ("02_fail", True),
    ]
    done, failed = seen[1], seen[3]
    assert done.error is None and done.seconds > 0 and done.over_budget
    assert failed.error == "cell 1 (02_fail-001): ZeroDivisionError: division by zero"
    assert failed.budget == course.BUDGETS["02"] and not failed.over_budget
    assert (build / "samples.png").read_bytes() == base64.b64decode(picture(b"grid"))
    outputs = nbformat.read(build / "course" / "01_draw.ipynb", as_version=4).cells[0].outputs
    assert outputs[1].text == "1 solutions\n"
    assert nbformat.read(failed.path, as_version=4).cells[1].outputs[0].ename == "ZeroDivisionError"
    assert not (build / "course" / "03_after.ipynb").exists()


@pytest.mark.parametrize(
    "usable, order, until, threads",
    [
        (1, "01 - 02 - 03 -", "01_draw", "None"),
        (6, "01 02 - 03 - -", "03_after", "3"),  # 02 starts before 01 has ended, and ends after 03
    ],
)
def test_two_chapters_run_at_once_where_there_are_cores(
    repo, monkeypatch, usable, order, until, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(course, "cores", lambda: usable)
    write_chapter(repo, "02_fail", (WAIT.format(repo / "b" / "course" / f"{until}.ipynb"), []))
    write_chapter(repo, "03_after", ("import os; print(os.environ.get('OMP_NUM_THREADS'))", []))
    seen = ["-" if run.finished else run.stem[:2] for run in course.run_course(repo, repo / "b")]
    assert " ".join(seen) == order
    outputs = nbformat.read(repo / "b" / "course" / "03_after.ipynb", 4).cells[0].outputs
    assert outputs[0].text == f"{threads}\n"


def test_the_picture_is_that_of_the_last_chapter_and_not_of_the_slowest(repo, monkeypatch):
    monkeypatch.setattr(course, "cores", lambda: 2)
    write_chapter(repo, "02_fail", (DRAW % picture(b"quick"), ["sample-grid"]))
    slow = WAIT.format(repo / "build" / "course" / "02_fail.ipynb") + DRAW % picture(b"slow")
    write_chapter(repo, "01_draw", (slow, ["sample-grid"]))
    ended = [run.stem for run in course.run_course(repo, repo / "build") if run.finished]
    assert ended.index("02_fail") < ended.index("01_draw")
    assert (repo / "build/samples.png").read_bytes() == base64.b64decode(picture(b"quick"))


@pytest.mark.parametrize(
    "last, error",
    [
        ("1 / 0", course.CourseFailed),
        ("import signal; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)", KeyboardInterrupt),
    ],
)
def test_a_failure_and_ctrl_c_end_both_kernels(repo, request, monkeypatch, capfd, last, error):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(course, "cores", lambda: 2)
    pid = repo / "pid"
    note = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()))"
    write_chapter(repo, "01_draw", (note, []), ("while True: time.sleep(1)", []))
    write_chapter(repo, "02_fail", (WAIT.format(pid) + "time.sleep(1)\n" + last, []))
    with pytest.raises(error):
        list(course.run_course(repo, repo / "build"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert capfd.readouterr().err == ""
    assert not (repo / "build" / "course" / "01_draw.ipynb").exists()  # a whole one may stand there


def test_the_command_says_how_long_each_took_and_what_stopped(repo, monkeypatch, capsys):
    monkeypatch.setattr(course, "repository", lambda: repo)
    monkeypatch.setitem(course.BUDGETS, "01", 0.01)
    assert course.course(("3", "01_draw")) == 0
    said = capsys.readouterr().out
    assert "01_draw          running ...\n" in said and "03_after" in said
    assert " s (budget 0.01 s)  over budget\n" in said and said.count("over budget") == 1
    assert str(repo / "build" / "samples.png") in said and "02_fail" not in said
    assert course.course(("02",)) == 1
    assert "The course stopped: 02_fail: cell 1" in capsys.readouterr().err


def test_run_course_knows_its_chapters(repo):
    with pytest.raises(ValueError, match="no chapter '07'; there are: 01_draw, 02_fail, 03_after"):
        next(course.run_course(repo, repo / "build", ["07"]))
    assert next(course.run_course(repo, repo / "build", ["3"])).stem == "03_after"
    with pytest.raises(FileNotFoundError, match="no chapters in .*build_notebooks"):
        next(course.run_course(repo / "build", repo / "build"))


def test_within_their_budgets_two_chapters_at_once_take_ten_minutes_at_most():
    assert list(course.BUDGETS) == [f"{number:02d}" for number in range(11)]
    free = [0] * course.AT_ONCE  # when each core is
    for seconds in course.BUDGETS.values():
        free[free.index(min(free))] += seconds
    assert max(free) <= 600


def test_copy_fills_up_my_and_never_writes_over_a_file(repo):
    my = repo / "my"
    my.mkdir()
    (my / "02_fail.ipynb").write_text("the learner's")
    assert course.copy_to_my(repo) == [my / "01_draw.ipynb", my / "03_after.ipynb"]
    assert (my / "01_draw.ipynb").read_text() == "fresh 01_draw"
    (my / "01_draw.ipynb").write_text("worked on")
    assert course.copy_to_my(repo) == []
    assert (my / "01_draw.ipynb").read_text() == "worked on"
    assert (my / "02_fail.ipynb").read_text() == "the learner's"
    assert len(list(my.iterdir())) == 3  # nothing is left of the copying


def test_a_file_that_appears_while_copying_is_kept(repo, monkeypatch):
    """Somebody saves under the name just before the copy is opened."""
    target = repo / "my" / "01_draw.ipynb"

    def save_then_open(path, mode):
        if path == target:
            target.write_text("the learner's")
        return open(path, mode)

    monkeypatch.setattr(course, "open", save_then_open, raising=False)
    assert target not in course.copy_to_my(repo)
    assert target.read_text() == "the learner's"
    assert (repo / "my" / "02_fail.ipynb").read_text() == "fresh 02_fail"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "disk full")])
@pytest.mark.parametrize("when", ["write", "close"])
def test_an_interrupted_copy_leaves_no_half_file(repo, monkeypatch, error, when):
    class Half(io.FileIO):
        def write(self, content):
            super().write(content[:5])
            if when == "write":
                raise error

        def close(self):
            super().close()
            assert Path(self.name).read_bytes() == b"fresh"
            if when == "close":
                raise error

    monkeypatch.setattr(course, "open", Half, raising=False)
    with pytest.raises((KeyboardInterrupt, OSError)):
        course.copy_to_my(repo)
    assert list((repo / "my").iterdir()) == []


def test_a_link_to_nowhere_is_somebodys_file_too(repo):
    my = repo / "my"
    my.mkdir()
    for name in ("01_draw.ipynb", "01_draw.before-reset-1.ipynb"):
        (my / name).symlink_to(repo / "gone")
    assert my / "01_draw.ipynb" not in course.copy_to_my(repo)
    old, fresh = course.reset_chapter(repo, "01")
    assert old == my / "01_draw.before-reset-2.ipynb" and old.is_symlink()
    assert fresh.read_text() == "fresh 01_draw" and not (repo / "gone").exists()


def test_a_notebook_that_comes_back_during_a_reset_is_kept(repo, monkeypatch):
    course.copy_to_my(repo)
    fresh, replace = repo / "my" / "02_fail.ipynb", os.replace

    def save_again(*paths):
        replace(*paths)
        fresh.write_text("saved again")

    fresh.write_text("the learner's")
    monkeypatch.setattr(os, "replace", save_again)
    with pytest.raises(FileExistsError, match="came back while it was reset; close it and"):
        course.reset_chapter(repo, "02")
    assert fresh.read_text() == "saved again"
    assert (fresh.parent / "02_fail.before-reset-1.ipynb").read_text() == "the learner's"


def test_reset_keeps_every_old_notebook(repo):
    my = repo / "my"
    fresh = my / "02_fail.ipynb"
    assert course.reset_chapter(repo, "02") == (None, fresh)  # was not there: a plain copy
    backups = []
    for number, text in enumerate(["first try", "second try"], 1):
        fresh.write_text(text)
        old, new = course.reset_chapter(repo, "02_fail")
        assert (old, new) == (my / f"02_fail.before-reset-{number}.ipynb", fresh)
        assert new.read_text() == "fresh 02_fail"
        backups.append(old)
    assert [backup.read_text() for backup in backups] == ["first try", "second try"]
    backups[0].unlink()
    assert course.reset_chapter(repo, "2")[0] == backups[0]  # the first number that is free
    assert backups[1].read_text() == "second try"
    with pytest.raises(ValueError, match="no chapter '20'; there are: 01_draw"):
        course.reset_chapter(repo, "20")


def test_a_reset_that_cannot_move_the_old_notebook_changes_nothing(repo, monkeypatch):
    course.copy_to_my(repo)
    fresh = repo / "my" / "02_fail.ipynb"
    fresh.write_text("the learner's")

    def refuse(*paths):
        raise PermissionError("open in another program")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        course.reset_chapter(repo, "02")
    assert fresh.read_text() == "the learner's"
    assert len(list(fresh.parent.iterdir())) == 3


def test_the_lab_opens_on_my_and_outlives_ctrl_c(repo, monkeypatch):
    started = []

    class Lab:
        def __init__(self, command, cwd, env):
            started.append((command, cwd, env))
            self.answers = [KeyboardInterrupt, 7]

        def wait(self):
            answer = self.answers.pop(0)
            if answer is KeyboardInterrupt:
                raise answer
            return answer

    monkeypatch.setattr(subprocess, "Popen", Lab)
    monkeypatch.setattr(course, "repository", lambda: repo)
    assert course.lab(("--no-browser",)) == 7
    ((command, cwd, environment),) = started
    assert command[1:] == ["-m", "jupyterlab", "--notebook-dir", str(repo / "my"), "--no-browser"]
    assert cwd == repo and (repo / "my" / "01_draw.ipynb").exists()
    settings = Path(environment["JUPYTER_CONFIG_PATH"].split(os.pathsep)[0]) / "labconfig"
    assert "fetchNews" in (settings / "default_setting_overrides.json").read_text()
