"""ablate: tables of experiments, each of which answers a question about the method."""

from jsurgery.ablate.tables import TABLES
from jsurgery.commands.options import Commands, Options, Overrides, positive, read_config, shard


def add(commands: Commands) -> None:
    command = commands.add(
        "ablate", run_ablate, "answer a question about the method by running its arms over several seeds"
    )
    text = "a table of docs/results.md; all: all of them but evidence"
    command.add_argument("--table", choices=[*TABLES, "all", "evidence"], required=True, help=text)
    command.add_argument("--seeds", type=positive, default=3, help="how many (default: 3)")
    text = "gets the runs of all arms, which tables share; running it again resumes"
    command.add_argument("--workdir", required=True, help=text)
    command.add_argument("--results", metavar="FILE", help="also rewrite the table's section of this document")
    text = "where finished measurements are stored and looked up (default: measurements/ in the workdir)"
    command.add_argument("--measurements", metavar="DIR", help=text)
    text = "measure only seeds I, I + N, ...; after all N shards, a run without this flag writes the tables"
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
