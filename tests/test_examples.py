"""What users see first runs as it stands: the examples, the README, the pages of the docs."""

from __future__ import annotations

import ast
import re
import runpy
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from programs import ROOT, Programs

EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "cartpole.py"
PROCESSES = EXAMPLES / "process_actors.py"
RAY = EXAMPLES / "ray_actors.py"
MONARCH = EXAMPLES / "monarch_actors.py"
TRAINING = EXAMPLES / "train_cartpole.py"
SHORTEST = ["shortest_asyncio.py", "shortest_threads.py"]

REQUIRED_PAGES = ["README.md", "docs/quickstart.md"]
unix_only = pytest.mark.skipif(sys.platform == "win32", reason="processes need Unix sockets")
Run = Callable[..., CompletedProcess[str]]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# -- what the tests are written in --------------------------------------------


@pytest.fixture(scope="session")
def run(programs: Programs) -> Run:
    """Run a program as a user would, with every warning an error, and wait for it."""
    return lambda *command: programs.start(*command).result()


def succeeded(result: CompletedProcess[str]) -> str:
    """Return what a child process printed; fail with all of it if it failed."""
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, each moved down to the line where it stands."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match[1]
        for match in PYTHON_BLOCK.finditer(text)
    ]


def pages() -> list[str]:
    """The required pages, and every other one with a Python block."""
    others = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if blocks(path)]
    return list(dict.fromkeys(REQUIRED_PAGES + others))


def without_docstring(example: Path) -> str:
    """The code of an example, without the docstring at its top."""
    source = example.read_text(encoding="utf-8")
    docstring = ast.parse(source).body[0]
    assert docstring.end_lineno is not None
    return "\n".join(source.splitlines()[docstring.end_lineno :]).strip()


def column(table: str, row: str, number: int = 0) -> float:
    """A number of the demo's table, by the name of its row."""
    (numbers,) = [line[24:] for line in table.splitlines() if line[:24].strip() == row]
    return float(numbers.split()[number].replace(",", ""))


def accounts_for(table: str, rows: int) -> None:
    """Check that a table's figures of the server agree with each other and the rows sent."""
    batches = column(table, "batches")
    assert batches * column(table, "mean batch, rows") == pytest.approx(rows, rel=0.05)
    reasons = table.split("why batches left\n")[1].split("times, ms")[0].splitlines()
    assert sum(int(line.split()[-1].replace(",", "")) for line in reasons) == batches
    for name in ("queue wait", "forward", "latency"):
        assert 0 <= column(table, name, 0) <= column(table, name, 1) <= column(table, name, 2)


@pytest.fixture(scope="session")
def interrupted(programs: Programs) -> Run:
    """Run a program in a terminal's stead; press Ctrl-C once stderr holds the pattern `after`."""

    def run(*command: str | Path, after: str) -> CompletedProcess[str]:
        program = programs.start(*command, strict=False)
        try:
            seen = ""
            while not re.search(after, seen):
                character = program.stderr.read(1)
                assert character, f"ended before {after!r}:\n{seen}"
                seen += character
            program.kill(signal.SIGINT)  # Ctrl-C goes to every process of the terminal
        except BaseException:
            program.kill()
            program.result()
            raise
        return program.result()

    return run


def stopped(result: CompletedProcess[str]) -> None:
    """Check that Ctrl-C ended a program with one word and no traceback."""
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "stopped"


# -- the examples -------------------------------------------------------------


def test_every_example_is_run_here() -> None:
    """No example goes without a test in this file."""
    run_here = [DEMO, MONARCH, PROCESSES, RAY, TRAINING, *(EXAMPLES / name for name in SHORTEST)]
    assert sorted(EXAMPLES.glob("*.py")) == sorted(run_here)


@pytest.mark.parametrize("name", SHORTEST)
def test_a_shortest_program_runs(name: str, run: Run) -> None:
    """Each shortest program ends well and reports a reply for each of its actors."""
    assert "32 replies from" in succeeded(run(EXAMPLES / name))


@pytest.mark.xdist_group("ray")
def test_ray_actors_are_served(run: Run) -> None:
    """The example starts Ray, and every step of every environment was served."""
    said = succeeded(run(RAY, "--actors", "2", "--envs", "3", "--steps", "20"))
    assert "120 steps in" in said
    assert "replica 0: 40 requests, 120 rows in" in said


@pytest.mark.parametrize("name", SHORTEST)
def test_a_shortest_program_is_short(name: str) -> None:
    """Each shortest program has fewer than 40 lines."""
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.parametrize("mode", [[], ["--threads"]], ids=["asyncio", "threads"])
def test_the_demo_reports_what_it_ran(mode: list[str], run: Run) -> None:
    """The demo's table accounts for every step of every actor, and for every batch."""
    out = succeeded(run(DEMO, "--steps", "20", "--actors", "4", "--hidden", "8", *mode))
    own = column(out, "every actor on its own")
    served = column(out, "served")
    assert own > 0
    assert column(out, "served / on its own") == pytest.approx(served / own, abs=0.02)
    accounts_for(out, rows=4 * 20)


def test_the_demo_holds_batches_to_their_limit(run: Run) -> None:
    """--max-batch-size 1 makes a forward of every step."""
    out = succeeded(run(DEMO, "--steps", "5", "--actors", "3", "--max-batch-size", "1"))
    assert column(out, "batches") == 15
    assert column(out, "mean batch, rows") == 1


@pytest.mark.parametrize("option", ["--actors", "--steps", "--hidden", "--max-batch-size"])
def test_the_demo_refuses_a_count_below_one(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A count of zero is refused in words that name the option."""
    main = runpy.run_path(str(DEMO))["main"]
    with pytest.raises(SystemExit) as end:
        main([option, "0"])
    assert end.value.code == 2
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send on Windows")
@pytest.mark.parametrize("phase", ["on its own", "served"])
@pytest.mark.parametrize("mode", [[], ["--threads"]], ids=["asyncio", "threads"])
def test_ctrl_c_ends_the_demo_cleanly(mode: list[str], phase: str, interrupted: Run) -> None:
    """Ctrl-C, in either phase, ends the demo with one word and no traceback."""
    # With batches of one row the served phase is the slow one, so it cannot end before the
    # signal is there.
    options = ["--actors", "4", "--steps", "4000", "--max-batch-size", "1", *mode]
    # Not at the bar's first sight: that is from inside tqdm, which does not like to be
    # interrupted half-made.
    stopped(interrupted(DEMO, *options, after=rf"{phase}: +[1-9]"))


@unix_only
def test_actors_in_processes_report_what_they_did(run: Run) -> None:
    """The table accounts for a request per step of each process, and a row per environment."""
    out = succeeded(run(PROCESSES, "--processes", "2", "--envs", "3", "--steps", "12"))
    assert column(out, "requests") == 2 * 12
    assert column(out, "steps/s") > 0
    accounts_for(out, rows=2 * 3 * 12)


@unix_only
def test_actors_in_processes_play_atari(run: Run) -> None:
    """With --env, the processes play Pong from pixels."""
    options = ["--env", "ALE/Pong-v5", "--processes", "2", "--envs", "2", "--steps", "3"]
    out = succeeded(run(PROCESSES, *options))
    assert column(out, "requests") == 2 * 3
    accounts_for(out, rows=2 * 2 * 3)


@unix_only
def test_ctrl_c_ends_actors_in_processes_cleanly(interrupted: Run) -> None:
    """Ctrl-C ends the program, its actors and its server with one word and no traceback."""
    options = ["--processes", "2", "--envs", "1", "--steps", "1000000"]
    stopped(interrupted(PROCESSES, *options, after=r" [1-9][0-9.]*k/"))


@pytest.mark.skipif(find_spec("monarch") is None, reason="there is no Monarch for every platform")
def test_the_monarch_actors_see_new_weights(run: Run) -> None:
    """The table has a line per actor with its steps, and versions that went up while it ran."""
    options = ["--actors", "2", "--environments", "2", "--steps", "150", "--replicas", "2"]
    out = succeeded(run(MONARCH, *options, "--update-every", "0.01"))
    lines = [line.split() for line in out.splitlines()[1:3]]
    assert [line[1] for line in lines] == ["300", "300"]
    assert all(int(line[-1]) > 0 for line in lines)
    assert "600 steps in" in out
    assert "replica 0: " in out


@unix_only
@pytest.mark.parametrize("mode", [[], ["--processes", "2"]], ids=["asyncio", "processes"])
def test_training_serves_every_update(mode: list[str], tmp_path: Path, run: Run) -> None:
    """Each update is served under a version of its own, learns from fresh steps, and is plotted."""
    picture = tmp_path / "new" / "plot.png"
    out = succeeded(run(TRAINING, "--updates", "3", "--plot", picture, *mode))
    assert column(out, "end", 1) == column(out, "policy version") == 3
    assert column(out, "end", 2) >= 3 * 32 * 32
    limit = runpy.run_path(str(TRAINING))["MAX_STALENESS"]
    assert 0 <= column(out, "mean staleness") <= column(out, "largest staleness") <= limit
    assert picture.read_bytes().startswith(b"\x89PNG")


@unix_only
@pytest.mark.parametrize("mode", [[], ["--processes", "2"]], ids=["asyncio", "processes"])
def test_ctrl_c_ends_training_cleanly(mode: list[str], interrupted: Run) -> None:
    """Ctrl-C ends the learner, its actors and the server with one word and no traceback."""
    stopped(interrupted(TRAINING, "--updates", "100000", *mode, after="version 2"))


# -- the pages ----------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, run: Run) -> None:
    """The Python blocks of a page run from top to bottom, as they stand."""
    path = ROOT / page
    assert path.exists(), f"{page} is missing"
    sources = blocks(path)
    assert sources, f"{page} has no Python block"
    runner = tmp_path / "run_blocks.py"
    runner.write_text(
        "namespace = {'__name__': '__main__'}\n"
        f"for source in {sources!r}:\n"
        f"    exec(compile(source, {page!r}, 'exec', dont_inherit=True), namespace)\n",
        encoding="utf-8",
    )
    succeeded(run(runner))


@pytest.mark.parametrize("name", SHORTEST)
def test_the_readme_shows_the_shortest_programs(name: str) -> None:
    """The README shows each shortest program word for word, without its docstring."""
    shown = [block.strip() for block in blocks(ROOT / "README.md")]
    assert without_docstring(EXAMPLES / name) in shown


def test_the_links_of_the_readme_lead_somewhere() -> None:
    """Every relative link of the README is a file of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
