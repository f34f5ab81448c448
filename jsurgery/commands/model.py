"""Model folders: train makes one, convert changes its layout, push publishes it."""

from jsurgery.commands.options import Commands, Options, Overrides, add_lora, given_loras, read_config, takes_no_config

LAYOUTS = ("diffusers", "original", "comfyui")


def add(commands: Commands) -> None:
    command = commands.add("train", run_train, "Train a tiny teacher from scratch.")
    command.add_argument("--workdir", required=True, help="The folder that gets all files of this run.")

    command = commands.add("convert", run_convert, "Convert a transformer from one checkpoint layout to another.")
    text = "A folder, file or repository, or the .pth file of the original VAE or T5."
    command.add_argument("--model", required=True, help=text)
    command.add_argument("--output", required=True, help="A new folder, or for comfyui a new .safetensors file.")
    command.add_argument("--layout", choices=LAYOUTS, default="diffusers", help="The new layout (default: diffusers).")
    add_lora(command)
    text = "Which model comes out, of `jsurgery models`, such as lightx2v-14b: a few-step model keeps its own sampler."
    command.add_argument("--kind", default="", help=text)

    text = "Upload a model folder to the Hugging Face Hub, with a model card."
    command = commands.add("push", run_push, text, config=None)
    command.add_argument("--model", required=True, help="A folder in diffusers' layout.")
    command.add_argument("--repo", required=True, metavar="ORG/NAME", help="The repository, made if missing.")
    command.add_argument("--private", action="store_true", help="Make a new repository private.")
    command.add_argument("--revision", metavar="BRANCH", help="The branch to upload to (default: main).")


def run_train(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides)
    from jsurgery.train.teacher import train_teacher

    print(train_teacher(config, options.workdir))


def run_convert(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.wan.convert import convert

    print(convert(options.model, options.output, options.layout, given_loras(options), options.kind))


def run_push(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.report.push import push

    print(push(options.model, options.repo, private=options.private, revision=options.revision))
