"""What users rely on before they call anything: names, signatures, a quiet and lean import."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap

import pytest
from conftest import REPOSITORY
from kernels import TRITON_OPS

import glm4
import glm4_kernels as gk

# The public contract. `...`: a default that is not promised. Signatures may gain keyword arguments.
KERNELS = """
rms_norm(x, weight, eps)
add_rms_norm(x, residual, weight, eps)
sandwich_norm(x, residual, post_weight, pre_weight, eps)
swiglu(gate_up)
rope_table(max_positions, theta, rotary_dim=64, mode='reference', scaling=None, dtype=..., device=...)
rope(q, k, positions, table)
rope_kv_write(qkv, positions, table, k_cache, v_cache, slots, n_heads, bias=None, k_scale=None, v_scale=None)
flash_decode(q, k_cache, v_cache, block_table, seq_lens, scale, k_scale=None, v_scale=None, return_lse=False)
merge_attention(out_a, lse_a, out_b, lse_b)
sample(logits, uniform=None, seen=None, temperature=1.0, top_k=None, top_p=1.0, repetition_penalty=1.0)
quantize(weight, bits=4, group_size=128, symmetric=True)
quantized_matmul(x, qweight, bias=None, activations=None)
"""  # noqa: E501
MODEL = """
load(path_or_repo, device='auto', dtype='auto', quantize=None)
Model.logits(self, token_ids)
Model.generate(self, prompts, max_new_tokens, temperature=0.0)
"""


PROMISES = [
    pytest.param(package, line, id=line.partition("(")[0])
    for package, text in ((gk, KERNELS), (glm4, MODEL))
    for line in text.strip().splitlines()
]


def parameters(promise: str) -> dict[str, object]:
    """{name: default} of "f(a, b=1)"; no default is `inspect.Parameter.empty`, any is `...`."""
    arguments = ast.parse(
        f"lambda {promise.partition('(')[2].rstrip(')')}: 0", mode="eval"
    ).body.args
    required = [inspect.Parameter.empty] * (len(arguments.args) - len(arguments.defaults))
    defaults = [*required, *(ast.literal_eval(default) for default in arguments.defaults)]
    return dict(zip((argument.arg for argument in arguments.args), defaults, strict=True))


@pytest.mark.parametrize("package, promise", PROMISES)
def test_promised_signature(package, promise):
    function = package
    for part in promise.partition("(")[0].split("."):
        function = getattr(function, part)
    actual = inspect.signature(function).parameters
    promised = parameters(promise)
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in actual.values())

    named = [name for name, p in actual.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    shared = [name for name in promised if name in actual or not takes_any_keyword]
    assert named[: len(shared)] == shared
    for name in shared:
        if promised[name] is not ...:
            assert actual[name].default == promised[name], name
        else:
            assert actual[name].default is not inspect.Parameter.empty, name
    for name in actual.keys() - promised.keys():
        added = actual[name]
        assert added.default is not added.empty or added.kind is added.VAR_KEYWORD, name


@pytest.mark.parametrize("op", TRITON_OPS)
def test_launcher_takes_the_arguments_of_the_op(op):
    module = importlib.import_module(f"glm4_kernels.{op}")
    launcher = inspect.signature(getattr(module, f"launch_{op}")).parameters
    public = [
        name for name in inspect.signature(getattr(gk, op)).parameters if name != "return_lse"
    ]
    assert list(launcher)[: len(public)] == public
    assert all(
        launcher[name].default is not inspect.Parameter.empty
        for name in list(launcher)[len(public) :]
    )


def test_public_names_are_documented():
    for package in (gk, glm4):
        for name in package.__all__:
            value = getattr(package, name)
            assert not callable(value) or inspect.getdoc(value), f"{package.__name__}.{name}"


def python(script: str) -> str:
    """Runs `script` in a fresh interpreter; its output."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_import_is_quiet_and_lean():
    """No network, no process, no CUDA context, none of what only tests and benchmarks need."""
    output = python("""
        import sys
        import torch

        def refuse(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
                raise RuntimeError(f"{event} {arguments}")

        sys.addaudithook(refuse)
        import glm4_kernels, glm4, glm4.cli, glm4.checkpoint, glm4.generation, glm4.model

        assert not torch.cuda.is_initialized()
        extras = {"transformers", "matplotlib", "benchmarks", "glm4_kernels.ahead_of_time"}
        assert not extras & set(sys.modules), extras & set(sys.modules)
    """)
    assert output == ""


def test_readme_examples_run():
    examples = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        python(example)


def test_command_line_starts_without_torch():
    python("""
        import sys, glm4, glm4.cli
        assert "torch" not in sys.modules
    """)


def test_without_triton_the_cpu_serves():
    output = python("""
        import sys
        sys.modules["triton"] = None
        import torch, glm4_kernels, glm4.model
        from glm4_kernels.rms_norm import rms_norm_reference
        from glm4_kernels.triton_import import HAS_TRITON

        arguments = torch.randn(2, 8), torch.randn(8), 1e-5
        torch.testing.assert_close(
            glm4_kernels.rms_norm(*arguments), rms_norm_reference(*arguments)
        )
        print(HAS_TRITON)
    """)
    assert output == "False\n"


def test_without_the_extension_only_its_op_is_missing():
    output = python("""
        import sys
        sys.modules["glm4_kernels._C"] = None
        import torch, glm4_kernels, glm4.model

        print(glm4_kernels.swiglu(torch.zeros(1, 4)).tolist())
        weight = glm4_kernels.quantize(torch.randn(8, 32), group_size=32)
        try:
            glm4_kernels.quantized_matmul(torch.randn(1, 32), weight)
        except RuntimeError as error:
            print(error)
    """)
    zeros, message = output.splitlines()
    assert zeros == "[[0.0, 0.0]]"
    assert message.startswith("glm4_kernels was not built: run pip install")


def test_version_is_the_distribution_s():
    declared = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    try:
        installed = importlib.metadata.version("glm4-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("glm4-kernels runs from a source tree, not installed")
    assert installed == declared.group(1)


def test_constraints_pin_what_the_metadata_asks_for():
    """Each dependency is pinned, within the bounds of pyproject.toml."""
    from packaging.requirements import Requirement

    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    wanted = [
        Requirement(text)
        for table in re.findall(r"^(?:dependencies|test) = \[(.*?)^\]", pyproject, re.M | re.S)
        for text in re.findall(r'"(.+?)"', table)
    ]
    pins = [
        Requirement(line)
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(wanted) > 8
    for requirement in wanted:
        versions = [
            specifier.version
            for pin in pins
            if pin.name == requirement.name
            for specifier in pin.specifier
        ]
        assert versions, f"{requirement.name} is not in constraints.txt"
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement.name} {version}"


def test_readme_commands_are_commands():
    """Each `glm4 …` in a block of README.md is one that the command line takes."""
    from glm4.cli import _parser

    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [
        shlex.split(line.partition("<")[0], comments=True)[1:]
        for line in lines
        if re.match(r"\s*(\.venv/bin/)?glm4 ", line)
    ]
    assert len(commands) > 4
    for command in commands:
        _parser().parse_args(command)  # exits where it is wrong


def test_the_page_of_the_package_index_has_no_link_into_the_tree(monkeypatch):
    """And keeps the words: what README.md links to stays readable as a path."""
    pytest.importorskip("setuptools", reason="setup.py needs it")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    page = runpy.run_path(str(REPOSITORY / "setup.py"))["page"]()
    assert "](" not in page.replace("](http", "")
    assert "`glm4/model.py`" in page and "benchmarks:start" in page
    assert page.count("\n| ") == (REPOSITORY / "README.md").read_text().count("\n| ")
