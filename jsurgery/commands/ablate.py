"""ablate: tables of experiments, each of which answers a question about the method."""

from jsurgery.ablate.tables import APART, TABLES
from jsurgery.commands.options import Commands, Options, Overrides, positive, read_config, shard


def add(commands: Commands) -> None:
    command = commands.add(
        "ablate", run_ablate, "Answer a question about the method by running its arms over several seeds."
    )
    text = "The table of docs/results.md to make; `all` makes all but evidence and families, with configs of their own."
    command.add_argument("--table", choices=[*TABLES, "all", "evidence", *APART], required=True, help=text)
    command.add_argument("--seeds", type=positive, default=3, help="How many seeds each arm runs with (default: 3).")
    text = "The folder that gets the runs of all arms, which tables share. Running it again resumes."
    command.add_argument("--workdir", required=True, help=text)
    command.add_argument("--results", metavar="FILE", help="Also rewrite the table's section of this document.")
    text = "The folder in which measurements are stored and looked up (default: measurements/ in the workdir)."
    command.add_argument("--measurements", metavar="DIR", help=text)
    text = "Measure only seeds I, I + N, … After all N shards, a run without this flag writes the tables."
    command.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help=text)


def run_ablate(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides)
    from jsurgery.ablate.run_tables import run_tables

    run_tables(
        config,
        options.table,
        options.workdir,
        options.seeds,
        options.results,
        options.measurements,
        options.shard,
    )
