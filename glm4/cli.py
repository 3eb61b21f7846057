"""The command line, `glm4 ...`: text or a report on stdout, everything else on stderr.

Exit codes: 0; 1 after an error, told in one line; 2 after a wrong command line; 130 after Ctrl-C;
141 when the reader of stdout has gone. torch is imported only once a command needs it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from glm4.env import environment, report, version

# Without these an error is a bug of ours, and its line says how to get the traceback.
EXPECTED = (ValueError, TypeError, OSError, IndexError, FloatingPointError)

DEVICES = "auto, cpu, cuda, cuda:1, ..."

EXAMPLES = """\
examples:
  glm4 generate --prompt "In the beginning"
  glm4 generate --model zai-org/GLM-4-9B-0414 --temperature 0.8 --top-p 0.8 < prompt.txt
  glm4 quantize zai-org/GLM-4-9B-0414 GLM-4-9B-0414-int4 --bits 4 --group-size 128
  glm4 env
"""


def main(argv: Sequence[str] | None = None) -> int:
    _open_closed_streams()
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        hint = "" if unknown[0].startswith("-") else args.hint.format(" ".join(unknown))
        args.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("\nglm4: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except SystemExit:  # a wrong command line, seen late
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        if args.debug:
            raise
        print(f"glm4: {_one_line(error)}", file=sys.stderr)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _give_up_stdout()
        return 1


def _open_closed_streams() -> None:
    """Else the next file that opens, one of the user's perhaps, is what a library takes for stderr;
    and print(file=None) writes to stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _give_up_stdout() -> None:
    """Else the interpreter's own flush at exit complains."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_stdout() -> None:
    if sys.stdout is None:
        raise ValueError("stdout is closed, so there is nowhere to write to")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="glm4",
        description="GLM-4 on one machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = _add_command(commands, generate, "continue a text", '; did you mean --prompt "{}"?')
    command.add_argument(
        "--model", default="demo", metavar="PATH_OR_REPO", help="default: the bundled demo model"
    )
    command.add_argument("--prompt", metavar="TEXT", help="default: read from stdin")
    at_least_1 = _number(int, "at least 1", lambda n: n >= 1)
    command.add_argument(
        "--max-new-tokens",
        type=at_least_1,
        metavar="N",
        help="default: 256, or what the context leaves",
    )
    command.add_argument(
        "--temperature",
        type=_number(float, "at least 0 and finite", lambda t: 0 <= t < math.inf),
        metavar="T",
        help="1 draws as the model says, less is safer; 0, the default, takes the likeliest",
    )
    command.add_argument(
        "--top-k", type=at_least_1, metavar="K", help="draw from the K likeliest tokens"
    )
    command.add_argument(
        "--top-p",
        type=_number(float, "over 0 and at most 1", lambda p: 0 < p <= 1),
        metavar="P",
        help="draw from the likeliest that reach P",
    )
    positive = _number(float, "over 0 and finite", lambda x: 0 < x < math.inf)
    command.add_argument(
        "--repetition-penalty", type=positive, default=1.0, metavar="X", help="over 1 repeats less"
    )
    command.add_argument(
        "--seed",
        type=_number(int, "at least 0", lambda n: n >= 0),
        metavar="N",
        help="makes a drawn text repeatable",
    )
    command.add_argument("--device", type=_device, default="auto", help=DEVICES)
    command.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32", "float16")
    )
    command.add_argument("--quantize", choices=("int8", "int4"), help="weights, as they are loaded")
    command.add_argument(
        "--activations",
        choices=("int8", "float"),
        help="of quantised layers; default: int8 on a CPU (float: exact, slower), float on a GPU",
    )
    theta = _number(float, "over 1 and at most 1e30", lambda x: 1 < x <= 1e30)
    command.add_argument(
        "--rope-theta", type=theta, metavar="X", help="overrides the one in config.json"
    )
    command.add_argument(
        "--threads",
        type=_number(int, "from 1 to 1024", lambda n: 1 <= n <= 1024),
        metavar="N",
        help="of the CPU; default: all, and fewer while other processes need the processors",
    )

    command = _add_command(commands, quantize, "write a smaller checkpoint")
    command.add_argument("source", metavar="SRC", help="a folder or Hub repository")
    command.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    command.add_argument(
        "--bits", type=int, choices=(4, 8), default=4, help="of the linear layers; default: 4"
    )
    command.add_argument(
        "--group-size",
        choices=("32", "64", "128", "channel"),
        help="weights that share a scale; default: 128, with --bits 8 channel",
    )
    command.add_argument(
        "--asymmetric", action="store_true", help="a zero point per group, beside its scale"
    )
    command.add_argument(
        "--head-bits",
        type=int,
        choices=(4, 8, 16),
        help="of lm_head; 16 leaves it as it is; default: 8, with --for 16",
    )
    command.add_argument(
        "--for",
        dest="engine",
        choices=("transformers", "vllm", "sglang"),
        help="the form that this engine reads right: one scheme for all layers, a 16-bit head",
    )
    command.add_argument("--device", type=_device, default="auto", help=DEVICES)
    command.add_argument(
        "--rope-theta", type=theta, metavar="X", help="written in place of the source's"
    )

    command = _add_command(commands, env, "what is installed, built and found here")
    command.add_argument("--json", action="store_true", help="for programs")
    return parser


def _add_command(commands: Any, run: Callable[..., None], help_: str, hint: str = "") -> Any:
    """A command, its examples among those of all; `hint` follows words that nobody asked for."""
    name = run.__name__
    examples = [line for line in EXAMPLES.splitlines() if line.startswith(f"  glm4 {name}")]
    command = commands.add_parser(
        name,
        help=help_,
        description=run.__doc__,
        epilog="\n".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, error=command.error, hint=hint)
    return command


def _number(kind: type, expected: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """What reads a flag's value for argparse."""

    def read(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value" by it
    return read


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = " ".join(message.replace(": must be ", " must be ").split())
        if message.endswith("required: command"):
            message += ', e.g. `glm4 generate --prompt "Hello"`'
        if message.startswith("argument --"):
            message = message.removeprefix("argument ")
        self.exit(2, f"glm4: {message} (see `{self.prog} --help`)\n")


def _version() -> str:
    return f"glm4-kernels {version() or 'from a source tree, not installed'}"


def env(args: argparse.Namespace) -> None:
    """Shows versions, the CPU, GPUs, what the extension was built with, and what is missing."""
    _check_stdout()
    found = environment()
    print(json.dumps(found, indent=2) if args.json else report(found))


def generate(args: argparse.Namespace) -> None:
    """Continues a text, as it comes, on stdout; then says on stderr how fast that was."""
    _check_stdout()
    if args.prompt is None and sys.stdin is None:
        args.error("--prompt is needed, since stdin is closed")
    drawing = {"--top-k": args.top_k, "--top-p": args.top_p, "--seed": args.seed}
    given = [flag for flag, value in drawing.items() if value is not None]
    if given and args.temperature is None:
        verb = "does" if len(given) == 1 else "do"
        args.error(
            f"{', '.join(given)} {verb} nothing without --temperature: the likeliest token is "
            "taken; add --temperature 1, or --temperature 0 if that is meant"
        )
    from glm4.checkpoint import DTYPES, examine, load, resolve_device
    from glm4.generation import check_prompts, stream
    from glm4.hub import find_folder
    from glm4.progress import progress_bar
    from glm4.tokenizer import TextStream, Tokenizer

    text = _read_stdin() if args.prompt is None else args.prompt

    # What can be wrong with small files shows before gigabytes are read.
    device = resolve_device(args.device)
    folder = find_folder(args.model)
    checkpoint = examine(folder, args.rope_theta)
    if args.activations and not args.quantize and not checkpoint.quantised:
        args.error("--activations is for quantised layers, and here are none; add --quantize int8")
    tokenizer = Tokenizer(folder)
    prompt = tokenizer.encode(text)
    left = checkpoint.config.max_positions - len(prompt)
    max_new_tokens = args.max_new_tokens or max(min(256, left), 1)
    dtype = checkpoint.dtype if args.dtype == "auto" else DTYPES[args.dtype]
    check_prompts(checkpoint.config, dtype, [prompt], max_new_tokens)
    model = load(
        folder,
        device,
        args.dtype,
        args.quantize,
        rope_theta=args.rope_theta,
        activations=args.activations,
        threads=args.threads,
    )

    times = [time.perf_counter()]
    warmups: list[float] = []
    pieces = TextStream(tokenizer)
    with progress_bar("Reading the prompt", len(prompt)) as show:
        on_prefill = lambda done, total: show(done)  # noqa: E731
        on_warmup = lambda what, seconds: warmups.append(seconds)  # noqa: E731
        tokens = stream(
            model,
            [prompt],
            max_new_tokens,
            args.temperature or 0.0,
            args.top_k,
            1.0 if args.top_p is None else args.top_p,
            args.repetition_penalty,
            args.seed,
            on_prefill=on_prefill,
            on_warmup=on_warmup,
        )
        first = next(tokens)
    _write(pieces.push(first[1]))
    times.append(time.perf_counter())
    n_decoded = 0
    for _, token in tokens:
        _write(pieces.push(token))
        n_decoded += 1
    times.append(time.perf_counter())
    _write(pieces.end() + "\n")

    prefill, decode = times[1] - times[0], times[2] - times[1]
    speeds = f"prefill {_speed(len(prompt), prefill)}"
    if n_decoded:
        speeds += f", decode {_speed(n_decoded, decode)}"
    if warmups:
        speeds += f", {sum(warmups):.2f} s of it warm-up"
    computed_in = str(model.dtype).removeprefix("torch.")
    print(f"glm4: {speeds} on {model.device} in {computed_in}", file=sys.stderr)


def quantize(args: argparse.Namespace) -> None:
    """Writes a checkpoint with its linear layers in 4 or 8 bits (compressed-tensors'
    pack-quantized), layer by layer: memory stays that of one layer."""
    from glm4.quantize import ENGINES, quantize_checkpoint

    if args.engine and args.head_bits not in (None, 16):
        args.error(f"--head-bits must be 16 with --for {args.engine}, got {args.head_bits}")
    if args.engine and args.asymmetric and not ENGINES[args.engine]:
        args.error(f"--asymmetric is not read by {args.engine}")
    named = args.group_size or ("128" if args.bits == 4 else "channel")
    target = quantize_checkpoint(
        args.source,
        args.target,
        args.bits,
        None if named == "channel" else int(named),
        not args.asymmetric,
        args.head_bits,
        args.device,
        args.rope_theta,
        engine=args.engine,
    )
    size = sum(path.stat().st_size for path in target.iterdir())
    gigabytes = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    print(f"glm4: wrote {target}, {gigabytes}", file=sys.stderr)


def _speed(n_tokens: int, seconds: float) -> str:
    return f"{n_tokens} tokens in {seconds:.2f} s ({n_tokens / seconds:.1f} tokens/s)"


def _write(text: str) -> None:
    """To stdout at once; a terminal that cannot show a character gets a "?"."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _read_stdin() -> str:
    """All of stdin, without the newline at its end."""
    if sys.stdin.isatty():
        print("glm4: type the prompt, then Ctrl-D on a line of its own", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"glm4: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in message):
        return f"out of memory: {message or 'the system has none left'}"
    if isinstance(error, EXPECTED) or message.startswith("glm4_kernels was"):  # not built
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (unexpected; `glm4 --debug ...` shows where)"
