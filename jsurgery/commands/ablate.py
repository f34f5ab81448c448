"""ablate: tables that answer a question about the method."""

from jsurgery.ablate.tables import TABLES
from jsurgery.commands.options import Commands, Options, Overrides, positive, read_config, shard


def add(commands: Commands) -> None:
    command = commands.add(
        "ablate", run_ablate, "answer a question about the method by running its arms over several seeds"
    )
    command.add_argument("--table", choices=[*TABLES, "all", "evidence"], required=True)
    command.add_argument("--seeds", type=positive, default=3, help="default: 3")
    text = "tables share what their arms have in common; runs are resumed"
    command.add_argument("--workdir", required=True, help=text)
    command.add_argument("--results", metavar="FILE", help="also rewrite the table's section of this document")
    text = "where measurements are kept, and taken from (default: the workdir's measurements/)"
    command.add_argument("--measurements", metavar="DIR", help=text)
    text = "measures seeds I, I + N, ... alone, beside N - 1 other runs; without it, a last run writes the tables"
    command.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help=text)


def run_ablate(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides)
    from jsurgery.ablate.run_tables import run_tables

    places = options.workdir, options.seeds, options.results, options.measurements
    run_tables(config, options.table, *places, options.shard)
