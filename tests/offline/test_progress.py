"""Progress: lines with the time left where there is no terminal, bars where there is one."""

import io

from rich.console import Console

from offline.progress import ProgressDisplay


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_file_gets_a_line_now_and_then_with_the_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    with ProgressDisplay(console=Console(file=out), clock=clock) as display:
        for done in range(1, 101):
            clock.now = 6.0 * done
            display.update("train", done, 100, f"loss {done}")
    lines = out.getvalue().splitlines()
    assert lines[0] == "loss 1: 1 of 100"
    assert lines[1] == "loss 6: 6 of 100, about 9.4 min left"
    assert lines[-1] == "loss 100: 100 of 100, about 0.0 min left"
    assert len(lines) == 21


def test_a_terminal_gets_one_bar_a_task() -> None:
    out = io.StringIO()
    with ProgressDisplay(console=Console(file=out, force_terminal=True, width=100)) as display:
        for task in ("first", "second"):
            for done in (1, 2):
                display.update(task, done, 2, f"{task} task")
    assert "first task" in out.getvalue()
    assert "second task" in out.getvalue()
    assert "2/2" in out.getvalue()


def test_quiet_is_quiet() -> None:
    for terminal in (True, False):
        out = io.StringIO()
        with ProgressDisplay(quiet=True, console=Console(file=out, force_terminal=terminal)) as display:
            display.update("train", 1, 1, "loss")
        assert out.getvalue() == ""
