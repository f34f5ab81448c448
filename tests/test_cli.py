"""The command line: misspelt words, the overview, help texts, what comes next, completion in the shell."""

import glob
import os
import shlex
import subprocess
import sys

import pytest

from jsurgery import cli
from jsurgery.commands import mistakes, next_steps, overview
from jsurgery.errors import InputError
from jsurgery.estimate.quiet_libtpu import quiet_libtpu
from jsurgery.runtime import accelerators

SMALLEST = {  # the least flags of each command
    "report": "--workdir=w", "report --compare": "--compare a b", "sample": "--prompt=x", "cost": "", "models": "",
    "compile": "--stage=sample", "roofline": "", "encode": "--videos=v --workdir=w",
    "synthesize": "--prompts_file=p --workdir=w", "train": "--workdir=w", "convert": "--model=m --output=o",
    "push": "--model=m --repo=a/b", "verify": "--model=m", "bench transformer": "", "bench distill": "",
    "bench attention": "", "ablate": "--table=loss --workdir=w", "evaluate vbench": "--prompts=p --output=o",
    "evaluate vbench-results": "r.json", "evaluate fidelity": "--teacher=t --model m --prompts_file=p --workdir=w",
    "evaluate study": "--a=x --b=y", "evaluate study-results": "a.json", "export": "--workdir=w",
    "export --parts": "--workdir=w --parts=head",
} | dict.fromkeys(("trace", "distill", "plan", "operate", "finetune", "evaluate"), "--workdir='my run'")  # fmt: skip


def command_names() -> list[str]:
    return [command.prog.removeprefix("jsurgery ") for command in mistakes.leaves(cli.make_parser())]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("smaple", "sample"),
        ("bench atention", "attention"),
        ("evaluate vbnch --prompts=p", "evaluate vbench"),
        ("--config.finetune.stepz=3", "config.finetune.steps"),
        ("surgery --config.finetune.stepz=3", "config.finetune.steps"),
        ("--modle=x", "`jsurgery sample --model`"),
        ("sample --modle=x", "--model"),
        ("plan --wokdir=x", "--workdir"),
        ("surgery --workdir=x --finetune.steps=3", "--config.finetune.steps"),
        ("compile --stage=finetun", "finetune"),
        ("cost --config=tniy", "tiny"),
        ("cost --config=wan_1_3b@v5e8", "v5e-8"),
    ],
)
def test_a_misspelt_word_gets_the_nearest(arguments, meant, capsys):
    assert cli.main(shlex.split(arguments)) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and f"did you mean {meant}?" in line


@pytest.mark.parametrize("arguments", ["xyzzy", "sample --prompt=x --xyzzy=1"])
def test_a_word_like_no_other_gets_no_suggestion(arguments, capsys):
    assert cli.main(shlex.split(arguments)) == 2
    assert "xyzzy" in (err := capsys.readouterr().err) and "did you mean" not in err


def test_values_and_abbreviations_are_no_unknown_flags():
    options, _ = cli.parse(["sample", "--prompt=--modle is a cat", "--outp=x.mp4"])
    assert (options.prompt, options.output) == ("--modle is a cat", "x.mp4")


def test_the_overview_has_every_command_once_and_starts_with_commands_that_parse(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    grouped = [name for names in overview.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli.make_parser().subcommands)
    assert all(text.count(f"\n  {name}  ") == 1 for name in grouped)
    assert len(overview.START) == 3
    for command in overview.START:
        assert command in text
        cli.parse(shlex.split(command)[1:])


def test_help_texts_are_sentences():
    parser, odd = cli.make_parser(), []
    for command in [*parser.subcommands.values(), *mistakes.leaves(parser)]:
        actions = {" ".join(action.option_strings) or action.dest: action.help for action in command._actions}
        actions.pop("-h --help")
        for flag, text in {"": command.description, **actions}.items():
            if flag != "SUBJECT" and not (command.subcommands and flag):
                sentence = bool(text) and text.endswith(".") and not text[0].islower()
                odd += [] if sentence else [(command.prog, flag, text)]
    assert odd == []


def test_every_command_tells_where_its_result_is_and_a_next_command_that_parses():
    assert set(SMALLEST) == set(next_steps.STEPS)
    assert set(next_steps.STEPS) == {*command_names(), "report --compare", "export --parts"} - {"surgery", "completion"}
    for name, flags in SMALLEST.items():
        words = [*name.partition(" --")[0].split(), *shlex.split(flags), "--config.seed=1"]
        line = next_steps.next_line(*cli.parse(words))
        result, _, following = line.removeprefix("done: ").partition("; next: ")
        assert result and following and "{" not in line and "None" not in line, line
        if following.startswith("jsurgery "):
            cli.parse(shlex.split(following.split(", ")[0])[1:])
    assert next_steps.next_line(*cli.parse(["trace", "--workdir=my run", "--config.seed=1"])) == (
        "done: 'my run'/trace; next: jsurgery distill --config=tiny --workdir='my run' --config.seed=1"
    )
    assert "without --dry_run" in next_steps.next_line(*cli.parse(["trace", "--workdir=w", "--dry_run"]))


TABS = {  # what stands before the cursor when the user presses Tab -> what the shell is told
    "jsurgery comp": ["compile", "completion"],
    "jsurgery evaluate vb": ["vbench", "vbench-results"],
    "jsurgery evaluate fidelity --te": ["--teacher "],
    "jsurgery evaluate --wor": ["--workdir "],
    "jsurgery surgery --config.sampler.solv": ["--config.sampler.solver "],
    "jsurgery cost --config=wan_1": ["--config=wan_14b", "--config=wan_1_3b", "--config=wan_1_3b_lowres"],
}
ASK = """
import io, os, sys
from jsurgery import cli
from jsurgery.commands import completion

os.environ |= {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "|", "COMP_TYPE": "9"}
for line in sys.argv[1:]:
    os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    answer = io.StringIO()
    try:
        completion.complete(cli.make_parser(), exit_method=sys.exit, output_stream=answer)
    except SystemExit as stopped:
        print(stopped.code, answer.getvalue())
"""


def test_a_shell_completes_commands_flags_and_fields():
    """In a process of its own: argcomplete closes the descriptors that a shell gives it."""
    asked = subprocess.run([sys.executable, "-c", ASK, *TABS], capture_output=True, text=True, check=True)
    assert asked.stdout.splitlines() == [f"0 {'|'.join(words)}" for words in TABS.values()]


def test_completion_prints_what_bash_evaluates_and_costs_no_other_start(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0 and "jsurgery" in script
    code = "import sys; from jsurgery.cli import parse; parse(['cost']); print({'argcomplete', 'jax'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_only_python_prints_while_libtpu_works(capfd):
    def work() -> None:
        os.write(2, b"E0000 INVALID_ARGUMENT\n")
        subprocess.run(["sh", "-c", "echo from a new process >&2"], check=True)
        print("ours", file=sys.stderr)

    with quiet_libtpu():
        work()
    with pytest.raises(InputError), quiet_libtpu():
        work()
        raise InputError("refused")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "ours\nours\nafter\n"

    with pytest.raises(RuntimeError), quiet_libtpu():  # an unexpected error: the log may tell why
        work()
        raise RuntimeError
    assert "INVALID_ARGUMENT\nfrom a new process" in capfd.readouterr().err


def test_commands_start_no_tpu_where_there_is_none(monkeypatch):
    """libtpu, which the tests install, prints its complaints here only if JAX tries it."""
    code = "from jsurgery import cli; cli.main(['completion', 'bash']); import jax; print(jax.devices()[0].platform)"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    absent = not any(glob.glob(pattern) for pattern in accelerators.ACCELERATORS)
    assert done.stdout.splitlines()[-1] == "cpu" and not done.stderr if absent else done.stdout

    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")  # what the user says is left as it is
    accelerators.leave_absent_accelerators_alone()
    assert os.environ["JAX_PLATFORMS"] == "tpu,cpu"
