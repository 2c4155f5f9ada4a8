"""`SGLangServer` with a fake in the place of SGLang."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from miles.errors import EngineDiedError, EngineError, SettingError
from miles.rollout import SamplingParams, SGLangEngine, SGLangServer
from tests.rollout.test_sglang_engine import until

ROOT = Path(__file__).parents[2]
FAKE = "tests.rollout.sglang_fake"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """A folder of temporary files for each test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def server(*args: str, **settings) -> SGLangServer:
    settings = {"module": FAKE, "start_timeout": 40.0, "stop_timeout": 5.0} | settings
    return SGLangServer("some/model", args=args, **settings)


def run(code: str, temporary: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not runs(pid)


def test_it_serves_and_is_gone_afterwards(tmp_path):
    lines: list[str] = []
    log = tmp_path / "deep" / "server.log"
    with server("--weight-version", "4", log=log, on_line=lines.append) as started:
        assert started.alive and os.getpgid(started.pid) == started.pid
        with contextlib.closing(SGLangEngine(started.url)) as engine:
            sample = asyncio.run(engine.generate([3, 4], SamplingParams(max_new_tokens=4)))
        assert sample.weight_versions == [4]
        started.check()
        assert started.start() is started
    assert gone(started.pid) and not started.alive
    assert lines[0] == "serving some/model" and f"listening on {started.url}" in lines
    assert log.read_text().splitlines() == lines


def test_it_can_be_started_again_and_leaves_no_temporary_log_behind(temporary):
    one = server()
    with one:
        first = one.pid
        assert one.log.is_relative_to(temporary) and one.log.stat().st_size
    assert not list(temporary.iterdir())
    with one:
        assert one.pid != first and one.alive
    assert not list(temporary.iterdir())
    one.check()  # it did not end by itself


def test_the_log_of_a_server_that_died_or_of_a_block_that_failed_stays():
    died = pytest.warns(UserWarning, match="had ended before it was stopped; its log is")
    with died as warned, server() as started:
        os.kill(started.pid, signal.SIGKILL)
        until(lambda: not started.alive)
    assert str(started.log) in str(warned[0].message) and "serving" in started.log.read_text()
    with pytest.raises(ZeroDivisionError) as caught, server() as started:
        raise ZeroDivisionError
    assert str(started.log) in caught.value.__notes__[0] and "serving" in started.log.read_text()
    assert gone(started.pid)


def test_a_death_before_the_first_answer_shows_the_log(recwarn):
    broken = server("--die-after", "0.1")
    with pytest.raises(EngineDiedError, match="exit code 3") as caught:
        broken.start()
    assert "no memory is left" in str(caught.value) and str(broken.log) in str(caught.value)
    broken.stop()
    assert not broken.alive and "no memory is left" in broken.log.read_text()
    missing = server(module="no_such_module_at_all")
    with pytest.raises(EngineDiedError, match="no_such_module_at_all"):
        missing.start()
    assert not recwarn.list


def test_a_start_that_takes_too_long_is_ended():
    slow = server(module="tests.rollout.sglang_asleep", start_timeout=1.5)
    with pytest.raises(EngineError, match="did not answer /server_info within") as caught:
        slow.start()
    assert "serving some/model" in str(caught.value)
    assert gone(slow.pid)


def test_a_death_later_is_noticed(recwarn):
    with server() as started:
        os.kill(started.pid, signal.SIGKILL)
        until(lambda: not started.alive)
        with pytest.raises(EngineDiedError, match="exit code -9"):
            started.check()
    started.stop()
    assert "serving" in started.log.read_text()  # of which the error has told
    assert not recwarn.list


def test_the_number_of_a_group_that_is_gone_is_not_signalled(monkeypatch):
    with server() as started:
        first = started.pid
    signalled = []
    real = os.killpg
    monkeypatch.setattr(os, "killpg", lambda pid, n: (signalled.append(pid), real(pid, n)))
    started.stop()
    with started:
        assert started.pid != first
    assert signalled and first not in signalled


def test_a_server_may_be_stopped_by_what_reads_its_lines():
    errors, stopped = [], threading.Event()

    def stop(line):
        if line == "more" and not stopped.is_set():
            try:
                started.stop()
            except RuntimeError as error:  # a thread that joins itself
                errors.append(error)
            stopped.set()

    started = server(on_line=stop).start()
    with started.log.open("a") as log:
        log.write("more\n")
    assert stopped.wait(30)
    assert not errors and not started.alive and gone(started.pid)
    started.stop()


def test_what_reads_its_lines_may_fail_at_one_and_gets_the_next():
    lines = []

    def read(line):
        lines.append(line)
        raise ValueError("no number")

    with (
        pytest.warns(UserWarning, match=r"on_line= raised ValueError \(no number\)") as told,
        server(on_line=read) as started,
    ):
        with started.log.open("a") as log:
            log.write("more\n")
        until(lambda: "more" in lines)
    assert len(told) == 1


def test_what_reads_its_lines_and_never_returns_holds_no_stop_up():
    over = threading.Event()
    started = server(on_line=lambda line: over.wait(), stop_timeout=0.5).start()
    try:
        with pytest.warns(UserWarning, match=r"on_line= did not return within 0\.5 s"):
            stopping = threading.Thread(target=started.stop, daemon=True)
            stopping.start()
            stopping.join(20)
        assert not stopping.is_alive() and gone(started.pid)
    finally:
        over.set()


def test_children_and_servers_that_ignore_sigterm_are_ended_too():
    with server("--stubborn", "--with-child", stop_timeout=0.3) as started:
        child = int(started.log.read_text().partition("child ")[2].split()[0])
        assert runs(child)
    assert gone(started.pid) and gone(child)
    # A parent that died alone leaves a child behind.
    with server("--with-child") as started:
        child = int(started.log.read_text().partition("child ")[2].split()[0])
        os.kill(started.pid, signal.SIGKILL)
        assert gone(started.pid) and runs(child)
        until(lambda: not started.alive)
        with pytest.raises(EngineDiedError):
            started.check()
    assert gone(child)


def test_it_ends_when_its_owner_is_killed(temporary):
    code = f"""
import time
from miles.rollout import SGLangServer
started = SGLangServer("m", module="{FAKE}", start_timeout=40).start()
print(started.pid, flush=True)
time.sleep(60)
"""
    owner = run(code, temporary)
    try:
        pid = int(owner.stdout.readline())
        assert runs(pid)
    finally:
        owner.kill()
        owner.communicate()
    assert gone(pid)


def test_it_ends_with_its_owner_even_if_a_forked_child_of_that_lives_on(temporary):
    code = f"""
import os, signal, time
from miles.rollout import SGLangServer
started = SGLangServer("m", module="{FAKE}", start_timeout=40).start()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(started.pid, child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    owner = run(code, temporary)
    pid, child = map(int, owner.stdout.readline().split())
    try:
        owner.wait()
        assert gone(pid) and runs(child)
    finally:
        os.kill(child, signal.SIGKILL)
        owner.communicate()


def test_what_is_refused_for_ever_is_not_asked_until_the_end():
    wrong = server("--api-key", "k", start_timeout=600.0)
    assert not wrong.log.parent.exists()  # nothing is made before it is started
    with pytest.raises(EngineError, match=r"/server_info with 401.*no key; expected api_key="):
        wrong.start()
    assert gone(wrong.pid)
    full = server("--context-length", "1", start_timeout=600.0)
    with pytest.raises(EngineError, match="refused a request for one token"):
        full.start()
    assert gone(full.pid)


def test_environment_key_and_port(recwarn):
    given = server(env={"A": "1", "PYTHONPATH": "x:y"}, python="/py", port=31999, api_key="k")
    assert given.command[:6] == ["env", "A=1", "PYTHONPATH=x:y", "/py", "-m", FAKE]
    assert given.command[-2:] == ["--api-key", "k"] and given.url == "http://127.0.0.1:31999"
    assert given.pid is None and given.last_lines() == ""
    given.stop()
    assert not recwarn.list
    with server(api_key="k") as started:
        with contextlib.closing(SGLangEngine(started.url, api_key="k")) as engine:
            assert engine.weight_version == 0
        with pytest.raises(EngineError, match="api_key is None"):
            SGLangEngine(started.url)


def test_a_taken_port_a_missing_interpreter_and_a_log_that_cannot_be(temporary):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingError, match=f"listen at 127.0.0.1, port {port}.*nothing else"):
            server(port=port).start()
    for host in ("::1", "192.0.2.1"):
        for port in (None, 31999):
            with pytest.raises(SettingError, match=f"at {host}, port .*expected an IPv4 address"):
                server(host=host, port=port).start()
    with pytest.raises(SettingError, match=r"127\.0\.0\.1, port 70000"):
        server(port=70000).start()
    with pytest.raises(SettingError, match="cannot be started"):
        server(python="/no/such/python").start()
    assert not list(temporary.iterdir())
    (temporary / "file").touch()
    for log in ("/proc/nowhere/server.log", temporary / "file" / "server.log", temporary):
        with pytest.raises(SettingError, match=r"the log .* cannot be written .*another one as"):
            server(log=log).start()
