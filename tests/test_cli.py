from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from checkpoints import split_into_shards, write_checkpoint, write_json, write_tokenizer
from conftest import REPOSITORY
from recorded_graphs import RecordedGraphs
from rich.console import Console

import glm4
from glm4 import cli, decoder, hub, progress
from glm4.cli import main
from glm4.tokenizer import Tokenizer

SPEEDS = r"glm4: prefill \d+ tokens in .* s \(.* tokens/s\), decode \d+ tokens .* on .* in \w+\n"


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    return write_tokenizer(write_checkpoint(folder))


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(checkpoint_folder, tmp_path / "tiny")


def generate(folder, *flags, prompt="the word"):
    return main(["generate", "--model", str(folder), "--prompt", prompt, *flags])


def test_generate_writes_what_the_model_says(checkpoint_folder, capsys):
    assert generate(checkpoint_folder, "--max-new-tokens", "12") == 0
    out, err = capsys.readouterr()
    tokenizer = Tokenizer(checkpoint_folder)
    tokens = glm4.load(checkpoint_folder).generate([tokenizer.encode("the word")], 12)[0]
    assert out == tokenizer.decode(tokens) + "\n"
    assert re.fullmatch(SPEEDS, err) and f"decode {len(tokens) - 1} tokens" in err


def test_warm_up_is_told(checkpoint_folder, capsys, monkeypatch):
    monkeypatch.setitem(decoder.GRAPHS, "cpu", RecordedGraphs)  # as on a GPU
    assert generate(checkpoint_folder, "--max-new-tokens", "12") == 0
    assert re.search(r"\), \d+\.\d\d s of it warm-up on cpu in float32\n$", capsys.readouterr().err)


def test_prompt_from_stdin(checkpoint_folder, capsys, monkeypatch):
    generate(checkpoint_folder, "--max-new-tokens", "4", prompt="日本 word")
    expected = capsys.readouterr().out
    stdin = io.TextIOWrapper(io.BytesIO("日本 word\n".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["generate", "--model", str(checkpoint_folder), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out == expected


def test_sampling_flags_reach_the_sampler(checkpoint_folder, capsys):
    def text(*flags):
        assert generate(checkpoint_folder, "--max-new-tokens", "30", *flags) == 0
        return capsys.readouterr().out

    greedy = text()
    hot = ("--temperature", "5")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text(*hot, "--top-k", "1") == text(*hot, "--top-p", "1e-9") == greedy
    assert text("--repetition-penalty", "5") != greedy


def test_quantize_and_dtype_flags(checkpoint_folder, capsys):
    flags = ("--quantize", "int8", "--dtype", "bfloat16", "--device", "cpu")
    assert generate(checkpoint_folder, *flags) == 0
    out, err = capsys.readouterr()
    assert err.endswith(" on cpu in bfloat16\n")
    tokenizer = Tokenizer(checkpoint_folder)
    prompt = tokenizer.encode("the word")
    model = glm4.load(checkpoint_folder, dtype="bfloat16", quantize="int8", device="cpu")
    left = 256 - len(prompt)  # no --max-new-tokens: all that the context leaves
    assert out == tokenizer.decode(model.generate([prompt], left)[0]) + "\n"


def quantize(folder, target, *flags):
    return main(["quantize", str(folder), str(target), *flags])


def test_quantize_writes_what_load_would(checkpoint_folder, tmp_path, capsys):
    """Each flag by what it does to the file; then the text of the result."""
    target = tmp_path / "target"
    assert quantize(checkpoint_folder, target, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"glm4: wrote .*target, \d+\.\d\d MB\n", err)
    assert generate(target, "--max-new-tokens", "12") == 0
    tokenizer = Tokenizer(checkpoint_folder)
    tokens = glm4.load(target).generate([tokenizer.encode("the word")], 12)[0]
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"

    flags = ("--bits", "8", "--group-size", "32", "--asymmetric", "--head-bits", "16")
    assert quantize(checkpoint_folder, tmp_path / "b", *flags, "--rope-theta", "5e6") == 0
    model = glm4.load(tmp_path / "b", "cpu")
    down = model.blocks[0].mlp.down
    assert (down.bits, down.group_size, down.zero_point is None) == (8, 32, False)
    assert isinstance(model.lm_head, torch.Tensor) and model.config.theta == 5e6
    assert quantize(checkpoint_folder, tmp_path / "d", "--for", "vllm", "--asymmetric") == 0
    model = glm4.load(tmp_path / "d", "cpu")
    down = model.blocks[0].mlp.down
    assert (down.bits, down.group_size, down.zero_point is None) == (4, 32, False)
    assert isinstance(model.lm_head, torch.Tensor)
    assert quantize(checkpoint_folder, tmp_path / "c", "--bits", "8") == 0
    assert glm4.load(tmp_path / "c", "cpu").blocks[0].mlp.down.group_size is None


def test_quantize_refuses_in_one_line(checkpoint_folder, folder, tmp_path, capsys):
    assert quantize(checkpoint_folder, folder) == 1
    assert re.fullmatch(r"glm4: .*tiny: must not exist yet; .*\n", capsys.readouterr().err)
    nan_weights(folder)
    assert quantize(folder, tmp_path / "target") == 1
    message = r"glm4: .*tensor lm_head\.weight must be finite, got NaN .*\n"
    assert re.fullmatch(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


# Each breaks a good checkpoint, and may return more flags.
def not_glm4(folder):
    change_config(folder, model_type="llama")


def impossible_size(folder):
    change_config(folder, num_attention_heads=-4)


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_points_outside(folder):
    weight_map = split_into_shards(folder)
    weight_map["lm_head.weight"] = "../elsewhere.safetensors"
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def nan_weights(folder):
    write_checkpoint(folder, tensors={"lm_head.weight": torch.full((320, 64), torch.nan)})


def missing_tensor(folder):
    write_checkpoint(folder, tensors={"model.norm.weight": None})


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def remote_code_tokenizer(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("[]")


def tokenizer_of_a_larger_model(folder):
    shutil.copy(hub.DEMO / "tokenizer.json", folder)


def long_prompt(folder):
    return ["--prompt", "x" * 300]


def too_many_new_tokens(folder):
    return ["--max-new-tokens", "300"]


def empty_prompt(folder):
    return ["--prompt", ""]


def no_such_folder(folder):
    return ["--model", str(folder / "nowhere")]


def no_such_device(folder):
    return ["--device", "cuda:99"]


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | changes)


@pytest.mark.parametrize(
    "breaks, message",
    [
        (no_such_folder, r"nowhere.*: no such folder"),
        (not_glm4, r"config\.json: model_type must be .* got 'llama'"),
        (impossible_size, r"config\.json: num_attention_heads must be .* got -4"),
        (truncated, r"model\.safetensors: not a whole safetensors file"),
        (pickle_only, r"pytorch_model\.bin: pickled weights .* are not read"),
        (index_points_outside, r"index\.json: .* lm_head\.weight .* '\.\./elsewhere\.safetensors'"),
        (nan_weights, r"model\.safetensors: tensor lm_head\.weight must be finite, got NaN"),
        (missing_tensor, r"model\.safetensors: tensor model\.norm\.weight \[64\] is missing"),
        (no_tokenizer, r"tiny: tokenizer\.json is missing"),
        (remote_code_tokenizer, r"tiny/tokenizer\.model: line 1 must be base64 and a rank, got"),
        (broken_tokenizer, r"tokenizer\.json: not a tokenizer that can be read"),
        (tokenizer_of_a_larger_model, r"prompts\[0\] must be token ids in \[0, 320\), got 15\d\d"),
        (long_prompt, r"prompts\[0\] .* at most 256 tokens .* got 302 \+ 1, .* GiB"),
        (
            too_many_new_tokens,
            r"at most 256 tokens \(the model's context\), got \d+ \+ 300, .* GiB",
        ),
        (empty_prompt, r"the prompt is empty"),
        (no_such_device, r"device must be .* got 'cuda:99'"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, breaks, message):
    flags = breaks(folder) or []
    assert generate(folder, *flags) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"glm4: .*{message}.*\n", err), err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], 'arguments are required: command, e.g. `glm4 generate --prompt "Hello"`'),
        (["generate", "--dtype", "int3"], "--dtype: invalid choice: 'int3'"),
        (["generate", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["quantize", "x", "y", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N"),
        (["generate", "hello", "you"], 'arguments: hello you; did you mean --prompt "hello you"?'),
        (
            ["generate", "--rope-theta", "nan"],
            "--rope-theta must be over 1 and at most",
        ),
        (["generate", "--top-p", "0.9"], "--top-p does nothing without --temperature"),
        (["generate", "--top-k", "9", "--seed", "1"], "--top-k, --seed do nothing without --temp"),
        (["generate", "--activations", "float", "--prompt", "a"], "and here are none; add --quan"),
        (["sing"], "invalid choice: 'sing'"),
        (["generate", "--colour"], "unrecognized arguments: --colour"),
        (["generate", "--max-new-tokens", "many"], "invalid int value: 'many'"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["generate", "--temperature", "-1"], "temperature must be at least 0 and finite, got -1"),
        (["generate", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["generate", "--top-p", "1.5"], "--top-p must be over 0 and at most 1, got 1.5"),
        (["generate", "--repetition-penalty", "nan"], "--repetition-penalty must be over 0"),
        (["generate", "--seed", "-1"], "seed must be at least 0"),
        (["generate", "--quantize", "int3"], "invalid choice: 'int3'"),
        (["quantize", "x"], "the following arguments are required: DST"),
        (["quantize", "x", "y", "--bits", "3"], "invalid choice: 3"),
        (["quantize", "x", "y", "--for", "llama"], "invalid choice: 'llama'"),
        (["quantize", "x", "y", "--for", "vllm", "--head-bits", "4"], "--head-bits must be 16"),
        (["quantize", "x", "y", "--for", "sglang", "--asymmetric"], "--asymmetric is not read by"),
        (["quantize", "x", "y", "--group-size", "16"], "invalid choice: '16'"),
        (["env", "--model", "x"], "unrecognized arguments"),
    ],
)
def test_wrong_command_line_is_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert re.fullmatch(rf"glm4: .*{re.escape(message)}.* \(see `glm4.* --help`\)\n", err), err


HUGE = "1" + 400 * "0"
HOSTILE = [
    (2, "--temperature", HUGE),
    (2, "--temperature", "nan"),
    (2, "--temperature", "-1"),
    (2, "--top-k", HUGE + "x"),
    (2, "--top-k", "-" + HUGE),
    (2, "--top-k", 5000 * "9"),
    (2, "--top-p", "inf"),
    (2, "--top-p", "1e-400"),
    (2, "--seed", "-9"),
    (2, "--seed", "1.5"),
    (2, "--repetition-penalty", HUGE),
    (2, "--max-new-tokens", "-" + HUGE),
    (1, "--max-new-tokens", HUGE),
    (2, "--rope-theta", HUGE),
    (2, "--rope-theta", "0"),
    (2, "--device", ""),
    (2, "--device", "cpu:"),
    (2, "--device", "cuda:-1"),
    (1, "--device", f"cuda:{HUGE}"),
    (1, "--model", "~nosuchuser/x"),
    (1, "--model", ""),
    (1, "--model", 5000 * "a"),
    (1, "--model", "a/\0"),
    (1, "--model", "/dev/null"),
    (1, "--prompt", "\udcff"),
    (1, "--prompt", ""),
]


@pytest.mark.parametrize("code, flag, value", HOSTILE, ids=lambda value: str(value)[:20])
def test_hostile_command_lines(checkpoint_folder, capsys, monkeypatch, code, flag, value):
    """One line and the right exit code, before the weights are read."""
    monkeypatch.setattr("glm4.checkpoint.load", None)
    try:
        status = generate(checkpoint_folder, "--temperature", "1", f"{flag}={value}")
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == code and out == "" and re.fullmatch(r"glm4: .*\n", err), err
    assert "unexpected" not in err and "None" not in err, err


@pytest.mark.parametrize("flags", [("--seed", HUGE), ("--top-k", HUGE), ("--temperature", "1e308")])
def test_large_numbers_are_fine(checkpoint_folder, capsys, flags):
    assert generate(checkpoint_folder, "--temperature", "1", "--max-new-tokens", "2", *flags) == 0


@pytest.mark.parametrize(
    "redirection, arguments, code, message",
    [
        ("<&-", "generate", 2, "glm4: --prompt is needed, since stdin is closed .*"),
        (">&-", "generate --prompt a", 1, "glm4: stdout is closed, .*"),
        (">&-", "env", 1, "glm4: stdout is closed, .*"),
        ("2>&-", "generate --prompt a --max-new-tokens 2", 0, ""),
        ("2>&-", "generate --prompt a --max-new-tokens 999999", 1, ""),
        (">/dev/full", "env", 1, r"glm4: \[Errno 28\] No space left on device"),
        ("<&- >&- 2>&-", "env", 1, ""),
    ],
)
def test_closed_streams(redirection, arguments, code, message):
    command = f"{sys.executable} -m glm4 {arguments} {redirection}"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == code, run.stderr
    assert re.fullmatch(message + ("\n" if message else ""), run.stderr), run.stderr
    assert code == 0 or run.stdout == ""


def test_float_activations(checkpoint_folder, capsys):
    flags = ("--quantize", "int4", "--device", "cpu", "--max-new-tokens", "12")
    assert generate(checkpoint_folder, *flags, "--activations", "float") == 0
    tokenizer = Tokenizer(checkpoint_folder)
    model = glm4.load(checkpoint_folder, "cpu", quantize="int4", activations="float")
    tokens = model.generate([tokenizer.encode("the word")], 12)[0]
    assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"


class PanicException(BaseException):
    """As pyo3 raises it: no Exception."""


@pytest.mark.parametrize(
    "error, line",
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried 9 GiB"), "out of memory: CUDA out of"),
        (MemoryError(), "out of memory: the system has none left"),
        (RuntimeError("glm4_kernels was not built: run"), "glm4_kernels was not built: run$"),
        (OSError(28, "No space left"), r"\[Errno 28\] No space left$"),
        (KeyError("wat"), r"KeyError: 'wat' \(unexpected; `glm4 --debug \.\.\.` shows where\)$"),
        (RuntimeError("a\nb"), r"RuntimeError: a b \(unexpected"),
        (PanicException("index out of bounds"), r"PanicException: index out .* \(unexpected"),
    ],
)
def test_other_errors_are_one_line_and_debug_shows_them(capsys, monkeypatch, error, line):
    def fail():
        raise error

    monkeypatch.setattr(cli, "environment", fail)
    assert main(["env"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.match(f"glm4: {line}", err.strip()), err
    with pytest.raises(type(error)):
        main(["--debug", "env"])


def test_warnings_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(cli, "environment", lambda: warnings.warn("a\nb", stacklevel=1) or {})
    assert main(["env", "--json"]) == 0
    assert capsys.readouterr().err == "glm4: warning: a b\n"


def test_help_shows_an_example_and_needs_no_torch():
    code = "import sys; from glm4.cli import main\ntry: main(['--help'])\n"
    code += "except SystemExit as stop: assert stop.code == 0\nassert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'glm4 generate --prompt "In the beginning"' in run.stdout


@pytest.mark.parametrize("command", ["generate", "quantize", "env"])
def test_help_of_a_command_shows_its_examples(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert examples and all(line.startswith(f"  glm4 {command}") for line in examples)


def glm4_process(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "glm4", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores Ctrl-C, and what it starts would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_real_process_with_the_demo_model():
    arguments = ("--prompt", "In the", "--max-new-tokens", "16")
    out, err = glm4_process("generate", *arguments).communicate()
    assert re.search(r"\w{3}", out.decode()) and re.fullmatch(SPEEDS, err.decode())


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """Arguments of a process that writes until it is stopped."""
    folder = tmp_path_factory.mktemp("endless")
    write_checkpoint(folder, {"max_position_embeddings": 65536, "eos_token_id": []})
    model = ("--model", str(write_tokenizer(folder)))
    sampling = ("--temperature", "5", "--seed", "1", "--max-new-tokens", "60000")
    return ("generate", *model, *sampling, "--prompt", "In the")


def test_interrupt(endless):
    process = glm4_process(*endless)
    assert process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    assert process.stderr.read().decode() == "\nglm4: interrupted\n"
    assert process.wait() == 130


def test_reader_that_leaves(endless):
    process = glm4_process(*endless)
    assert process.stdout.read(3)
    process.stdout.close()
    assert process.stderr.read().decode() == ""
    assert process.wait() == 141


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.3), (True, 0), (False, 0.3)])
def test_progress_bar_shows_late_and_on_terminals(monkeypatch, terminal, seconds):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    timer = threading.Timer
    monkeypatch.setattr(progress.threading, "Timer", lambda _, action: timer(0.1, action))
    with progress.progress_bar("Reading", 10) as show:
        show(3)
        time.sleep(seconds)
    assert ("Reading" in screen.getvalue()) == (terminal and seconds > 0)
    assert terminal or screen.getvalue() == ""


def test_the_remedy_for_an_unknown_dtype_works(tmp_path, capsys):
    folder = write_tokenizer(write_checkpoint(tmp_path, {"dtype": "int8"}))
    command = ["generate", "--model", str(folder), "--prompt", "a", "--max-new-tokens", "2"]
    assert main(command) == 1
    assert "load with a dtype (--dtype)" in capsys.readouterr().err
    assert main([*command, "--dtype", "float32"]) == 0
    assert "in float32" in capsys.readouterr().err
