"""surgery, and its stages one at a time: trace, distill, plan, operate, finetune, evaluate."""

from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from jsurgery.commands.dry_run import add_dry_run, limits
from jsurgery.commands.options import (
    Commands,
    Options,
    Overrides,
    add_processes,
    join_processes,
    keep_compiled,
)
from jsurgery.load_config import split_topology

if TYPE_CHECKING:
    from jsurgery.run import Run

TEXTS = {
    "surgery": "Perform the whole surgery, all stages in order. Running it again resumes.",
    "trace": "Sample videos from the teacher and keep the noisy latents of every step.",
    "distill": "Train new parts for every block at every rate, and measure their errors.",
    "plan": "Choose the rate of every block within the budget, and print the plan and its neighbours.",
    "operate": "Build the hybrid model that the plan describes.",
    "finetune": "Train the whole hybrid model briefly.",
    "evaluate": "Sample from the model of every stage and score it.",
}


def add(commands: Commands) -> None:
    for name, text in TEXTS.items():
        command = commands.add(name, run_surgery, text)
        command.add_argument("--workdir", required=True, help="The folder that gets all files of this run.")
        add_processes(command)
        add_dry_run(command)
        if name == "plan":
            text = "Also write the Pareto front of all plans, front.json and front.html."
            command.add_argument("--front", action="store_true", help=text)


def run_surgery(options: Options, overrides: Overrides) -> None:
    from jsurgery.wan.tell_model import with_own_sampler

    config = keep_compiled(with_own_sampler(options.config, overrides))
    if options.dry_run:
        run_dry(config, options, "prompts" in overrides)
        return
    join_processes(options)
    from jsurgery.report.summary import tell_result
    from jsurgery.run import start_run
    from jsurgery.runtime.processes import is_first
    from jsurgery.surgery.stages import COMMANDS

    run = start_run(config, options.workdir)
    run.run_commands(COMMANDS if options.name == "surgery" else (options.name,))
    if not is_first():
        return
    if options.name == "surgery":
        tell_result(config, run.workdir)
        print(run.workdir / "report.html")
    if options.name == "plan":
        from jsurgery.surgery.plan_text import plan_lines

        folders = run.stages["distill"].folder, run.stages["plan"].folder
        print("\n".join(plan_lines(config, run.model_config, *folders)))
        if options.front:
            print_front(config, run)


def run_dry(config: ConfigDict, options: Options, prompts_given: bool) -> None:
    """Tells what the stages of a command would take. With a model on this machine, first makes the command's own
    checks."""
    from jsurgery.data.prompts import load_prompts
    from jsurgery.estimate.dry_run import dry_run
    from jsurgery.run import Run
    from jsurgery.surgery.stages import COMMANDS, STAGES
    from jsurgery.wan.hub import lacks_weights
    from jsurgery.wan.model_folder import model_path

    if config.model.path and not lacks_weights(model_path(config.model.path)):
        Run(config, options.workdir)
    elif prompts_given:
        load_prompts(config, config.trace.prompts + config.evaluate.prompts)
    commands = COMMANDS if options.name == "surgery" else (options.name,)
    stages = [stage.name for stage in STAGES if stage.command in commands]
    dry_run(config, options.config, split_topology(options.config)[1], stages, limits(options))


def print_front(config: ConfigDict, run: "Run") -> None:
    """Writes the Pareto front and its page, and prints the chosen plan with its neighbours on the front."""
    from jsurgery.report.cost_page import neighbours, write_front_page
    from jsurgery.surgery.plan import write_pareto_front

    front = write_pareto_front(config, run.model_config, run.stages["distill"].folder, run.stages["plan"].folder)
    for row in neighbours(front):
        print("  ".join(row))
    chosen = front["chosen"]
    verdict = "proven optimal" if chosen["proven_optimal"] else f"not optimal: {chosen['optimum']:.5g} is possible"
    print(f"bound {chosen['error_bound']:.5g}; {verdict}")
    print(write_front_page(run.stages["plan"].folder, front))
