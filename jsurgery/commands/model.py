"""Model folders: train makes one, convert changes its layout, push publishes it."""

from jsurgery.commands.options import Commands, Options, Overrides, read_config, takes_no_config


def add(commands: Commands) -> None:
    command = commands.add("train", run_train, "train a tiny teacher from scratch")
    command.add_argument("--workdir", required=True, help="gets all files of this run")

    command = commands.add("convert", run_convert, "convert a transformer from one checkpoint layout to another")
    text = "a folder, file or repository; or the original VAE or T5 .pth file"
    command.add_argument("--model", required=True, help=text)
    command.add_argument("--output", required=True, help="a new folder; for comfyui a new .safetensors file")
    command.add_argument("--layout", choices=["diffusers", "original", "comfyui"], default="diffusers")

    text = "upload a model folder to the Hugging Face Hub, with a model card"
    command = commands.add("push", run_push, text, config=None)
    command.add_argument("--model", required=True, help="a folder in diffusers' layout")
    command.add_argument("--repo", required=True, metavar="ORG/NAME")
    command.add_argument("--private", action="store_true")
    command.add_argument("--revision", metavar="BRANCH")


def run_train(options: Options, overrides: Overrides) -> None:
    config = read_config(options, overrides)
    from jsurgery.train.teacher import train_teacher

    print(train_teacher(config, options.workdir))


def run_convert(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.wan.convert import convert

    print(convert(options.model, options.output, options.layout))


def run_push(options: Options, overrides: Overrides) -> None:
    takes_no_config(options, overrides)
    from jsurgery.report.push import push

    print(push(options.model, options.repo, private=options.private, revision=options.revision))
