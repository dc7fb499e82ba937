"""The command line: ``python -m qjax`` or ``qjax``.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 the
command failed, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

_DESCRIPTION = "Quantize language models, and see what it does to them."
_MODEL = "a GGUF file, a Hugging Face folder, or a folder that `qjax quantize` wrote"
_SPECS = (
    "such as int8, int4_g64, uint4_g32, nf4_g64_dq, fp8_e4m3 or int8/int8_token: "
    "format[_gN | _RxC | _tensor][_asym][_dq][/activation]"
)
_CODECS = ("gptq", "awq", "compressed-tensors", "bitsandbytes")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    args = _parser().parse_args(argv)
    # The commands import JAX, which takes a second that --help need not wait for.
    try:
        command = importlib.import_module(f"qjax.cli.{args.module}")
        common = importlib.import_module("qjax.cli.common")
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        return _failed(args, "the package tokenizers is missing; pip install 'qjax[models]'")
    try:
        output = command.run(args)
        if args.json:
            print(json.dumps(output.data, indent=1, ensure_ascii=False))
        else:
            output.show(common.output_console())
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _failed(args, common.printable(_one_line(error)))
    except KeyboardInterrupt:
        return _failed(args, "interrupted")
    return 0


def _failed(args: argparse.Namespace, message: str) -> int:
    print(f"qjax {args.command}: error: {message}", file=sys.stderr)
    return 1


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("qjax", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, module: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        command.set_defaults(module=module)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        return command

    inspect = add("inspect", "inspect", "show the metadata and tensors of a file or folder")
    inspect.add_argument(
        "path", metavar="FILE", help="a GGUF or safetensors file, or a folder with either manifest"
    )

    quantize = add("quantize", "quantize", "quantize the weights of a model into a new folder")
    quantize.add_argument("model", metavar="MODEL", help=_MODEL)
    quantize.add_argument(
        "--spec", required=True, type=_spec, help=f"what every matmul weight becomes, {_SPECS}"
    )
    quantize.add_argument(
        "--rule",
        action="append",
        default=[],
        type=_rule,
        metavar="PATTERN=SPEC",
        help="what the parameters become whose whole path matches this regular expression; the "
        "spec none keeps them; rules go before --spec, the first that matches decides; embeddings "
        "and tied heads are kept unless a rule names them",
    )
    quantize.add_argument(
        "--algorithm",
        choices=("rtn", "gptq", "awq", "smoothquant", "llm_int8", "hqq"),
        help="how codes are chosen for --spec (rules round to nearest)",
    )
    quantize.add_argument(
        "--calibration", metavar="FILE", help="UTF-8 text for algorithms that calibrate; - is stdin"
    )
    quantize.add_argument(
        "--windows", type=_at_least(1), default=64, metavar="N", help="windows of that text (64)"
    )
    quantize.add_argument(
        "--length", type=_at_least(2), default=512, metavar="N", help="tokens per window (512)"
    )
    quantize.add_argument(
        "--batch", type=_at_least(1), default=4, metavar="N", help="windows run at once (4)"
    )
    quantize.add_argument(
        "--checkpoint", metavar="DIR", help="save every site here, and resume from here"
    )
    quantize.add_argument(
        "--report",
        metavar="BASE",
        help="write the error of each weight to BASE.json and BASE.png (DIR-report)",
    )
    quantize.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="the folder to write; FILE.gguf, if MODEL is such a file: a GGUF file for llama.cpp",
    )
    quantize.add_argument(
        "--codec",
        choices=_CODECS,
        help="write DIR as a Hugging Face folder of this kind; MODEL is such a folder, quantized "
        "or not. Head and routers are kept unless a rule names them",
    )
    quantize.add_argument(
        "--force", action="store_true", help="replace DIR if qjax wrote it earlier, or FILE.gguf"
    )

    evaluate = add("eval", "evaluate", "measure the perplexity of a model on a text")
    evaluate.add_argument("model", metavar="MODEL", help=_MODEL)
    evaluate.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text; - is stdin")
    evaluate.add_argument(
        "--windows", type=_at_least(1), metavar="N", help="windows to evaluate (default: all)"
    )
    evaluate.add_argument(
        "--length", type=_at_least(2), default=512, metavar="N", help="tokens per window (512)"
    )
    evaluate.add_argument(
        "--batch", type=_at_least(1), default=2, metavar="N", help="windows run at once (2)"
    )
    evaluate.add_argument(
        "--reference", metavar="MODEL", help="also report ratio, KL and top-1 agreement against it"
    )

    generate = add("generate", "generate", "continue a prompt")
    generate.add_argument("model", metavar="MODEL", help=_MODEL)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    generate.add_argument(
        "--max-tokens", type=_at_least(1), default=64, metavar="N", help="at most this many (64)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (0)"
    )
    generate.add_argument(
        "--top-k", type=_at_least(1), metavar="K", help="sample from the K likeliest tokens"
    )
    generate.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens that sum to P"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    return parser


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.lstrip("-").isdigit() else None
        if value is None or value < low:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}, got {text!r}")
        return value

    return parse


def _spec(text: str) -> Any:
    spec = importlib.import_module("qjax.spec")
    return _argument(spec.Spec.parse, text)


def _rule(text: str) -> Any:
    return _argument(importlib.import_module("qjax.cli.quantize").parse_rule, text)


def _argument(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(_one_line(error)) from error


def _version() -> str:
    try:
        return f"qjax {importlib.metadata.version('qjax')}"
    except importlib.metadata.PackageNotFoundError:
        return "qjax (not installed)"


if __name__ == "__main__":
    sys.exit(main())
