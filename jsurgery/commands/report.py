"""report: the report of a run, or a comparison of several runs."""

from jsurgery.commands.options import Commands, Options, Overrides, add_processes, join_processes
from jsurgery.errors import InputError
from jsurgery.load_config import load_config


def add(commands: Commands) -> None:
    text = "Write a page with the results of a run, finished or not, or a comparison of several runs."
    command = commands.add("report", run_report, text, config=None, otherwise="the run's own")
    subject = command.add_mutually_exclusive_group(required=True)
    subject.add_argument("--workdir", help="The folder of the run, which gets report.html.")
    subject.add_argument("--compare", nargs="+", metavar="RUN", help="The workdirs of the runs to compare.")
    command.add_argument("--output", metavar="FILE", help="Where --compare writes (default: compare.html).")
    add_processes(command)


def run_report(options: Options, overrides: Overrides) -> None:
    given = options.config is not None or bool(overrides)
    if options.compare and given:
        raise InputError("--compare: leave out --config, as each run has its own")
    if options.output and not options.compare:
        raise InputError("--output: only for --compare; otherwise report.html is written to the workdir")
    config = load_config(options.config or "tiny", overrides) if given else None
    join_processes(options)
    from jsurgery.report.compare import write_comparison
    from jsurgery.report.page import write_report
    from jsurgery.run import start_run
    from jsurgery.runtime.processes import is_first

    if config is not None:
        start_run(config, options.workdir)  # raises if the workdir was made with another config
    if is_first():
        comparison = options.compare and write_comparison(options.compare, options.output or "compare.html")
        print(comparison or write_report(config, options.workdir))
