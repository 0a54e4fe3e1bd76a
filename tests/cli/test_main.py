"""The command line: help for newcomers, short errors, right exit status. No model is loaded."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time

import pytest

from aqua_jax.cli import flags as common
from aqua_jax.cli import main as cli
from aqua_jax.cli.flagset import FlagSet, UsageError
from aqua_jax.cli.parsers import WeightsParser, format_size, format_weights, parse_size
from aqua_jax.config import EngineConfig, SamplingParams
from tests.cli.text_model import run_command


def call(capsys, *arguments):
    """(status, stdout, stderr) of a command run in this process."""
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_overview_names_commands_and_shows_two_examples(capsys, arguments):
    status, out, err = call(capsys, *arguments)
    assert status == 0 and err == ""
    for command in ("generate", "batch", "bench"):
        assert f"\n  {command}" in out
    assert out.count("\n  aqua-jax ") == 2


@pytest.mark.parametrize("command", ["generate", "batch", "bench"])
def test_command_help_has_its_own_flags_and_nobody_elses(capsys, command):
    status, out, _ = call(capsys, command, "--model=x", "--help")
    assert status == 0
    assert call(capsys, "help", command)[1] == out
    own = {"generate": "--prompts_file", "batch": "--output=", "bench": "--workload"}
    for name, flag in own.items():
        assert (flag in out) == (name == command)
    for field in dataclasses.fields(EngineConfig):
        assert f"--{field.name}=" in out or f"--[no]{field.name}" in out
    assert "256MiB" in out and "auto|bfloat16|float32" in out
    for foreign in ("--alsologtostderr", "--logger_levels", "--pdb", "--undefok"):
        assert foreign not in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_help_is_quick_and_imports_no_jax():
    code = (
        "import sys; from aqua_jax.cli.main import main; main(['generate', '--help']);"
        "bad = {'jax', 'numpy', 'flax', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("help", "batc"), ["unknown command 'batc'", "Did you mean batch?"]),
        (("generate", "--nochat=1"), ["--nochat=1 does not take an argument"]),
        (("generate", "--flagfile=/no/such"), ["--flagfile", "No such file"]),
        (
            ("generate", "--model=x", "--prompt=p", "--logprobs=2"),
            ["--logprobs means nothing without --json"],
        ),
        (("lend", "--listen=@x", "--bytes=9000TiB"), ["--bytes=9000TiB", "available"]),
        (("gnerate",), ["unknown command 'gnerate'", "Did you mean generate?"]),
        (("--model=x",), ["the command comes first", "--model=x"]),
        (("generate", "--modle=x"), ["unknown flag --modle", "Did you mean --model?"]),
        (("generate", "--nopreffix_caching"), ["Did you mean --noprefix_caching?"]),
        (("generate", "word"), ["unexpected argument 'word'"]),
        (("generate",), ["--model is required"]),
        (("generate", "--model"), ["Missing value for flag --model"]),
        (("generate", "--model=x"), ["--prompt=TEXT", "--prompts_file=FILE"]),
        (("generate", "--model=x", "--prompt="), ["--prompt=", "at least one character"]),
        (("generate", "--dtype=f16"), ["--dtype=f16", "allowed: auto, bfloat16, float32"]),
        (("generate", "--kv_cache_memory=3 apples"), ["--kv_cache_memory=3 apples", "256MiB"]),
        (("generate", "--max_num_seqs=0"), ["--max_num_seqs=0", "allowed: an integer >= 1"]),
        (("generate", "--seed=x"), ["--seed=x", "allowed: an integer"]),
        (("generate", "--top_p=2"), ["--top_p=2", "allowed: a number from"]),
        (("generate", "--temperature=nan"), ["--temperature=nan", "0 to 100"]),
        (("generate", "--chat=maybe"), ["--chat=maybe", "allowed: true or false"]),
        (("generate", "--model=x", "--page_tokens=3"), ["--page_tokens=3", "power of two"]),
        (
            ("generate", "--model=x", "--prompt=p", "--min_tokens=9", "--max_new_tokens=2"),
            ["--min_tokens=9", "at most max_tokens (2)"],
        ),
        (
            ("generate", "--model=x", "--prompt=p", "--stop_token_ids=a"),
            ["--stop_token_ids=a", "integers"],
        ),
        (
            ("generate", "--model=x", "--prompts_file=/no/such"),
            ["--prompts_file=/no/such", "No such file"],
        ),
        (("batch", "--model=x"), ["--input is required"]),
        (("batch", "--model=x", "--input=a"), ["--output is required"]),
        (("batch", "--model=x", "--input=/no/a", "--output=b"), ["--input=/no/a", "exists"]),
        (("bench", "--model=x", "--workload=sngle"), ["--workload=sngle", "single, prefill"]),
        (
            ("bench", "--model=x", "--kv_cache_tokens=64", "--kv_cache_memory=1MiB"),
            ["give one of them"],
        ),
        (
            ("serve", "--model=x", "--policy=fcfs", "--host_kv_memory=1GiB"),
            ["--host_kv_memory=1GiB", "0 or none given with policy fcfs"],
        ),
        (
            ("serve", "--model=x", "--policy=priority", "--slice_steps=4"),
            ["--slice_steps", "policy priority", "for fair"],
        ),
        (
            ("bench", "--model=x", "--workload=burst", "--policies=fcfs,priority",
             "--tbt_slo_ms=4"),
            ["--tbt_slo_ms", "policy fcfs, priority", "for fair"],
        ),
        (
            ("generate", "--model=x", "--prompt=p", "--policy=fcfs", "--verify_pages"),
            ["--verify_pages", "policy fcfs", "fair, fcfs_swap, priority"],
        ),
        (
            ("serve", "--model=x", "--slice_steps=8", "--tbt_slo_ms=100"),
            ["--tbt_slo_ms", "--slice_steps=8", "automatic slices"],
        ),
        (
            ("serve", "--model=x", "--user_weights=alice=2,bob=0"),
            ["--user_weights=alice=2,bob=0", "NAME=WEIGHT", "finite numbers > 0"],
        ),
        (
            ("batch", "--model=x", "--input=a", "--output=b", "--user_weights=alice=2"),
            ["--user_weights", "policy fcfs_swap", "for fair"],
        ),
        (("serve", "--model=x", "--lend_hold_s=1"), ["--lend_hold_s", "without --lend=auto"]),
        (
            ("serve", "--model=x", "--peer_kv_memory=1MiB"),
            ["--peer_kv_memory=1MiB", "none given without a peer"],
        ),
        (
            ("lend", "--listen=@x", "--bytes=1MiB", "--scrub"),
            ["--scrub means nothing without --socket"],
        ),
        (
            ("lend", "--socket=@x", "--bytes=1MiB", "--resize"),
            ["--resize means nothing without --listen"],
        ),
        (("lend", "--listen=/no/such/x", "--bytes=1MiB"), ["--listen=/no/such/x", "directory"]),
        (("coordinator", "--socket=/no/such/x"), ["--socket=/no/such/x:", "directory"]),
    ],
)
def test_wrong_usage_is_a_short_message_and_status_2(capsys, arguments, words):
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 2 and "Traceback" not in err
    for word in words:
        assert word in err
    assert "--help" in err.splitlines()[1]


def test_flags_map_one_to_one_onto_the_configuration():
    flags = FlagSet()
    common.define_model_flags(flags)
    common.define_engine_flags(flags)
    common.define_sampling_flags(flags)
    flags.parse(["--model=m"])
    assert common.engine_config(flags) == EngineConfig(model="m")
    assert common.sampling_params(flags) == SamplingParams(max_tokens=128, temperature=0.0)


@pytest.mark.parametrize(("text", "steps"), [("auto", None), ("7", 7)])
def test_slices_are_automatic_or_a_number(text, steps):
    flags = FlagSet()
    common.define_model_flags(flags)
    common.define_engine_flags(flags)
    flags.parse(["--model=m", f"--slice_steps={text}"])
    assert common.engine_config(flags).slice_steps == steps


@pytest.mark.parametrize(("text", "weights"), [
    ("alice=2,bob=0.5", {"alice": 2.0, "bob": 0.5}),
    ("a b=1e-3", {"a b": 1e-3}),
    ("alice=3, bob=1", {"alice": 3.0, "bob": 1.0}),
])
def test_weights_of_users(text, weights):
    flags = FlagSet()
    common.define_model_flags(flags)
    common.define_engine_flags(flags)
    flags.parse(["--model=m", f"--user_weights={text}"])
    assert common.engine_config(flags).user_weights == weights
    assert WeightsParser().parse(format_weights(weights)) == weights


@pytest.mark.parametrize(
    "text",
    ["", "alice", "=2", "alice=", "alice=x", "alice=-1", "alice=inf", "alice=nan", "alice=2,",
     "alice=2,alice=3", "alice==2", "alice=2;bob=1"],
)
def test_wrong_weights_of_users_say_flag_value_and_allowed(text):
    flags = FlagSet()
    common.define_model_flags(flags)
    common.define_engine_flags(flags)
    with pytest.raises(UsageError) as info:
        flags.parse(["--model=m", f"--user_weights={text}"])
    assert f"--user_weights={text}: allowed: NAME=WEIGHT" in str(info.value)


def test_flags_set_every_field():
    flags = FlagSet()
    common.define_model_flags(flags)
    common.define_engine_flags(flags)
    common.define_sampling_flags(flags)
    flags.parse([
        "--model=m", "--tokenizer=t", "--load_format=dummy", "--dtype=float32",
        "--kv_dtype=float32",
        "--kv_cache_tokens=4096", "--page_tokens=32",
        "--max_model_len=99", "--max_num_seqs=3", "--max_step_tokens=77", "--max_chunk_tokens=7",
        "--noprefix_caching", "--policy=priority", "--switch_share=0.3",
        "--host_kv_memory=0", "--peer=/run/p", "--peer_kv_memory=1GiB", "--verify_pages",
        "--lend=auto", "--coordinator=/run/c", "--lend_kv_memory=1MiB", "--lend_reserve=0.2",
        "--lend_hold_s=3", "--lend_deadline_s=4", "--lend_bandwidth=0",
        "--trace_events=e.json",
        "--attention=reference", "--matmul=xla", "--platform=cpu", "--device_memory_fraction=0.5",
        "--deterministic", "--warmup=full", "--compile_cache_dir=", "--seed=5",
        "--max_new_tokens=9", "--n=2", "--stop=a", "--stop=b", "--stop_token_ids=4", "--top_k=3",
        "--sampling_seed=8", "--logprobs=0",
    ])
    config = common.engine_config(flags)
    changed = [
        field.name for field in dataclasses.fields(EngineConfig)
        if getattr(config, field.name) == field.default
    ]
    assert changed == ["kv_cache_memory", "slice_steps", "tbt_slo_ms", "tensor_parallel"]
    assert config.compile_cache_dir == ""
    assert config.host_kv_memory == 0 and config.peer_kv_memory == 1 << 30
    assert config.lend_kv_memory == 1 << 20
    params = common.sampling_params(flags)
    assert params.stop == ("a", "b") and params.stop_token_ids == (4,)
    assert (params.n, params.seed, params.logprobs, params.max_tokens) == (2, 8, 0, 9)
    flags = FlagSet()
    common.define_model_flags(flags)
    common.define_engine_flags(flags)
    flags.parse([
        "--model=m", "--kv_cache_memory=1.5GiB", "--tbt_slo_ms=5", "--tensor_parallel=2",
        "--user_weights=a=2",
    ])
    config = common.engine_config(flags)
    assert config.tensor_parallel == 2 and config.user_weights == {"a": 2.0}
    assert (config.kv_cache_memory, config.slice_steps, config.tbt_slo_ms) == (3 << 29, None, 5.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("256MiB", 256 << 20), ("1.5GiB", 3 << 29), ("2kB", 2000), ("4K", 4096),
     (" 3 mib ", 3 << 20), ("1TB", 10**12)],
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1e9", "3 apples", "99999999TiB", "0.1"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="allowed: a size"):
        parse_size(text)


def test_flags_of_one_command_are_unknown_to_another():
    flags = FlagSet()
    common.define_model_flags(flags)
    with pytest.raises(UsageError, match="unknown flag --stream"):
        flags.parse(["--stream"])


def test_the_console_script_exits_with_the_status():
    done = run_command("generate", "--nope")
    assert done.returncode == 2 and done.stdout == "" and "unknown flag --nope" in done.stderr
    done = run_command("--version")
    assert done.returncode == 0 and done.stdout.startswith("aqua-jax ")
    done = run_command("generate", "--model=/no/such/model", "--prompt=p")
    assert done.returncode == 2 and "generate: flag --model=/no/such/model:" in done.stderr
    assert "Traceback" not in done.stderr


_IN_CALLBACK = """
import gc, signal, time
from aqua_jax.cli import main as cli
def collected(phase, info):
    gc.callbacks.clear()
    signal.raise_signal(signal.SIGINT)
def work(arguments):
    gc.callbacks.append(collected)
    gc.collect()
    time.sleep(60)
cli.main = work
cli.run()
"""
_IN_IMPORT = """
import _imp, signal, time
from aqua_jax.cli import main as cli
make = _imp.create_dynamic
def interrupted(spec, *rest):
    _imp.create_dynamic = make
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.1)
    module = make(spec, *rest)
    print("whole")
    return module
def work(arguments):
    _imp.create_dynamic = interrupted
    import numpy
    time.sleep(60)
cli.main = work
cli.run()
"""
_LOOK = """
from aqua_jax.cli import entry
entry.gentle_interrupts()
print("here", flush=True)
entry.run()
"""


@pytest.mark.parametrize(("code", "said"), [(_IN_CALLBACK, ""), (_IN_IMPORT, "whole\n")])
def test_ctrl_c_ends_the_command_wherever_it_comes(code, said):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (130, said), done.stderr
    assert done.stderr == "\naqua-jax: interrupted\n"


def test_ctrl_c_before_anything_is_imported_leaves_no_traceback():
    for delay_s in (0.06, 0.1, 0.2):
        with subprocess.Popen(
            [sys.executable, "-c", _LOOK, "simulate", "--num_requests=100000"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:
            assert process.stdout.readline() == "here\n"
            time.sleep(delay_s)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=50)
        assert (process.returncode, err) == (130, "\naqua-jax: interrupted\n")
