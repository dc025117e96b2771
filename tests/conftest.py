"""What the tests share: the real data, the reference implementation, and how commands are run.

REAL_DATA names a folder of real tokenizers, problem sets and teacher records (default: ../shared
next to the project). Tests that need it are skipped if it is missing. With REQUIRE_REFERENCES=1
nothing is skipped: whatever is missing fails its tests.
"""

import contextlib
import functools
import http.server
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "data" / "toy"
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared"))
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(REAL_DATA / "tokenizers" / "tiktoken"))
sys.path.insert(0, str(ROOT))

from t5 import Tokenizer, run_command

torch.set_num_threads(1)  # the tests' tensors are small
torch.set_num_threads = lambda number: None  # commands keep it

def missing(what):
    """Skip the test; fail it if nothing may be skipped."""
    (pytest.fail if os.environ.get("REQUIRE_REFERENCES") == "1" else pytest.skip)(what)

def reference(name, package=None):
    """Import a module that only tests need, or skip the test."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"pip install {package or name}")

@pytest.fixture(scope="session")
def transformers():
    """Return the reference implementation of T5."""
    module = reference("transformers")
    module.logging.set_verbosity_error()
    return module

@pytest.fixture(scope="session")
def real():
    """Return the folder of real data."""
    if not REAL_DATA.is_dir():
        missing(f"no real data at {REAL_DATA}")
    return REAL_DATA

@pytest.fixture(scope="session")
def datasets(real):
    """Return the folder of real problem sets."""
    return real / "datasets"

@pytest.fixture(scope="session")
def tokenizer(real):
    """Return T5's real tokenizer."""
    return Tokenizer(real / "tokenizers" / "t5")

@pytest.fixture(scope="session")
def run():
    """run(script, *arguments, cwd=..., env=...) runs a command; return the finished process."""
    def run(script, *arguments, env=None, **options):
        command = [sys.executable, ROOT / script, *map(str, arguments)]
        return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True,
                              timeout=300, **options)
    return run

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
def refused(command):
    """refused(module, *arguments) runs a main() that must refuse; return its one-line message."""
    def refused(module, *arguments):
        with pytest.raises(SystemExit) as stopped:
            command(module, *arguments)
        message = str(stopped.value.code)
        assert message.startswith("error: ") and "\n" not in message, message
        return message
    return refused

@contextlib.contextmanager
def serve(folder, handler=http.server.SimpleHTTPRequestHandler):
    """Context manager: serve a folder on the loopback interface; yield its address."""
    handler = functools.partial(handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

def damage(path, content):
    """Overwrite a file with a text, bytes, or a function of its bytes."""
    content = content(path.read_bytes()) if callable(content) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
