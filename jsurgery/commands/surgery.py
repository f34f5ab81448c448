"""surgery, and each of its stages alone: trace, distill, plan, operate, finetune, evaluate."""

from jsurgery.commands.options import Commands, Options, Overrides, add_processes, join_processes, read_config

TEXTS = {
    "surgery": "all stages in order; running it again resumes",
    "trace": "sample the teacher and keep the noisy latents on the way",
    "distill": "train the feature maps of every block at every rate",
    "plan": "choose every block's rate under the budget",
    "operate": "build the hybrid model",
    "finetune": "train the whole hybrid model briefly",
    "evaluate": "sample and score the model of every stage",
}


def add(commands: Commands) -> None:
    for name, text in TEXTS.items():
        command = commands.add(name, run_surgery, text)
        command.add_argument("--workdir", required=True, help="where the files of this run go")
        add_processes(command)
        if name == "plan":
            text = "also all plans that no other beats, as front.json"
            command.add_argument("--front", action="store_true", help=text)


def run_surgery(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides)
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
    if options.name == "plan" and options.front:
        print_front(config, run)


def print_front(config, run) -> None:
    """The plans of the Pareto front around the chosen one, and the page of all."""
    from jsurgery.report.cost_page import neighbours, write_front_page
    from jsurgery.surgery.plan import write_pareto_front

    front = write_pareto_front(config, run.model_config, run.stages["distill"].folder, run.stages["plan"].folder)
    for row in neighbours(front):
        print("  ".join(row))
    chosen = front["chosen"]
    verdict = "proven optimal" if chosen["proven_optimal"] else f"not optimal: {chosen['optimum']:.5g} is possible"
    print(f"bound {chosen['error_bound']:.5g}; {verdict}")
    print(write_front_page(run.stages["plan"].folder, front))
