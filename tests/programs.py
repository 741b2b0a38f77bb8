"""Programs that tests run as a user would, each in a process of its own.

Importing torch takes most of the time of a short program, so one process imports it once and is
forked for each program. What else a program imports, and how it ends, is its own business: a
program that was forked here ends as the interpreter ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 100


class Programs:
    """Starts programs, one after the other."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair()
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._answers = self._link.makefile()

    def start(self, script: str | Path, *arguments: str | Path, strict: bool = True) -> Program:
        """Start a script; to be awaited before the next one is started.

        Args:
            script: its path, from the root of the repository.
            arguments: those of its command line.
            strict: whether every warning is an error.
        """
        outs = [os.pipe() for _ in range(2)]
        request = {"argv": [str(ROOT / script), *map(str, arguments)], "strict": strict}
        try:
            message = f"{json.dumps(request)}\n".encode()
            socket.send_fds(self._link, [message], [theirs for _, theirs in outs])
        finally:
            for _, theirs in outs:
                os.close(theirs)
        return Program(int(self._answers.readline()), *(ours for ours, _ in outs), self._answers)

    def close(self) -> None:
        """End the process that is forked."""
        self._answers.close()
        self._link.close()
        self._process.wait()


class Program:
    """A program that was started; the first of a group of processes, as in a terminal."""

    def __init__(self, pid: int, stdout: int, stderr: int, end: Any) -> None:
        self.pid = pid
        self.stdout, self.stderr = (os.fdopen(each, buffering=1) for each in (stdout, stderr))
        self._end = end

    def result(self, timeout: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the program, and of every process that has inherited its output."""
        with self.stdout, self.stderr, ThreadPoolExecutor(2) as pool:
            rest: list[Future[str]] = [pool.submit(o.read) for o in (self.stdout, self.stderr)]
            try:
                out, err = (each.result(timeout) for each in rest)
            except TimeoutError:
                self.kill()
                out, err = (each.result() for each in rest)
                raise AssertionError(f"did not end within {timeout} s\n{out}\n{err}") from None
            finally:
                code = int(self._end.readline())
        return subprocess.CompletedProcess([], code, out, err)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, how)


def _serve(link: socket.socket) -> dict[str, Any]:
    """Fork for each request; return it, in the process that is to run it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import aioinfer  # noqa: F401
    gc.freeze()
    while message := socket.recv_fds(link, 1 << 16, 2)[:2]:
        text, outs = message
        if not text:
            break
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            link.close()
            for number, out in enumerate(outs, 1):
                os.dup2(out, number)
                os.close(out)
            request: dict[str, Any] = json.loads(text)
            return request
        for out in outs:
            os.close(out)
        with contextlib.suppress(PermissionError):  # it was quicker, and runs
            os.setpgid(pid, pid)
        link.sendall(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        link.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    sys.exit()


def _main_of(argv: Sequence[str], strict: bool) -> tuple[Any, dict[str, Any]]:
    """The code and the namespace of a program, which is the main one from now on."""
    if strict:
        warnings.simplefilter("error")
        sys.warnoptions.append("error")  # for the processes that it starts
    sys.argv[:] = argv
    sys.path[0] = os.path.dirname(argv[0])
    # Under its second name, what other processes of the program have pickled is looked for.
    main = sys.modules["__main__"] = sys.modules["__mp_main__"] = types.ModuleType("__main__")
    main.__file__ = argv[0]
    source = Path(argv[0]).read_text(encoding="utf-8")
    return compile(source, argv[0], "exec", dont_inherit=True), vars(main)


if __name__ == "__main__":
    exec(*_main_of(**_serve(socket.socket(fileno=int(sys.argv[1])))))
