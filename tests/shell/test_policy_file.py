"""Policies from YAML: what is understood, what is refused and where it says so, and that nothing else can happen."""

import os
import time
from pathlib import Path

import pytest
from gpusup.supervisor.core.policy import Limits, Policy, Remediation, Restore
from gpusup.supervisor.errors import PolicyError
from gpusup.supervisor.policy_file import dump_policy, find_policy, load_policy, load_policy_text, shipped_policies
from gpusup.supervisor.policy_reader import LIMITS_KEYS, POLICY_KEYS, REMEDIATION_KEYS, RESTORE_KEYS
from gpusup.supervisor.yaml_nodes import Plain, resolve
from hypothesis import given, settings
from hypothesis import strategies as st

FULL = """\
version: 1
description: one line
remediations:
  - name: compile off
    set: {compile: off}
    undo_if_useless: false
  - set: {dtype: float16}
    when: {dtype: bfloat16}
  - step: micro_batch
    min: 2
  - wait_for_memory: 10m
restore: {after_steps: 50, order: [compile, micro_batch, dtype], backoff: 3, max_tries: 4, retry_failed: yes}
limits: {max_attempts: 12, grace: 90s}
checkpoint_every: 25
memory_budget: 1.2GiB
"""


def load(text: str | bytes) -> Policy:
    return load_policy_text(text.encode() if isinstance(text, str) else text, "p.yaml")


def errors(text: str | bytes) -> list[str]:
    """The lines of the message, without `p.yaml:` and `error: `."""
    with pytest.raises(PolicyError) as caught:
        load(text)
    assert caught.value.exit_code == 2
    lines = str(caught.value).splitlines()
    assert all(line.startswith("p.yaml:") for line in lines if not line.endswith(" more"))
    return [line.removeprefix("p.yaml:").replace(": error: ", " ", 1) for line in lines]


# --- what is understood


def test_every_key_is_read() -> None:
    assert load(FULL) == Policy(
        description="one line",
        remediations=(
            Remediation(name="compile off", set={"compile": False}, undo_if_useless=False),
            Remediation(name="dtype float16", set={"dtype": "float16"}, when={"dtype": "bfloat16"}),
            Remediation(name="micro-batch down", step="micro_batch", min=2),
            Remediation(name="wait for memory", wait_for_memory_s=600.0),
        ),
        restore=Restore(after_steps=50, backoff=3.0, max_tries=4, retry_failed=True),
        limits=Limits(max_attempts=12, grace_s=90.0),
        checkpoint_every=25,
        memory_budget_bytes=1288490189,
    )


def test_what_is_left_out_has_its_default() -> None:
    assert load("version: 1") == Policy()
    assert load("version: 1\nrestore: {}\nlimits: {}\nremediations: []") == Policy(restore=Restore())
    assert load("version: 1\nlimits: {grace: 0s}").limits == Limits(grace_s=0.0)


def test_default_names_say_what_is_set() -> None:
    policy = load("{version: 1, remediations: [{set: {compile: on, dtype: float32}}]}")
    assert policy.remediations[0].name == "compile on, dtype float32"


def test_conditions_may_name_any_knob() -> None:
    policy = load("{version: 1, remediations: [{step: micro_batch, when: {batch_size: 12, compile: no}}]}")
    assert policy.remediations[0].when == {"batch_size": 12, "compile": False}


@pytest.mark.parametrize(
    "text", ["\ufeffversion: 1\n", "version: 1\r\n", "---\nversion: 1\n...\n", "%YAML 1.2\n---\nversion: 1"]
)
def test_harmless_forms_of_a_file_are_accepted(text: str) -> None:
    assert load(text) == Policy()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("on", "On", "ON", "yes", "Yes", "YES", "true", "True", "TRUE")),
        *((word, False) for word in ("off", "Off", "OFF", "no", "No", "NO", "false", "False", "FALSE")),
        *((word, None) for word in ("", "~", "null", "Null", "NULL")),
        *(
            (word, word)
            for word in ("22:00", "oN", "y", "n", "1_000", "0b11", "0o8", "1e", "+0x1", "2026-11-01", "=", "\u0661")
        ),
        ("012", 12),
        ("+7", 7),
        ("-7", -7),
        ("0o14", 12),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", float("-inf")),
        (".INF", float("inf")),
    ],
)
def test_scalars_mean_what_yaml_1_2_says_and_switches(text: str, value: Plain) -> None:
    found = resolve(text)
    assert (type(found), found) == (type(value), value)


def test_nan_is_a_number_that_is_none() -> None:
    found = resolve(".nan")
    assert isinstance(found, float)
    assert found != found


# --- what is refused, and where

RUNG = "version: 1\nremediations:\n  - "

REFUSED = {
    # the file
    "empty": ("", "1:1 the policy is empty; the smallest one is {version: 1, remediations: [{step: micro_batch}]}"),
    "only a comment": ("# hello\n", "1:1 the policy is empty; the smallest one is"),
    "only null": ("---\n~\n", "1:1 the policy is empty; the smallest one is"),
    "utf-16": ("version: 1".encode("utf-16"), "1:1 the file is UTF-16, not UTF-8; save it as UTF-8"),
    "utf-16 without a mark": ("version: 1".encode("utf-16-le"), "1:2 a NUL character is not allowed; save the file as"),
    "nul": ("version: 1\nx: a\0b", "2:5 a NUL character is not allowed; remove it"),
    "escape sequence": ("version: 1\n# \x1b[31m", "2:3 the control character U+001B is not allowed; remove it"),
    "line separator": ("version: 1 # a\u2028limits: {}", "1:15 the control character U+2028 is not allowed; remove it"),
    "latin-1": (b"version: 1\ndescription: f\xfcr", "2:15 byte 0xfc is not UTF-8; save the file as UTF-8"),
    "too large": ("#" * 300_000, "1:1 the file is larger than 256 KiB; a policy is a few lines"),
    "too deep": ("version: " + "[" * 60, "1:59 nested more than 50 levels deep; a policy needs five"),
    "too many": ("version: 1\nx: [" + "a," * 3000 + "]", "more than 2000 keys and values; a policy is a few lines"),
    # YAML
    "tab before a key": ("version: 1\nlimits:\n\tgrace: 1s", "3:1 a tab indents this line; replace it with spaces"),
    "tab after spaces": (
        "limits:\n  max_attempts: 1\n \tgrace: 1s",
        "3:2 a tab indents this line; replace it with spaces",
    ),
    "tab that continues": ("version: 1\n\tlimits: 2", "2:1 a tab indents this line; replace it with spaces"),
    "tab before a value": ("version:\t1", "1:9 a tab stands here; replace it with a space"),
    "tab after a value": ("version: 1\t# one", "1:11 a tab stands here; replace it with a space"),
    "duplicate key": ("version: 1\nlimits: {}\nlimits: {}", "3:1 'limits' is given twice, first on line 2; remove one"),
    "alias": ("version: 1\nlimits: *x", "2:9 aliases such as *x are not supported; write the value out"),
    "anchor": ("version: 1\nlimits: &x {}", "2:9 anchors such as &x are not supported; remove it"),
    "python tag": ("version: 1\nlimits: !!python/object/apply:os.system [x]", "2:9 tags such as !!python/object/apply"),
    "plain tag": ("version: !!int 1", "1:10 tags such as !!int are not supported; remove it, and quote the value if"),
    "bare tag": ("version: ! 1", "1:10 tags such as ! are not supported; remove it"),
    "unknown tag handle": ("version: !a!b 1", "1:10 tags are not supported; remove it"),
    "tagged key": ("!x version: 1", "1:1 tags such as !x are not supported; remove it"),
    "merge key": ("version: 1\n<<: {limits: {}}", "2:1 merge keys '<<' are not supported; write the keys out"),
    "two documents": ("version: 1\n---\nversion: 1", "2:1 a second document begins here; a policy is one document"),
    "list as a key": ("version: 1\n? [a]\n: b", "2:3 a key must be a word, not a list or a map; write 'key: value'"),
    "unclosed brace": ("version: 1\nlimits: {grace: 1s", "2:9 the { opened here is never closed; close it"),
    "unclosed quote": ('version: 1\ndescription: "one', '2:14 the " opened here is never closed; close it'),
    "missing comma": ("version: 1\nlimits: {grace: 1s max: 2}", "2:23 a ',' is missing before this; separate the"),
    "second colon": ("version: 1\ndescription: a: b", "2:15 a ':' cannot stand here; check the indentation, or quote"),
    "crooked indentation": ("version: 1\n  limits: {}", "2:9 a ':' cannot stand here; check the indentation"),
    "outdented": ("  version: 1\nlimits: {}", "2:1 this belongs to nothing above; indent it like the keys it stands"),
    "list item beside a key": ("version: 1\n- a", "2:1 this line is indented unlike the lines it stands beside; align"),
    "no colon": ("version: 1\nlimits\n", "3:1 a key without ':'; write 'key: value'"),
    "at sign": ("version: 1\ndescription: @me", "2:14 a text cannot begin with this character; quote the text"),
    "impossible escape": ('description: "\\UFFFFFFFF"', "1:15 an escape that is no character; write the character"),
    "unknown escape": ('description: "\\q"', "1:16 not valid YAML, while scanning a double-quoted scalar: found unk"),
    "later YAML": ("%YAML 2.0\n---\nversion: 1", "1:1 only YAML 1 is known; remove the %YAML line"),
    # shapes and types
    "list at the top": ("- version: 1", "1:1 a policy must be a map, got a list; write keys and values, such as"),
    "text at the top": (
        "hello",
        "1:1 a policy must be a map, got 'hello'; write keys and values, such as {version: 1}",
    ),
    "map for a list": (
        "version: 1\nremediations: {step: micro_batch}",
        "2:15 remediations must be a list, got a map; wr",
    ),
    "nothing for a list": ("version: 1\nremediations:\n", "2:1 remediations must be a list, got nothing; write one"),
    "text for a rung": (RUNG + "micro_batch", "3:5 a remediation must be a map, got 'micro_batch'; write keys"),
    "list for a map": ("version: 1\nlimits: [1]", "2:9 limits must be a map, got a list; write keys and values, such"),
    "switch for a map": (
        "version: 1\nrestore: off",
        "2:10 restore must be a map, got 'off'; write keys and values, such "
        "as {after_steps: 100}, or leave it out to give nothing back",
    ),
    "switch for a number": (
        "version: 1\ncheckpoint_every: yes",
        "2:19 checkpoint_every must be a whole number, got 'yes'",
    ),
    "part for a whole": (
        "version: 1\ncheckpoint_every: 2.5",
        "2:19 checkpoint_every must be a whole number, got '2.5'",
    ),
    "text for a number": ("version: 1\ncheckpoint_every: '5'", "2:19 checkpoint_every must be a whole number, got '5'"),
    "negative": (
        "version: 1\ncheckpoint_every: -5",
        "2:19 checkpoint_every must be at least 1, got '-5'; write a number",
    ),
    "zero": (RUNG + "{step: micro_batch, min: 0}", "3:30 min must be at least 1, got '0'; write a number from 1 on"),
    "too big a number": (
        "version: 1\nlimits: {max_attempts: 99999999999999999}",
        "2:24 max_attempts must be at most 9007",
    ),
    "endless number": (
        "version: 1\ncheckpoint_every: " + "9" * 9000,
        "2:19 checkpoint_every must be a whole number, got ",
    ),
    "number for text": ("version: 1\ndescription: 12", "2:14 description must be text, got '12'; put it in quotes"),
    "switch for a name": (
        RUNG + "{name: off, step: micro_batch}",
        "3:12 name must be text, got 'off'; put it in quotes",
    ),
    "empty name": (RUNG + "{name: ' ', step: micro_batch}", "3:12 name must be text, got ' '; write a few words, or"),
    "two lines": (
        "version: 1\ndescription: |\n  a\n  b\n",
        "2:14 description must be one line of text, got 'a\\nb\\n'; re",
    ),
    "escape in a name": (
        RUNG + '{name: "\\e[31m", step: micro_batch}',
        "3:12 name must be one line of text, got '\\x1b[31m'",
    ),
    "half a character": (
        'version: 1\ndescription: "\\uD800"',
        "2:14 description must be one line of text, got '\\ud800'",
    ),
    "long name": (RUNG + f"{{name: {'x' * 81}, step: micro_batch}}", "3:12 name has 81 characters; write at most 80"),
    # keys
    "no version": ("limits: {}", "1:1 version is missing; write 'version: 1' first"),
    "version 2": ("version: 2\nfuture: [1]", "1:10 version 2 is written for a newer gpusup; update gpusup, or"),
    "version 0": ("version: 0", "1:10 version must be 1, got '0'; write 'version: 1'"),
    "version yes": ("version: yes", "1:10 version must be 1, got 'yes'; write 'version: 1'"),
    "version in quotes": ("version: '1'", "1:10 version must be 1, got '1'; write 'version: 1'"),
    "misspelled key": (
        "version: 1\nremedations: []",
        "2:1 unknown key 'remedations' in the policy; did you mean 'remediations'?",
    ),
    "unlike any key": ("version: 1\nzzz: 1", "2:1 unknown key 'zzz' in the policy; use one of version, description, "),
    "misspelled limit": (
        "version: 1\nlimits: {max_atempts: 2}",
        "2:10 unknown key 'max_atempts' in limits; did you mean 'max_att",
    ),
    "misspelled in restore": (
        "version: 1\nrestore:\n  after_step: 2",
        "3:3 unknown key 'after_step' in restore; did you mean",
    ),
    "no space after colon": (
        "version: 1\nlimits: {grace:1s}",
        "2:10 unknown key 'grace:1s' in limits; write a space after the",
    ),
    # remediations
    "none of the kinds": (
        RUNG + "name: x",
        "3:5 the remediation does nothing; give it one of set, step or wait_for_mem",
    ),
    "two of the kinds": (
        RUNG + "set: {compile: off}\n    step: micro_batch",
        "4:5 'step' stands beside 'set'; a remediation",
    ),
    "unknown knob": (RUNG + "set: {compil: off}", "3:11 unknown setting 'compil' in set; did you mean 'compile'?"),
    "unknown knob in when": (
        RUNG + "{step: micro_batch, when: {dtyp: float16}}",
        "3:32 unknown setting 'dtyp' in when; did you",
    ),
    "knob that is stepped": (
        RUNG + "set: {batch_size: 4}",
        "3:11 a policy may not set batch_size; use 'step: micro_batch',",
    ),
    "another experiment": (
        RUNG + "set: {block_size: 4}",
        "3:11 a policy may not set block_size; that would be another ex",
    ),
    "lever in when": (
        RUNG + "{step: micro_batch, when: {micro_batch: 4}}",
        "3:32 unknown setting 'micro_batch' in when; ",
    ),
    "unknown dtype": (RUNG + "set: {dtype: flot16}", "3:18 unknown dtype 'flot16'; did you mean 'float16'?"),
    "dtype by its nickname": (RUNG + "set: {dtype: fp16}", "3:18 unknown dtype 'fp16'; did you mean 'float16'?"),
    "dtype a number": (
        RUNG + "set: {dtype: 16}",
        "3:18 dtype must be float32, bfloat16 or float16, got '16'; write one",
    ),
    "compile in quotes": (
        RUNG + "set: {compile: 'off'}",
        "3:20 compile must be on or off, got 'off'; remove the quotes",
    ),
    "compile a word": (
        RUNG + "set: {compile: maybe}",
        "3:20 compile must be on or off, got 'maybe'; write 'compile: on' or",
    ),
    "sets nothing": (RUNG + "set: {}", "3:10 set changes nothing; name a setting, such as {compile: off}"),
    "no condition": (
        RUNG + "{step: micro_batch, when: {}}",
        "3:31 when has no condition; name a setting, such as {dtype: bf",
    ),
    "unknown step": (RUNG + "step: microbatch", "3:11 unknown step 'microbatch'; did you mean 'micro_batch'?"),
    "min without step": (RUNG + "{set: {compile: off}, min: 2}", "3:27 'min' means nothing beside 'set'; remove it"),
    "undo of a wait": (
        RUNG + "{wait_for_memory: 1m, undo_if_useless: no}",
        "3:27 'undo_if_useless' means nothing beside 'wa",
    ),
    "name twice": (
        RUNG + "{name: x, step: micro_batch}\n  - {name: x, set: {compile: off}}",
        "4:12 the name 'x' is taken, on",
    ),
    # amounts
    "wait without a unit": (
        RUNG + "wait_for_memory: 10",
        "3:22 wait_for_memory '10': a duration without a unit; write 10s",
    ),
    "clock for a wait": (
        RUNG + "wait_for_memory: 22:00",
        "3:22 wait_for_memory '22:00': not a duration; write a number and",
    ),
    "no wait": (
        RUNG + "wait_for_memory: 0s",
        "3:22 wait_for_memory must be longer than nothing, got '0s'; write how long",
    ),
    "negative wait": (
        RUNG + "wait_for_memory: -1m",
        "3:22 wait_for_memory must be a duration, which is not negative, got",
    ),
    "endless wait": (
        RUNG + "wait_for_memory: .inf",
        "3:22 wait_for_memory '.inf': not a duration; write a number and a un",
    ),
    "wait of a year": (
        RUNG + "wait_for_memory: 365d",
        "3:22 wait_for_memory must be at most 7d, got '365d'; write less",
    ),
    "switch for a wait": (
        RUNG + "wait_for_memory: on",
        "3:22 wait_for_memory must be a duration, got 'on'; write one, such",
    ),
    "nothing for a budget": (
        "version: 1\nmemory_budget:",
        "2:1 memory_budget must be an amount of memory, got nothing; write",
    ),
    "budget of twelve bytes": (
        "version: 1\nmemory_budget: 12",
        "2:16 memory_budget must be at least 1 MiB, got '12'; write a un",
    ),
    "budget in G": (
        "version: 1\nmemory_budget: 12G",
        "2:16 memory_budget '12G': unknown unit of memory 'G'; write GiB or GB",
    ),
    "backoff that shrinks": (
        "version: 1\nrestore: {backoff: 0.5}",
        "2:20 backoff must be from 1 to 1000, got '0.5'; 2 doubles",
    ),
    "backoff that is none": (
        "version: 1\nrestore: {backoff: .nan}",
        "2:20 backoff must be from 1 to 1000, got '.nan'; 2 doubles",
    ),
    "backoff a switch": (
        "version: 1\nrestore: {backoff: yes}",
        "2:20 backoff must be a number, got 'yes'; write how many times",
    ),
    # the order of restoring
    "lever twice": (
        "version: 1\nrestore: {order: [dtype, compile, dtype]}",
        "2:35 order names dtype twice; remove one",
    ),
    "unknown lever": ("version: 1\nrestore: {order: [compil]}", "2:19 unknown lever 'compil'; did you mean 'compile'?"),
    "knob for a lever": (
        "version: 1\nrestore: {order: [batch_size]}",
        "2:19 unknown lever 'batch_size'; did you mean 'micro_bat",
    ),
    "switch for a lever": (
        "version: 1\nrestore: {order: [on]}",
        "2:19 lever must be compile, dtype or micro_batch, got 'on'",
    ),
    "no order": (
        "version: 1\nrestore: {order: []}",
        "2:18 order names nothing; name what is given back first, or leave",
    ),
    "word for the order": (
        "version: 1\nrestore: {order: compile}",
        "2:18 order must be a list, got 'compile'; write one, such as",
    ),
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_one_mistake_gives_one_error_at_its_place(text: str | bytes, expected: str) -> None:
    found = errors(text)
    assert len(found) == 1, found
    assert expected in found[0] if expected.startswith("more") else found[0].startswith(expected), found[0]
    assert "; " in found[0], "says what is wrong; what to do"


def test_all_mistakes_are_reported_in_the_order_of_the_file() -> None:
    text = "limts: {}\nversion: 1\nremediations:\n  - set: {compile: 3, dtype: half}\n    whn: 1\n"
    text += "checkpoint_every: 0\nlimits: *a\n"
    assert [line.split()[0] for line in errors(text)] == ["1:1", "4:20", "4:30", "5:5", "6:19", "7:9"]


def test_at_most_twenty_are_shown() -> None:
    lines = errors("version: 1\n" + "".join(f"key{n}: 1\n" for n in range(25)))
    assert len(lines) == 21
    assert lines[-1] == "and 5 more"


def test_a_long_value_is_shown_in_part() -> None:
    assert len(errors(f"version: 1\nlimits: {'x' * 9000}")[0]) < 200


# --- files


def test_a_file_is_loaded_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FULL)
    assert load_policy(path) == load(FULL)
    path.write_text("version: x")
    with pytest.raises(PolicyError, match=r"mine\.yaml:1:10: error: version must be 1"):
        load_policy(path)


def test_ten_megabytes_of_garbage_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "garbage.yaml"
    path.write_bytes(os.urandom(10_000_000))
    start = time.monotonic()
    with pytest.raises(PolicyError, match="larger than 256 KiB"):
        load_policy(path)
    assert time.monotonic() - start < 1


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.yaml: cannot be read .*; name a policy file"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path)


def test_an_existing_path_goes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_policy("demo") == find_policy("demo.yaml") == shipped_policies()["demo"]
    (tmp_path / "rtx4070").mkdir()
    assert find_policy("rtx4070") == shipped_policies()["rtx4070"]
    (tmp_path / "demo").write_text("version: 1")
    assert find_policy("demo") == Path("demo")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx4071", "no policy file 'rtx4071'.*; did you mean 'rtx4070'"),
        ("nothing/like/it", "give a path, or one of default, demo or rtx4070"),
        ("x" * 5000, "no policy file"),
        ("a\0b", "no policy file"),
        ("", "is a folder, not a policy"),
    ],
)
def test_a_policy_that_does_not_exist_is_refused_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        find_policy(name)


# --- the policies that come with gpusup


def test_shipped_policies_load_and_say_how_to_run_them() -> None:
    assert list(shipped_policies()) == ["default", "demo", "rtx4070"]
    for name, path in shipped_policies().items():
        assert load_policy(path).description
        assert f"#   gpusup run {name} -- " in path.read_text()


def test_rtx4070_is_the_ladder_asked_for() -> None:
    policy = load_policy(find_policy("rtx4070"))
    assert [rung.lever for rung in policy.remediations] == ["compile", "dtype", "micro_batch"]
    assert [rung.undo_if_useless for rung in policy.remediations] == [False, True, True]
    assert policy.remediations[1].when == {"dtype": "bfloat16"}
    assert policy.restore == Restore(after_steps=100, order=("compile", "micro_batch", "dtype"), backoff=2.0)


def test_demo_is_rtx4070_in_small() -> None:
    demo, full = (load_policy(find_policy(name)) for name in ("demo", "rtx4070"))
    assert demo.remediations == full.remediations
    assert demo.restore == Restore(after_steps=8, order=("dtype", "compile", "micro_batch"))
    assert demo.memory_budget_bytes is not None


# --- the documentation

DOCS = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()


def test_documented_policy_is_one() -> None:
    policy = load(DOCS.split("```yaml\n")[1].split("```")[0])
    assert [rung.lever for rung in policy.remediations] == ["wait_for_memory", "micro_batch", "compile"]


def test_documented_errors_are_what_is_said() -> None:
    text = "version: 1\n\nremediations:\n  - set: {compil: off}\n  - set: {compile: off}\n    step: micro_batch\n\n\n"
    with pytest.raises(PolicyError) as caught:
        load_policy_text((text + "limits: {max_attempts: many}").encode(), "my.yaml")
    assert f"```\n{caught.value}\n```" in DOCS


def test_every_key_is_documented() -> None:
    for key in (*POLICY_KEYS, *REMEDIATION_KEYS, *RESTORE_KEYS, *LIMITS_KEYS):
        assert f"| `{key}` |" in DOCS, key


# --- writing a policy


def test_a_policy_written_out_reads_back_the_same() -> None:
    for text in [FULL, "version: 1", *(path.read_text() for path in shipped_policies().values())]:
        assert load(dump_policy(load(text))) == load(text)


SHORT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=20)
NAMES = SHORT.map(str.strip).filter(bool) | st.sampled_from(
    ["off", "1e-4", "0o14", "22:00", "~", "=", "<<", "*a", "- b"]
)
COUNTS = st.integers(1, 2**53 - 1)
RUNGS = st.one_of(
    st.builds(
        Remediation, name=NAMES, set=st.sampled_from([{"compile": False}, {"compile": True, "dtype": "float32"}])
    ),
    st.builds(Remediation, name=NAMES, step=st.just("micro_batch"), min=COUNTS),
    st.builds(Remediation, name=NAMES, wait_for_memory_s=st.integers(1, 600_000_000).map(lambda ms: ms / 1000)),
)
POLICIES = st.builds(
    Policy,
    description=NAMES | st.just(""),
    remediations=st.lists(RUNGS, max_size=4, unique_by=lambda rung: rung.name).map(tuple),
    restore=st.none() | st.builds(Restore, after_steps=COUNTS, backoff=st.floats(1, 1000), retry_failed=st.booleans()),
    limits=st.builds(
        Limits,
        max_attempts=COUNTS,
        grace_s=st.integers(0, 600_000_000).map(lambda ms: ms / 1000),
        hang_after_s=st.integers(0, 600_000_000).map(lambda ms: ms / 1000),
    ),
    checkpoint_every=st.none() | COUNTS,
    memory_budget_bytes=st.none() | st.integers(2**20, 2**53 - 1),
)


@given(POLICIES)
@settings(deadline=None)
def test_any_policy_survives_being_written(policy: Policy) -> None:
    text = dump_policy(policy)
    assert load(text) == policy, text


# --- nothing but a policy or an error


def survives(data: bytes) -> None:
    start = time.monotonic()
    try:
        assert isinstance(load(data), Policy)
    except PolicyError as error:
        message = str(error)
        message.encode()
        assert 0 < len(message.splitlines()) <= 21
        assert all(line.isprintable() or "\u3000" in line or "\xa0" in line for line in message.splitlines()), message
    assert time.monotonic() - start < 3


@given(st.binary(max_size=400))
@settings(deadline=None)
def test_bytes_give_a_policy_or_an_error(data: bytes) -> None:
    survives(data)


@given(st.text(max_size=200))
@settings(deadline=None)
def test_text_gives_a_policy_or_an_error(text: str) -> None:
    survives(text.encode())


YAML_PIECES = st.sampled_from(
    [*"{}[],'\"|>!%#~\n\r\t\ufeff\x85", "- ", "? ", ": ", "  ", "&a ", "*a ", "!!str ", "<<: "]
)
POLICY_PIECES = st.sampled_from(["---", "...", "version: 1\n", "remediations:", "set:", "compile", "off", "1e9", "\\U"])
PIECES = YAML_PIECES | POLICY_PIECES


@given(st.lists(PIECES, max_size=40).map("".join))
@settings(deadline=None)
def test_pieces_of_yaml_give_a_policy_or_an_error(text: str) -> None:
    survives(text.encode())


@given(st.integers(0, len(FULL)), st.integers(0, 12), st.lists(PIECES, max_size=3).map("".join))
@settings(max_examples=400, deadline=None)
def test_a_damaged_policy_gives_a_policy_or_an_error(at: int, length: int, piece: str) -> None:
    survives((FULL[:at] + piece + FULL[at + length :]).encode())


@pytest.mark.parametrize(
    "piece", ["[", "{a: ", "- ", "? ", "[a,", "a ", "a\n", "k: v\n", "'", "!", '"\\x41"', "# c\n", "a:\n "]
)
def test_a_quarter_megabyte_of_the_same_is_refused_in_time(piece: str) -> None:
    survives((piece * (256 * 1024 // len(piece))).encode())
