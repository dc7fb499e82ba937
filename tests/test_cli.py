"""The command line as a user meets it: a process with standard output, errors and an exit code."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
import pty
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import qjax
from qjax import evaluate, models
from qjax.__main__ import main
from qjax.io import folder, safetensors
from qjax.models import saved

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "tiny_llama_q4_k_m.gguf"
TEXT = ROOT / "experiments" / "data" / "README.md"
EVAL = ("--text", TEXT, "--length", 24, "--windows", 3)


def cli(*args, code=0, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qjax", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)
    assert done.returncode == code, done.stderr
    return done


def cli_json(*args) -> dict:
    """What a command prints with --json; in this process, which saves the start of another one."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main([*map(str, args), "--json"])
    assert (code, errors.getvalue()) == (0, "")
    no_number = lambda name: pytest.fail(f"{name} in JSON")
    return json.loads(output.getvalue(), parse_constant=no_number)


@pytest.fixture
def failure(capsys):
    """Runs a command that must fail with one line on standard error, and returns the line.

    It runs in this process, which saves the start of another one.
    """

    def run(*args, code=1) -> str:
        try:
            found = main(list(map(str, args)))
        except SystemExit as stop:
            found = stop.code
        output, errors = capsys.readouterr()
        assert found == code, errors
        assert not output
        assert errors.count("\n") == 1
        assert errors.startswith("qjax")
        return errors

    return run


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "out"
    rule = r"params/embed/embedding=int8"
    args = ("quantize", TINY, "--spec", "int4_g64", "--rule", rule, "--output", path)
    return path, cli_json(*args)


def test_inspect_lists_a_gguf():
    data = cli_json("inspect", TINY)
    assert data["kind"] == "GGUF version 3"
    assert data["metadata"]["general.architecture"] == "llama"
    assert data["metadata"]["tokenizer.ggml.tokens"] == "264 values"
    tensors = {t["name"]: t for t in data["tensors"]}
    assert tensors["blk.0.attn_k.weight"] == {
        "name": "blk.0.attn_k.weight",
        "type": "Q4_K",
        "shape": [128, 256],
        "bits_per_weight": 4.5,
        "bytes": 128 * 144,
    }
    assert data["bytes"] == sum(t["bytes"] for t in data["tensors"])
    assert data["types"]["Q6_K"]["tensors"] == 3
    text = cli("inspect", TINY).stdout
    assert re.search(r"^blk\.0\.attn_k\.weight +Q4_K +128x256 +4\.500 +0\.02$", text, re.MULTILINE)
    assert re.search(r"^total +12 +529,152 +5\.187", text, re.MULTILINE)


def test_inspect_lists_a_hugging_face_folder_and_a_safetensors_file(tmp_path):
    data = cli_json("inspect", GOLDEN / "hf" / "qwen2")
    assert data["kind"] == "Hugging Face folder"
    assert any(t["name"] == "model.embed_tokens.weight" for t in data["tensors"])
    safetensors.write(tmp_path / "x.safetensors", {"w": np.zeros((2, 3), np.float16)}, {"a": "b"})
    data = cli_json("inspect", tmp_path / "x.safetensors")
    assert (data["kind"], data["metadata"]) == ("safetensors", {"a": "b"})
    assert data["tensors"][0]["type"] == "F16"
    assert data["bits_per_weight"] == 16


def test_quantize_writes_what_it_says(quantized_folder):
    path, data = quantized_folder
    rows = {row["path"]: row for row in data["parameters"]}
    assert rows["params/embed/embedding"]["format"] == "int8 [256]"
    assert rows["params/layers_0/mlp/up/kernel"]["format"] == "int4 [64,1]"
    assert rows["params/norm/scale"]["kept"] == "no matmul and no lookup takes it directly"
    assert data["bytes"] == sum(row["bytes"] for row in data["parameters"])
    inspected = cli_json("inspect", path)
    assert inspected["kind"] == "qjax folder"
    assert inspected["bytes"] == data["bytes"]
    assert inspected["metadata"]["model.num_layers"] == 1
    held = {t["name"]: (t["type"], t["bytes"]) for t in inspected["tensors"]}
    assert held == {name: (row["format"], row["bytes"]) for name, row in rows.items()}


def test_what_a_recipe_keeps_stays_in_the_codes_of_the_file(tmp_path):
    args = ("quantize", TINY, "--spec", "int8", "--rule", ".*/down/kernel=none")
    data = cli_json(*args, "--output", tmp_path / "out")
    rows = {row["path"]: row for row in data["parameters"]}
    assert rows["params/embed/embedding"]["format"].startswith("q4_k")
    assert "is_gathered" in rows["params/embed/embedding"]["kept"]
    assert rows["params/layers_0/mlp/down/kernel"]["format"].startswith("q6_k")
    assert rows["params/layers_0/mlp/up/kernel"]["format"].startswith("int8")


def test_quantize_writes_gguf_files(tmp_path, failure):
    path = tmp_path / "out.gguf"
    args = ("quantize", TINY, "--spec", "q8_0", "--rule", ".*/down/kernel=q4_k", "--output", path)
    data = cli_json(*args)
    assert data["output"] == str(path)
    types = {t["name"]: t["type"] for t in cli_json("inspect", path)["tensors"]}
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == types["token_embd.weight"] == "Q4_K"
    assert "exists; choose another --output, or give --force" in failure(*args)
    assert cli_json(*args, "--force") == data

    args = ("quantize", TINY, "--spec", "int4_g32", "--output", tmp_path / "x.gguf")
    assert "GGUF has no type for int4_g32; it has q4_0, " in failure(*args)
    args = ("quantize", GOLDEN / "hf" / "qwen2", "--spec", "q8_0", "--output", "x.gguf")
    assert "is a folder; write a folder" in failure(*args)


def test_quantize_writes_hugging_face_folders(tmp_path, failure):
    from qjax import __main__ as command
    from qjax.models.saved_hf import WRITERS

    assert set(command._CODECS) == set(WRITERS)
    source, path = GOLDEN / "hf" / "qwen2", tmp_path / "out"
    args = ("quantize", source, "--spec", "uint4_g16", "--output", path)
    data = cli_json(*args, "--codec", "gptq")
    formats = {row["path"]: row["format"] for row in data["parameters"]}
    assert formats["params/layers_0/mlp/up/kernel"] == "uint4 [16,1]"
    assert formats["params/head/kernel"] == "float32"
    about = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["bits"], about["group_size"]) == ("gptq", 4, 16)
    _, params, _ = models.load(path)
    held = params["params"]["layers_0"]["mlp"]["up"]["kernel"]
    assert (held.format, held.scale.dtype.name) == ("uint4", "float16")
    assert cli_json("eval", path, *EVAL)["windows"] == 3
    signed = ("quantize", source, "--spec", "int4_g16_asym", "--output", tmp_path / "signed")
    cli_json(*signed, "--codec", "gptq")
    tensors = [safetensors.read_folder(p)[0] for p in (path, tmp_path / "signed")]
    for name, array in tensors[0].items():
        np.testing.assert_array_equal(tensors[1][name], array, name)
    assert "exists" in failure(*args, "--codec", "gptq")
    assert "--output must be a new folder" in failure(*args, "--codec", "gptq", "--force")
    new = ("--output", tmp_path / "x", "--codec")
    for spec, codec, message in (
        ("nf4_g16", "gptq", "gptq has no form for nf4_g16"),
        ("int5", "gptq", "gptq has no form for int5"),
        ("int8", "awq", "it has int and uint of 4 bits"),
        ("int8/int8_token", "gptq", "no place for codes of activations"),
        ("int4_16x16", "compressed-tensors", "groups along the inputs"),
        ("int4_g16", "bitsandbytes", "it has nf4, fp4_bnb, int8"),
        ("nf4_g16_dq", "bitsandbytes", "no place for codes of activations or of scales"),
    ):
        assert message in failure("quantize", source, "--spec", spec, *new, codec)
    rule = ("--rule", ".*/up/kernel=nf4_g16")
    assert "has no form for nf4" in failure(
        "quantize", source, "--spec", "int4", *rule, *new, "awq"
    )
    deep = ("--output", tmp_path / "no" / "x", "--codec", "gptq")
    assert "there is no folder" in failure("quantize", source, "--spec", "int4_g16", *deep)
    args = ("quantize", TINY, "--spec", "int4_g32", *new, "awq")
    assert f"and {TINY} is none" in failure(*args)
    assert not (tmp_path / "x").exists()


def test_scales_of_awq_are_folded_into_a_hugging_face_folder(tmp_path):
    source, path = GOLDEN / "hf" / "llama", tmp_path / "out"
    args = ("quantize", source, "--spec", "int4_g16", "--algorithm", "awq", "--calibration", TEXT)
    args += ("--length", 16, "--windows", 4, "--output", path)
    cli_json(*args, "--codec", "awq", "--report", tmp_path / "report")
    _, params, _ = models.load(path)
    held = [v for v in jax.tree.leaves(params, is_leaf=qjax.is_qtensor) if qjax.is_qtensor(v)]
    assert {(q.format, q.activation, q.scale.dtype.name) for q in held} == {
        ("int4", None, "float16")
    }
    norm = models.load(source)[1]["params"]["layers_0"]["mlp_norm"]["scale"]
    assert np.abs(params["params"]["layers_0"]["mlp_norm"]["scale"] - norm).max() > 1e-3


def test_routers_are_kept_in_a_hugging_face_folder(tmp_path):
    args = ("quantize", GOLDEN / "hf" / "mixtral", "--spec", "int4_g16", "--output", tmp_path / "x")
    data = cli_json(*args, "--codec", "compressed-tensors")
    formats = {row["path"]: row["format"] for row in data["parameters"]}
    assert formats["params/layers_0/mlp/router/kernel"] == "float32"
    kernel = models.load(tmp_path / "x")[1]["params"]["layers_0"]["attention"]["q"]["kernel"]
    assert kernel.scale.dtype.name == "bfloat16"


def test_scales_of_awq_are_folded_into_a_gguf_file_or_refused(tmp_path, failure):
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    args = ("quantize", TINY, "--spec", "q4_0", "--algorithm", "awq", "--calibration", text)
    args += ("--length", "16", "--windows", "4", "--output")
    path = tmp_path / "out.gguf"
    # q has no scale, and k and v behind the same norm do
    refused = failure(*args, path, "--rule", ".*/q/kernel=q4_0", "--json")
    assert "params/layers_0/attention/k/kernel: its input_scale and of 1 more cannot" in refused
    assert not path.exists()
    rule = ("--rule", ".*/o/kernel=q4_0")
    cli_json(*args, path, *rule)
    cli_json(*args, tmp_path / "unfolded", *rule)
    cli_json(*args, tmp_path / "whole.gguf")  # heads that share values share the scales of o
    model, params, _ = models.load(path)
    _, unfolded, _ = models.load(tmp_path / "unfolded")
    assert unfolded["params"]["layers_0"]["attention"]["q"]["kernel"].activation is not None
    ids = np.arange(24).reshape(1, 24)
    run = lambda p: np.asarray(qjax.quantized(model.apply)(p, ids), np.float64)
    logits, wanted = run(params), run(unfolded)
    assert np.linalg.norm(logits - wanted) < 2e-3 * np.linalg.norm(wanted)
    _, whole, _ = models.load(tmp_path / "whole.gguf")
    v = lambda p: p["params"]["layers_0"]["attention"]["v"]["kernel"].scale.astype(np.float32)
    assert np.abs(v(whole) / v(params) - 1).max() > 0.05


def test_quantize_overwrites_only_what_qjax_wrote_and_only_when_forced(tmp_path, failure):
    args = ("quantize", TINY, "--spec", "int8", "--output", tmp_path / "out")
    folder.write_folder(tmp_path / "out", {"w": np.zeros(3)})
    assert "exists; choose another --output, or give --force" in failure(*args)
    text = cli(*args, "--force").stdout
    assert re.search(r"^int8 \[256,1\] +8 ", text, re.MULTILINE)
    assert f"{tmp_path / 'out'}: " in text
    assert saved.load_folder(tmp_path / "out")[0].config.num_layers == 1
    (tmp_path / "mine").mkdir()
    args = ("quantize", TINY, "--spec", "int8", "--output", tmp_path / "mine", "--force")
    assert "is no folder that qjax wrote" in failure(*args)


def test_eval_is_the_library_on_the_same_windows(quantized_folder):
    path, _ = quantized_folder
    data = cli_json("eval", path, *EVAL, "--reference", TINY)
    model, params, tokenizer = models.load(TINY)
    cut = evaluate.text_windows(tokenizer, TEXT.read_text(), 24, 3)
    assert (cut[:, 0] == tokenizer.bos_id).all()
    expected = evaluate.perplexity(qjax.quantized(model.apply), params, [cut])
    assert data["reference"]["perplexity"] == pytest.approx(expected.value, rel=1e-5)
    assert data["reference"]["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert data["ratio"] == pytest.approx(
        data["perplexity"] / data["reference"]["perplexity"], rel=1e-9
    )
    assert 0 < data["kl"] < 0.5
    assert 0 < data["top1"] <= 1
    assert (data["windows"], data["length"], data["tokens"]) == (3, 24, 3 * 23)
    alone = cli_json("eval", path, *EVAL)
    assert alone["perplexity"] == pytest.approx(data["perplexity"], rel=1e-6)
    assert "reference" not in alone


def test_eval_prints_a_table_and_reads_standard_input():
    args = ("eval", TINY, "--text", "-", "--length", 24, "--windows", 1)
    text = cli(*args, input=TEXT.read_text()).stdout
    assert re.search(r"^perplexity +\d+\.\d{4} +unknown \(one window\)$", text, re.MULTILINE)
    assert "1 windows of 24 tokens, 23 scored" in text


def test_generate_is_the_library(quantized_folder):
    args = ("generate", quantized_folder[0], "--prompt", "Call me", "--max-tokens", 5)
    model, params, tokenizer = saved.load_folder(quantized_folder[0])
    fn = qjax.quantized(model.apply)
    generate = models.generator(fn, model.config, max_new_tokens=5, stop_ids=tokenizer.stop_ids)
    found = generate(params, [tokenizer.encode("Call me")])
    tokens = found.tokens[0, : int(found.lengths[0])].tolist()
    stopped = tokens[-1] in tokenizer.stop_ids
    text = tokenizer.decode(tokens[:-1] if stopped else tokens)
    assert " ".join(cli(*args).stdout.split()) == " ".join(f"Call me{text}".split())


def test_sampling_depends_on_the_seed():
    args = ("generate", TINY, "--prompt", "Call me", "--max-tokens", 8, "--temperature", 2)
    args = (*args, "--top-k", 200, "--top-p", 0.99)
    first = cli_json(*args, "--seed", 1)["tokens"]
    model, params, tokenizer = models.load(TINY)
    generate = models.generator(
        qjax.quantized(model.apply),
        model.config,
        max_new_tokens=8,
        temperature=2,
        top_k=200,
        top_p=0.99,
        stop_ids=tokenizer.stop_ids,
    )
    prompt = [tokenizer.encode("Call me")]
    found, other = (generate(params, prompt, jax.random.key(seed)) for seed in (1, 2))
    assert first == found.tokens[0, : int(found.lengths[0])].tolist()
    assert found.tokens.tolist() != other.tokens.tolist()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "nothing.gguf"), "nothing.gguf: no such file or folder"),
        (("inspect", ROOT / "Makefile"), "is no GGUF file"),
        (("eval", "nothing.gguf", *EVAL), "nothing.gguf: no such file or folder"),
        (("eval", TINY, "--text", "nothing.txt"), "nothing.txt"),
        (("eval", TINY, "--text", TINY), "is not UTF-8 text"),
        (("eval", TINY, "--text", TEXT, "--length", 512), "--length 512 exceeds the 256 positions"),
        (("eval", TINY, "--text", TEXT, "--length", 200, "--windows", 99), "needed 99"),
        (("generate", TINY, "--prompt", "x", "--max-tokens", 999), "exceed the model's 256"),
        (("generate", TINY, "--prompt", "x", "--temperature", "nan"), "temperature must be"),
        (
            ("quantize", TINY, "--spec", "int8", "--rule", "embed=int4", "--output", "never"),
            "rule 'embed' matches no parameter (close: ",
        ),
    ],
)
def test_a_failure_is_one_line_and_code_1(args, message, failure):
    assert message in failure(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "COMMAND"),
        (("paint",), "invalid choice: 'paint'"),
        (("quantize", TINY), "required: --spec, --output"),
        (
            ("quantize", TINY, "--spec", "int9", "--output", "x"),
            "'int9' starts with no known format",
        ),
        (("quantize", TINY, "--spec", "int8", "--rule", "x", "--output", "x"), "PATTERN=SPEC"),
        (("quantize", TINY, "--spec", "int8", "--rule", "(=int8", "--output", "x"), "no regular"),
        (("eval", TINY, "--text", TEXT, "--length", "1"), "an integer of at least 2, got '1'"),
        (("generate", TINY, "--prompt", "x", "--top-k", "zero"), "an integer of at least 1"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(args, message, failure):
    line = failure(*args, code=2)
    assert message in line
    assert "--help" in line


@pytest.mark.parametrize("command", ["inspect", "quantize", "eval", "generate"])
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--json" in text
    for option in re.findall(r"^  (--[a-z-]+)(?: \S+)?$", text, re.MULTILINE):
        assert re.search(rf"^  {option}(?: \S+)?\n {{20,}}\S", text, re.MULTILINE), option


def test_exit_codes_leave_the_process():
    done = cli("inspect", "nothing.gguf", code=1)
    assert done.stderr == "qjax inspect: error: nothing.gguf: no such file or folder\n"
    assert cli("paint", code=2).stderr.startswith("qjax: error: ")


def test_a_broken_file_is_named(tmp_path, failure):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(TINY.read_bytes()[:2000])
    assert str(broken) in failure("inspect", broken)
    assert str(broken) in failure("generate", broken, "--prompt", "x")


def test_no_file_writes_to_the_terminal(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.write(path, {"\x1b[2Jw": np.zeros(2, np.float32)}, {"\x1b]0;": "\x9b31m [red]"})
    text = cli("inspect", path).stdout
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "[red]" in text
    assert r"\x1b[2Jw" in text


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m qjax inspect {TINY} --json | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "{\n"
    assert not done.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_is_shown_to_a_person_and_keeps_out_of_the_output(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qjax", "eval", TINY, *EVAL, "--json"]
    with subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not chunk:
                break
            seen += chunk
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["windows"] == 3
    os.close(ours)
    assert b"Evaluating" in seen
    assert b"Loading" in seen


def test_the_tokenizer_of_a_folder_travels_with_it(quantized_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(quantized_folder[0], moved)
    data = cli_json("generate", moved, "--prompt", "Call me", "--max-tokens", 2)
    assert data["prompt_tokens"] == len(models.load(TINY)[2].encode("Call me"))


def test_quantize_calibrates_with_a_text(tmp_path, failure):
    out, base = tmp_path / "out", tmp_path / "errors"
    data = cli_json(
        *("quantize", TINY, "--spec", "int4_g32", "--algorithm", "gptq", "--output", out),
        *("--calibration", TEXT, "--windows", 3, "--length", 24, "--batch", 2, "--report", base),
        *("--checkpoint", tmp_path / "run", "--rule", ".*(q|k|v|o|gate|up)/kernel=none"),
    )
    solved = {entry["path"]: entry for entry in data["solved"]}
    assert len(solved) == len([p for p in data["parameters"] if p["format"].startswith("int4")])
    assert all(entry["tokens"] == 3 * 24 for entry in solved.values())
    before, after = (sum(e[f"error_{n}"] for e in solved.values()) for n in ("before", "after"))
    assert 0 < after < before
    assert json.loads((tmp_path / "errors.json").read_text())["solved"] == data["solved"]
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert data["picture"] is None
    model, params, _ = models.load(out)
    logits = qjax.quantized(model.apply)(params, np.ones((1, 3), np.int32))
    assert np.isfinite(logits).all()
    short = ("--calibration", TEXT, "--windows", 10**6)
    args = ("quantize", TINY, "--spec", "int4_g32", "--output", tmp_path / "x")
    assert "give a longer text" in failure(*args, "--algorithm", "awq", *short)
    assert "give --calibration FILE" in failure(*args, "--algorithm", "gptq")
    assert "takes no --calibration" in failure(*args, "--algorithm", "hqq", *short)
