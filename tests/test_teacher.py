"""data/teacher.py: against a server that misbehaves for real on this machine's loopback, and against llama.cpp's own."""

import collections
import functools
import gzip
import http.server
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import data.teacher as teacher
from align import transfer
from conftest import ROOT, TOY, missing
from data.download import InputError
from data.records import read_teacher
from t5 import Tokenizer


class Server(http.server.ThreadingHTTPServer):
    """Answers completions with choice(prompt, number of the answer); faults are used up one a request."""

    def __init__(self, choice, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.choice, self.delay, self.faults, self.requests, self.answered = choice, delay, [], [], 0
        self.most = 9  # answers to one request
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((time.time(), self.path, body, dict(self.headers)))
            fault = server.faults.pop(0) if server.faults else None
            number = server.answered
            n = 0 if fault else min(server.most, body.get("n", 1))
            server.answered += n
        time.sleep(server.delay)
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        choices = [server.choice(prompt, number + i) for i in range(n)]
        content = json.dumps({"choices": [{}] if fault == "no text" else choices}).encode()
        if fault == "drop":
            return self.connection.close()
        if fault == "half":
            content = content[: len(content) // 2]
        status, told, headers = fault if isinstance(fault, tuple) else (200, content, {})
        self.send_response(status)
        for name, value in {"Content-Length": str(len(told) + 50 * (fault == "cut")), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(told)


TOKENS = ["\n", "It", " costs", " £", "5", ".", " The", " answer", " is", " 72"]


def completion(prompt="", number=0, last=" 72"):
    """A choice as completions servers give it: the sampled token need not be among the likeliest."""
    tokens = [*TOKENS[:-1], last]
    top = [{token: -0.1, " other": -3.0} for token in tokens[:-1]] + [{" 7": -0.2, " 8": -2.0}]
    logprobs = {"tokens": tokens, "token_logprobs": [-0.1] * 9 + [-4.0], "top_logprobs": top}
    return {"text": "".join(tokens), "logprobs": logprobs, "index": 0}


@pytest.fixture
def serve():
    """serve(choice=..., delay=...) -> a running Server."""
    servers = []

    def start(*arguments, **options):
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def questions(tmp_path):
    """A file of four questions, whose gold answers are written in three ways, in the folder of the test."""
    lines = [{"question": "one?", "answer": "72"}, {"question": "two?", "answer": 72},
             {"question": "three?", "answer": "So it is.\n#### 72"}, {"question": "four?", "answer": "71"}]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def ask(questions, tmp_path, monkeypatch, capsys):
    """ask(server, *arguments) -> what the command prints; its files are teacher.jsonl.gz and the journal."""
    monkeypatch.setattr(teacher, "FIRST_WAIT", 0.001)

    def ask(server, *arguments):
        monkeypatch.setattr(sys, "argv", command(server.url, questions, *arguments)[1:])
        teacher.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return ask


def command(url, questions, *arguments):
    """The command line that asks for three samples of each question."""
    given = ["--url", url, "--model", "m", "--questions", questions, "--out", "teacher.jsonl.gz", "--samples", 3]
    return [sys.executable, str(ROOT / "data" / "teacher.py"), *map(str, [*given, *arguments])]


def journal(folder):
    """{question: [answers]} of the journal."""
    found = collections.defaultdict(list)
    for line in (folder / "teacher.jsonl.gz.answers.jsonl").read_text().splitlines()[1:]:
        entry = json.loads(line)
        found[entry["question"]] += entry["answers"]
    return found


def test_right_answers_become_records_and_the_accuracies_are_told(serve, ask, tmp_path):
    lasts = {"one?": [" 72", " 72", " 9"], "two?": [" 72", " 9", " 9"], "three?": [" 72"] * 3, "four?": [" 72"] * 3}
    left = {question: list(answers) for question, answers in lasts.items()}
    server = serve(lambda prompt, number: completion(last=left[prompt.split("\n")[0][3:]].pop()))
    told = ask(server)
    assert "4 questions, 12 answers: a single sample is right 50.00% of the time, the majority vote 50.00%" in told
    records = list(read_teacher(tmp_path / "teacher.jsonl.gz"))
    assert len(records) == 6 and {record.problem.answer for record in records} == {72.0}
    steps = dict(records[0].steps)
    assert list(steps) == TOKENS[1:] and steps["It"] == pytest.approx({"It": math.exp(-0.1), " other": math.exp(-3)})
    assert steps[" 72"] == pytest.approx({" 72": math.exp(-4), " 7": math.exp(-0.2), " 8": math.exp(-2)})
    _, path, body, _ = server.requests[0]
    assert path == "/v1/completions" and body["prompt"].endswith("?\nLet's think step by step") and body["logprobs"] == 5
    assert "n" not in body and body["temperature"] == 0.7


def test_what_may_pass_is_tried_again_and_every_answer_comes_once(serve, ask, tmp_path):
    server = serve(completion)
    server.faults = [(429, b"slow down", {"Retry-After": "0.4"}), "drop", "cut", "half", "no text", (503, b"", {}), "drop"]
    ask(server, "--parallel", 1)
    times = [when for when, *_ in server.requests]
    assert len(times) == 12 + 7 and times[1] - times[0] >= 0.4 and times[-1] - times[1] < 3
    assert {question: len(answers) for question, answers in journal(tmp_path).items()} == dict.fromkeys(
        ("one?", "two?", "three?", "four?"), 3
    )


def test_a_retry_after_that_is_a_date_is_understood():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < teacher.retry_after(date) <= 30
    assert teacher.retry_after(None) == teacher.retry_after("soon") == 0


def test_a_fault_that_does_not_pass_ends_the_run_and_keeps_what_came(serve, ask, tmp_path):
    server = serve(completion)
    server.faults = [None, None, (404, b"no model m", {})]
    with pytest.raises(InputError, match="HTTP 404.*no model m(.|\n)*the same command goes on"):
        ask(server, "--parallel", 1)
    server.faults = ["drop"] * 3
    with pytest.raises(InputError, match="3 times over"):
        ask(server, "--parallel", 1, "--retries", 2)
    assert sum(map(len, journal(tmp_path).values())) == 2 and not (tmp_path / "teacher.jsonl.gz").exists()
    ask(server)
    assert server.answered == 12


def test_a_question_that_the_server_refuses_keeps_no_other_from_being_asked(serve, ask, tmp_path):
    server = serve(completion)
    server.faults = [None, (400, b"too long", {}), (422, b"filtered", {})]
    assert "2 requests were refused; the last: " in ask(server, "--parallel", 1) and server.answered == 10
    server.faults = [(400, b"filtered", {})]
    assert "1 requests were refused" in ask(server, "--parallel", 1) and server.answered == 11


def test_two_runs_do_not_sample_into_one_file(serve, ask, tmp_path):
    with teacher.Journal(tmp_path / "teacher.jsonl.gz.answers.jsonl", {}).file:
        with pytest.raises(InputError, match="another process"):
            ask(serve(completion))


def test_a_killed_run_goes_on_without_losing_or_repeating_an_answer(serve, ask, questions, tmp_path):
    server = serve(completion, delay=0.15)
    arguments = command(server.url, questions, "--parallel", 2)
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    path = tmp_path / "teacher.jsonl.gz.answers.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before, kept = len(server.requests), path.read_bytes()
    assert server.answered - (kept.count(b"\n") - 1) <= 2  # no more than were in flight
    path.write_bytes(kept + b'{"question": "one?", "answ')  # as if the power had failed, too
    ask(server)
    assert path.read_bytes().startswith(kept) and set(map(len, journal(tmp_path).values())) == {3}
    assert len(server.requests) - before == 12 - (kept.count(b"\n") - 1)
    ask(server)  # nothing is missing: nothing is asked
    assert len(server.requests) - before == 12 - (kept.count(b"\n") - 1)
    ask(server, "--samples", 5)
    assert set(map(len, journal(tmp_path).values())) == {5}


def test_an_interrupted_run_waits_for_the_answers_in_flight(serve, questions, tmp_path):
    server = serve(completion, delay=0.5)
    arguments = command(server.url, questions, "--parallel", 2)
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts with & ignores it
    process = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while not server.requests:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on" in told and "Traceback" not in told
    assert sum(map(len, journal(tmp_path).values())) == server.answered == len(server.requests)


def test_answers_to_other_settings_are_not_mixed(serve, ask):
    server = serve(completion)
    ask(server)
    with pytest.raises(InputError, match="temperature 0.7"):
        ask(server, "--temperature", 1.0)


def test_the_key_is_sent_and_nothing_else_is_done_with_it(serve, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(completion)
    server.faults = [None, (401, b"wrong key: sk-secret", {})]
    with pytest.raises(InputError, match=r"wrong key: \[key\]"):
        ask(server, "--parallel", 1)
    assert "sk-secret" not in ask(server)
    assert all(headers["Authorization"] == "Bearer sk-secret" for *_, headers in server.requests)
    for path in tmp_path.rglob("*"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert b"secret" not in content


def chat(prompt="", number=0):
    """The same answer as chat servers give it, with a mark of the end behind the text."""
    answer = completion()
    entry = lambda token, logprob: {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    told = answer["logprobs"]
    content = [
        entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in top.items()]}
        for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"])
    ]
    content.append(entry("<|end|>", -0.1) | {"top_logprobs": []})
    return {"message": {"role": "assistant", "content": answer["text"]}, "logprobs": {"content": content}}


def test_chat_servers_give_the_same_records(serve, ask, tmp_path):
    server = serve(chat)
    ask(server, "--chat")
    _, path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and body["top_logprobs"] == 5 and body["logprobs"] is True
    assert body["messages"][0]["content"].endswith("step by step")
    assert teacher.parse_choice(chat()) == teacher.parse_choice(completion())
    assert next(read_teacher(tmp_path / "teacher.jsonl.gz")).steps[-1][0] == " 72"


@pytest.mark.parametrize(
    "parts",
    [
        [{"token": "bytes:\\xc2"}, {"token": "bytes:\\xa3"}],
        [{"token": "\\xc2", "bytes": [0xC2]}, {"token": "\\xa3", "bytes": [0xA3]}],
        [{"token": "\ufffd"}, {"token": "\ufffd"}],
    ],
)
def test_tokens_that_are_parts_of_a_character_keep_the_others_aligned(parts):
    tokens = [{"token": "It"}, {"token": " costs"}, {"token": " "}, *parts, {"token": "5"}, {"token": ". It is 72"}]
    content = [{"logprob": -0.1, **token, "top_logprobs": [{"logprob": -0.1, **token}]} for token in tokens]
    answer = teacher.parse_choice({"text": "It costs £5. It is 72", "logprobs": {"content": content}})
    assert answer["tokens"][:3] == ["It", " costs", " "] and all("bytes:\\x" in name for name in answer["tokens"][3:5])
    record = teacher.parse_record({"question": "q", "answer": "72", **answer}, "here")
    student = ["▁It", "▁costs", "▁", "£", "5", "."]
    ids, probs = transfer(record.steps[:-1] + [(".", {".": 0.8})], student, ["▁It", "▁costs", "▁", "£", "5", ".", "<unk>"])
    assert probs[:, 0] == pytest.approx([0.90484, 0.90484, 1, 1, 0.90484, 0.8], abs=1e-4)


def test_servers_without_log_probabilities_serve_for_likelihood_and_it_says_so(serve, ask, tmp_path):
    server = serve(lambda prompt, number: {"text": "The answer is 72"})
    assert "9 came without usable log-probabilities: they can train by likelihood alone" in ask(server)
    assert all(record.steps is None for record in read_teacher(tmp_path / "teacher.jsonl.gz"))


def test_a_server_that_refuses_log_probabilities_is_asked_without(serve, ask):
    server = serve(lambda prompt, number: {"text": "The answer is 72"})
    server.delay, server.faults = 0.2, [(400, b"logprobs is not supported", {})] * 4
    assert "refuses to tell log-probabilities" in ask(server, "--parallel", 4)
    assert [("logprobs" in body) for _, _, body, _ in server.requests] == [True] * 4 + [False] * 12


def test_an_answer_without_a_field_is_used_as_far_as_it_goes():
    whole = completion()
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        told = {key: value for key, value in whole["logprobs"].items() if key != name}
        assert teacher.parse_choice({"text": "It is 72", "logprobs": told}) == {"solution": "It is 72"}
    for content in ([{"token": "It is 72"}], [{"logprob": -1.0}], ["It"], "It"):
        assert teacher.parse_choice({"text": "It is 72", "logprobs": {"content": content}}) == {"solution": "It is 72"}
    assert teacher.parse_choice({"message": {"content": None}}) == {"solution": ""}
    assert teacher.parse_choice({}) is teacher.parse_choice(None) is teacher.parse_choice({"message": {}}) is None


def test_log_probabilities_of_another_text_or_that_are_none_are_left_out(serve, ask, tmp_path):
    choices = [completion(), completion(), completion()]
    choices[0]["logprobs"]["tokens"][3] = " $"
    choices[1]["logprobs"]["top_logprobs"][3] = {" £": 0.0, " a": 0.0}  # two that are certain
    server = serve(lambda prompt, number: choices[number % 3])
    assert "6 came without" in ask(server, "--parallel", 1)
    assert sum(record.steps is not None for record in read_teacher(tmp_path / "teacher.jsonl.gz")) == 3


def test_several_solutions_a_request_and_a_server_that_gives_fewer(serve, ask, tmp_path):
    server = serve(completion)
    ask(server, "--per-request", 2, "--parallel", 1)
    assert [body.get("n", 1) for _, _, body, _ in server.requests] == [2, 1] * 4
    server.most = 1
    ask(server, "--per-request", 2, "--parallel", 1, "--samples", 5)
    assert set(map(len, journal(tmp_path).values())) == {5} and server.answered == 20


def test_demonstrations_and_own_prompts(serve, ask, tmp_path):
    server = serve(completion)
    ask(server, "--shots", 2, "--data", TOY)
    prompt = server.requests[0][2]["prompt"]
    assert prompt.count("Q: ") == 3 and prompt.count("The answer is") == 2 and prompt.endswith("step by step")
    (tmp_path / "prompt.txt").write_text("Solve: {question}\nEnd with: The answer is N.")
    for path in tmp_path.glob("teacher*"):
        path.unlink()
    ask(server, "--prompt", "prompt.txt", "--parallel", 1)
    assert server.requests[12][2]["prompt"] == "Solve: one?\nEnd with: The answer is N."
    (tmp_path / "prompt.txt").write_text("Solve it.")
    with pytest.raises(InputError, match="no {question}"):
        ask(server, "--prompt", "prompt.txt")


# --- llama.cpp's server ---

SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], 0
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 2048, 2, False, 1
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
time.sleep(600)
"""


def write_gguf(path):
    """A random Llama of one layer that writes digits, words and single bytes."""
    import gguf
    import numpy as np

    words = ["▁the", "▁answer", "▁is", "▁clips", "▁+", "▁=", ".", "\n", "▁", *map(str, range(10)), *map(chr, range(97, 123))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    V, D, F = len(tokens), 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in dict(context_length=2048, embedding_length=D, block_count=1, feed_forward_length=F, head_count=2,
                            head_count_kv=2, layer_norm_rms_eps=1e-5, vocab_size=V, rope_dimension_count=D // 2,
                            tokenizer_model="llama", token_list=tokens, token_scores=[-float(i) for i in range(V)],
                            token_types=[2, 3, 3] + [6] * 256 + [1] * len(words), bos_token_id=1, eos_token_id=2,
                            chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}").items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,), "blk.0.attn_norm": (D,), "blk.0.ffn_norm": (D,)}
    shapes |= {f"blk.0.attn_{name}": (D, D) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F)}
    for name, shape in shapes.items():
        tensor = rng.normal(size=shape) / 2 if len(shape) == 2 else np.ones(shape)
        if name == "output":
            tensor[3:259] /= 4  # single bytes are rare, but there
        writer.add_tensor(f"{name}.weight", tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The address of llama.cpp's server with a random model."""
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError:
        missing("pip install xllamacpp gguf, the real server")
    folder = tmp_path_factory.mktemp("llama")
    write_gguf(folder / "random.gguf")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, folder / "random.gguf"], stdout=subprocess.PIPE, stderr=log, text=True
        )
    line = next((line for line in process.stdout if line.startswith("address")), None)
    assert line, (folder / "log").read_text()[-2000:]
    yield line.split()[1] + "/v1"
    process.kill()
    process.wait()


@pytest.mark.parametrize("arguments", [(), ("--chat",), ("--per-request", 2)])
def test_a_real_server_gives_records_that_align(llama, ask, questions, tmp_path, arguments):
    class server:
        url = llama

    given = ["--max-tokens", 30, "--temperature", 1.5, "--samples", 12, *arguments]
    try:
        ask(server, *given)
    except InputError as error:  # a random model has to guess right
        assert "No answer is right" in str(error)
    answers = journal(tmp_path)["one?"]
    assert len(answers) == 12 and sum("tokens" in answer for answer in answers) > 0
    for answer in answers:
        for token, top in zip(answer.get("tokens", ()), answer.get("top_logprobs", ())):
            assert token in top and 2 <= len(top) <= 6 and sum(map(math.exp, top.values())) <= 1.001
    told = [a for a in answers if "tokens" in a and teacher.extract_number(a["solution"]) is not None]
    gold = teacher.extract_number(told[0]["solution"])
    questions.write_text(json.dumps({"question": "one?", "answer": gold}))
    asked_before = (tmp_path / "teacher.jsonl.gz.answers.jsonl").read_bytes()
    ask(server, *given)
    assert (tmp_path / "teacher.jsonl.gz.answers.jsonl").read_bytes() == asked_before
    records = [record for record in read_teacher(tmp_path / "teacher.jsonl.gz") if record.steps]
    tokenizer = Tokenizer(TOY / "student")
    assert records
    for record in records:
        student = tokenizer.split(record.problem.solution)
        ids, probs = transfer(record.steps, student, tokenizer.pieces)
        assert len(ids) == len(student) and (probs.sum(axis=1) <= 1).all() and (probs.max(axis=1) > 0).all()
