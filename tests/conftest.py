"""What the tests share: the real data, the reference implementation, and how commands are run.

REAL_DATA names a folder of real tokenizers, problem sets and teacher records (default: ../shared
next to the project). Tests that need it are skipped if it is missing. With REQUIRE_REFERENCES=1
nothing is skipped: whatever is missing fails its tests.
"""

import contextlib
import functools
import http.server
import importlib
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared"))
TOY = ROOT / "data" / "toy"
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(REAL_DATA / "tokenizers" / "tiktoken"))

from t5 import Tokenizer, run_command

import torch  # after t5, which sets how OpenMP's threads wait

torch.set_num_threads(1)  # the tests' tensors are small

@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep one thread, whatever commands set: a fork after OpenMP has started threads hangs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda number: None)
        yield

def missing(what):
    """Skip the test; fail it if nothing may be skipped."""
    (pytest.fail if os.environ.get("REQUIRE_REFERENCES") == "1" else pytest.skip)(what)

@pytest.fixture(scope="session")
def real():
    """The folder of real data."""
    if not REAL_DATA.is_dir():
        missing(f"no real data at {REAL_DATA}")
    return REAL_DATA

def reference(name):
    """Import a package that only tests need, or skip the test."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"pip install {name}")

@pytest.fixture(scope="session")
def datasets(real):
    """The folder of real problem sets."""
    return real / "datasets"

@pytest.fixture(scope="session")
def tokenizer(real):
    """T5's real tokenizer."""
    return Tokenizer(real / "tokenizers" / "t5")

@pytest.fixture(scope="session")
def transformers():
    """The reference implementation of T5."""
    module = reference("transformers")
    module.logging.set_verbosity_error()
    return module

@pytest.fixture(scope="session")
def run():
    """run(script, *arguments, cwd=..., env=...) runs a command; return the finished process."""

    def run(script, *arguments, cwd=None, env=None, **options):
        command = [sys.executable, ROOT / script, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})},
                              capture_output=True, text=True, **options)

    return functools.partial(run, timeout=300)

@contextlib.contextmanager
def serve(folder):
    """Context manager: serve a folder on the loopback interface; yield its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

def fork(work, output):
    """Start work() in a process that is a copy of this one; its output goes to a file."""

    def quiet():
        sys.stdout = sys.stderr = open(output, "a", buffering=1)
        run_command(work)

    process = multiprocessing.get_context("fork").Process(target=quiet)
    process.start()
    return process

# --- commands in this process, and damaged files ---

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(module, *arguments) runs a module's main() in tmp_path; return what it prints."""

    def command(module, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        run_command(module.main)
        return capsys.readouterr().out

    return command

@pytest.fixture
def refused(command, tmp_path):
    """refused(module, *arguments) runs a module's main(), which must refuse; return its message.

    That is one line with a cause and a remedy and the exit status 1. It must write nothing and take
    at most a gigabyte of memory."""

    def refused(module, *arguments):
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stopped, little_memory():
            command(module, *arguments)
        message = stopped.value.code
        assert isinstance(message, str) and message.startswith("error: "), message
        assert "\n" not in message and "; " in message and len(message) < 2000, message
        assert contents(tmp_path) == before
        return message

    return refused

@contextlib.contextmanager
def little_memory():
    """Context manager: let this process take at most one more gigabyte (on Linux)."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if os.path.exists("/proc/self/statm"):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

def contents(folder):
    """Return {path: bytes} of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def damage(path, content):
    """Overwrite a file with a text, bytes, or a function of its bytes."""
    content = content(path.read_bytes()) if callable(content) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)

def half(content):
    """Return the first half of a file's bytes, as an interrupted copy leaves it."""
    return content[: len(content) // 2]

# --- any text ---

ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz", "0123456789", ".,+-*/=()$%<>:'\"", " \n\t\r\v\f\x1c\x85\u2028",
    "\u00a0\u3000\u200b\u200d\ufeff\u00ad\0\x01\x1b\x7f", "éüße\u0301\u20dd", "שלום مرحبا٠١\u202e",
    "你好한국\u1112\u1161\u11ab", "😀👍🏽👩\u200d👧🇩🇪", "ﬃ½²㎏ﷺⅣ①ａＢ１＋٣೪𝟛−–×÷", "▁\ufffd\U0010ffff",
    "\ud800\udc00\udfff", "</s><pad><unk>",
]

def random_text(rng):
    """Return a text of up to 80 characters from one to five alphabets."""
    chosen = rng.sample(ALPHABETS, rng.randrange(1, 6))
    return "".join(rng.choice(rng.choice(chosen)) for _ in range(rng.randrange(80)))
