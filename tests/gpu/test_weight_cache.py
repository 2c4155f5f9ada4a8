"""`SGLangWeightCacheSyncer` with the real daemon and server of SGLang, on one GPU.

MILES_SGLANG_SITE is their PYTHONPATH, where they need other packages than the trainer;
MILES_SGLANG_PYTHON their interpreter. All that happens is printed: run with -s.
"""

import os
import statistics
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from miles.errors import SyncError
from miles.rollout import SGLangEngine, SGLangServer
from miles.sync._weight_cache_daemon import Daemon as DaemonClient
from miles.sync.weight_cache import SOCKET, SGLangWeightCacheSyncer
from tests.gpu.test_sglang_sync import CONFIG, ENV, FLAGS, MEAN_GAP, PYTHON, gap, model

READY = Path(SOCKET).with_suffix(".ready")
COMMON = ["--load-format", "dummy", "--dtype", "bfloat16"]
LOG_LINES = 60
START_SECONDS = 240


def say(*parts) -> None:
    print("[weight cache]", *parts, flush=True)


def memory(where: str) -> None:
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_allocated()
    say(f"{where}: {(total - free) / 1e6:.0f} MB of the GPU used, {own / 1e6:.1f} MB by torch here")


class Daemon:
    """`sglang.srt.weight_cache.daemon` as a child, which dies with this thread."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "daemon.log"
        command = [
            PYTHON, "-m", "sglang.srt.weight_cache.daemon", "--model-path", str(folder),
            "--gpu-id", "0", *COMMON,
        ]  # fmt: skip
        say(" ".join(command), ENV)
        begun = time.monotonic()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=folder,
                env=os.environ | ENV,
            )  # fmt: skip
        while not self.ready:
            if self.process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                self.stop()
                pytest.fail(f"the daemon is not ready, exit code {self.process.returncode}")
            time.sleep(0.2)
        say(f"daemon {self.process.pid} ready after {time.monotonic() - begun:.1f} s:")
        print(READY.read_text(), flush=True)

    @property
    def ready(self) -> bool:
        try:
            return f"pid={self.process.pid}\n" in READY.read_text()
        except FileNotFoundError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        say("end of the daemon's log:\n" + "\n".join(lines))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    check = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    if subprocess.run([PYTHON, "-c", check], env=os.environ | ENV).returncode:
        pytest.skip("no sglang in MILES_SGLANG_SITE")
    folder = tmp_path_factory.mktemp("model")
    CONFIG.save_pretrained(folder)
    memory("before")
    daemon = Daemon(folder)
    memory("daemon up")
    flags = [*FLAGS, *COMMON, "--weight-cache-mode", "client"]
    server = SGLangServer(folder, args=flags, env=ENV, cwd=folder, python=PYTHON, start_timeout=280)
    try:
        begun = time.monotonic()
        server.start()
        say(f"server up after {time.monotonic() - begun:.1f} s")
        memory("server up")
        yield daemon, server
    finally:
        say("end of the server's log:\n" + server.last_lines(LOG_LINES))
        whole = server.log.read_text(errors="replace") if server.log.exists() else ""
        loader = [
            line
            for line in whole.splitlines()
            if "IpcModelLoader" in line or "weight_cache" in line
        ]
        say("what it says of the weight cache:\n" + "\n".join(loader[-LOG_LINES:]))
        server.stop()
        daemon.stop()


PROBLEMS: list[str] = []


def attach(server) -> SGLangWeightCacheSyncer:
    """Attach, say what was found; go on without the proof where only that fails."""
    with closing(DaemonClient(SOCKET)) as client:
        say(len(client.tensors), "entries, config", client.config)
        for name, shared in list(client.tensors.items())[:14]:
            say("  ", name, shared.dtype, shared.shape, "" if shared.is_param else "(buffer)",
                shared.arguments[6], shared.arguments[7][:4].hex(),
                shared.arguments[8:10])  # fmt: skip
    begun = time.monotonic()
    try:
        syncer = SGLangWeightCacheSyncer(server.url, CONFIG, timeout=120)
    except SyncError as error:
        say("NOT ATTACHED:", error)
        PROBLEMS.append(str(error))
        syncer = SGLangWeightCacheSyncer(server.url, CONFIG, timeout=120, prove=False)
    say(f"attached in {time.monotonic() - begun:.2f} s")
    return syncer


def test_the_optimizers_write_is_the_sync(world):
    _, server = world
    with closing(attach(server)) as syncer, closing(SGLangEngine(server.url)) as engine:
        trained = model(1)
        say("push:", syncer.push(trained.state_dict().items(), version=1).summary())
        found = gap(engine, trained, 1)
        say(f"after a push the log-probs differ by {found:.4f}")
        assert found < MEAN_GAP

        memory("before alias_")
        syncer.alias_(trained)
        torch.cuda.empty_cache()
        memory("after alias_")
        found = gap(engine, trained, 1)
        say(f"aliased: {found:.4f}")
        assert found < MEAN_GAP

        optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-4)
        tokens = torch.randint(CONFIG.vocab_size, (4, 64), device="cuda")
        trained(input_ids=tokens, labels=tokens).loss.backward()
        before = trained.lm_head.weight.detach().clone()
        with syncer.updating(version=2):
            optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(before, trained.lm_head.weight)
        found = gap(engine, trained, 2)
        say(f"after a step of AdamW: {found:.4f};", syncer.last_report.summary())
        assert found < MEAN_GAP
        assert syncer.last_report.copied_bytes == 0

        # A step so large that the old weights would not pass.
        torch.manual_seed(0)
        for parameter in trained.parameters():
            if parameter.ndim > 1:
                parameter.grad = torch.randn_like(parameter) * parameter.detach().std()
        with syncer.updating(version=3):
            torch.optim.SGD(trained.parameters(), lr=0.5).step()
        optimizer.zero_grad()
        new, old = gap(engine, trained, 3), gap(engine, model(1), 3)
        say(f"after a large step: {new:.4f}, and from the old weights {old:.4f}")
        assert new < MEAN_GAP and old > 5 * MEAN_GAP

        masters = {name: p.detach().float() for name, p in model(2).named_parameters()}
        report = syncer.push(masters.items(), version=4)
        found = gap(engine, trained, 4)
        say(f"masters pushed into trainer and server: {found:.4f};", report.summary())
        assert found < MEAN_GAP

        reports = []
        for version in range(5, 16):
            for parameter in trained.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with syncer.updating(version=version):
                optimizer.step()
            reports.append(syncer.last_report)
        for phase in ("pause", "load", "commit"):
            times = [1e3 * report.phases[phase] for report in reports]
            say(f"{phase}: median {statistics.median(times):.2f} ms, worst {max(times):.2f} ms")
        pushes = [syncer.push(masters.items(), version=v) for v in range(16, 27)]
        for phase in ("pause", "load"):
            times = [1e3 * report.phases[phase] for report in pushes]
            say(f"push {phase}: median {statistics.median(times):.2f} ms, worst {max(times):.2f}")

    with closing(attach(server)) as syncer, closing(SGLangEngine(server.url)) as engine:
        again = model(3)
        syncer.alias_(again)  # takes what the engine serves
        found = gap(engine, again, 26)
        say(f"attached a second time: {found:.4f}")
        assert found < MEAN_GAP
        with pytest.raises(ZeroDivisionError), syncer.updating(version=27):
            raise ZeroDivisionError
        syncer.push(masters.items(), version=27)
        assert gap(engine, again, 27) < MEAN_GAP
        syncer.detach_()
    assert not PROBLEMS


def test_the_death_of_the_daemon_is_noticed_and_ends_the_server(world):
    daemon, server = world
    with closing(attach(server)) as syncer:
        with syncer.updating(version=28):
            pass
        daemon.process.kill()
        daemon.process.wait()
        with pytest.raises(SyncError, match="ended, and the memory") as caught:  # noqa: SIM117
            with syncer.updating(version=29):
                raise AssertionError("not reached")
        say(caught.value)
        end = time.monotonic() + 40
        while server.alive and time.monotonic() < end:
            time.sleep(0.5)
        say(f"the server is {'still there' if server.alive else 'gone too'}")
        assert not server.alive
