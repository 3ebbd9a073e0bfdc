"""The command line: `headroom …` and `python -m cluster …` are the same.

Recipes are checked before torch, ray or vllm is imported, so a mistake is answered at once.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from configs.errors import UserError
from configs.load import json_schema, load, load_with_origins, render
from configs.schema import Recipe
from configs.validate import Command, suggest, validate
from trainers.types import InfraError

if TYPE_CHECKING:
    from trainers.measured import Columns
    from trainers.mismatch import Settings

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
OVERRIDES = "key=value sets a key of the recipe; lists go by index: reward.components.0.weight=2"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 if machines or numbers failed, 2 after a user's mistake, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    # A console script does not search the working directory, where the user's reward functions are.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        args = parse(argv)
        args.command(args)
        return 0
    except UserError as error:
        if "--debug" in argv:
            raise
        _print_error(error)
        return 2
    except (InfraError, FloatingPointError) as error:  # the latter: training met a number that is none
        if "--debug" in argv:
            raise
        _print_error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `headroom config … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _print_error(error: Exception) -> None:
    # From an actor it arrives as a RayTaskError, whose cause is the error itself.
    print(f"headroom: error: {' '.join(str(getattr(error, 'cause', error)).split())}", file=sys.stderr)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return what was typed. Raises UserError for what is no command or option."""
    parser = _Parser(
        prog="headroom",
        allow_abbrev=False,
        description="Online RLHF that shows how much headroom is left under the alignment ceiling.",
        epilog="example: headroom demo",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = _command(commands, "train", _train, "online RL with the recipe's rewards", "CONFIG loop.staleness=0")
    train.add_argument("--resume", metavar="RUN", help="continue this run directory")
    _command(commands, "demo", _demo, "all of RLHF on this machine, in minutes, without a download", "run.steps=10")
    _command(commands, "sft", _sft, "supervised fine-tuning, section sft", "CONFIG sft.epochs=2")
    _command(commands, "dpo", _dpo, "direct preference optimisation, section dpo", "CONFIG dpo.beta=0.05")
    reward = _command(commands, "reward", _reward, "train reward models, section reward_models", "CONFIG --only proxy")
    reward.add_argument("--only", metavar="NAME", action="append", help="train this one; may be repeated")
    evaluate = _command(commands, "eval", _evaluate, "run the recipe's evaluations once", "CONFIG --checkpoint DIR")
    evaluate.add_argument("--checkpoint", metavar="DIR", help="policy in HF format; default: model.path")
    config = _command(commands, "config", _config, "print the resolved recipe and where values come from", "CONFIG")
    config.add_argument("--schema", action="store_true", help="print the JSON schema for editors instead")
    watch = _reader(commands, "watch", _watch, "have reward and evaluations parted? on any run", "runs/NAME --once")
    watch.add_argument("--once", action="store_true", help="print what there is now, and end")
    watch.add_argument("--json", action="store_true", help="print the JSON object of docs/watch.md, one a line")
    watch.add_argument("--every", metavar="SECONDS", type=float, default=10.0, help="between looks; default: 10")
    report = _reader(commands, "report", _report, "one run as a page, pictures and text", "runs/NAME --text")
    report.add_argument("--output", metavar="DIR", help="for the page and its PNGs; default: report-NAME")
    report.add_argument("--text", action="store_true", help="print the report; write files only with --output")
    compare = _reader(commands, "compare", _compare, "runs side by side", "a.csv b.csv --output DIR", nargs="*")
    compare.add_argument("--experiment", metavar="NAME", help="all runs of this experiment in MLflow")
    compare.add_argument("--group", metavar="KEY", help="what makes a recipe: reward, algorithm, algorithm.kl, …")
    compare.add_argument("--across-evaluations", action="store_true", help="even if they were evaluated differently")
    compare.add_argument("--output", metavar="DIR", help="write a page and its PNGs too")
    for reader in (watch, report, compare):
        reader.add_argument("--kl-budget", metavar="NATS", type=float, help="headroom: the gain up to this KL")
        reader.add_argument("--version-budget", metavar="V", type=int, help="headroom: the gain up to this version")
    budget = _reader(commands, "budget", _budget, "evaluations that the next run needs", "runs/NAME --detect 0.1")
    _budget_options(budget)
    # Options may stand between the overrides, which nargs="*" alone does not allow.
    args, rest = parser.parse_known_args(argv)
    if wrong := [word for word in rest if word.startswith("-")]:
        raise UserError(f"unknown option {wrong[0]}; {suggest(wrong[0], _options(commands))}")
    if args.command is _compare:
        args.source, rest = [*args.source, *rest], []
    if rest and "config" not in args and args.command is not _demo:
        raise UserError(f"unexpected {rest[0]!r}; see headroom --help")
    args.overrides += rest
    return args


def _options(commands: "argparse._SubParsersAction[_Parser]") -> list[str]:
    return sorted({option for parser in commands.choices.values() for option in parser._option_string_actions} - {"-h"})


def _reader(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    command: Callable[[argparse.Namespace], None],
    summary: str,
    example: str,
    nargs: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command that reads runs, whoever trained them."""
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: headroom {name} {example}", allow_abbrev=False
    )
    parser.add_argument(
        "source", metavar="SOURCE", nargs=nargs, help="a .csv, .jsonl or .parquet, a run directory, or mlflow:RUN"
    )
    parser.add_argument("--reward", metavar="COL", help="the proxy reward's column; default: reward/mean or reward")
    parser.add_argument(
        "--eval", metavar="COL", action="append", help="an evaluation; repeat it, the primary one first"
    )
    parser.add_argument("--kl", metavar="COL", help="KL to the reference; default: kl/reference or kl")
    parser.add_argument("--version", metavar="COL", help="the policy version; default: version or step")
    parser.add_argument("--tracking-uri", metavar="URI", help="where MLflow is; default: sqlite:///mlflow.db")
    parser.add_argument("--margin", metavar="DROP", type=float, help="a drop of the evaluation that does not matter")
    parser.add_argument("--planned", metavar="N", type=int, help="evaluated versions that the run will have")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.set_defaults(command=command, overrides=[])
    return parser


def _budget_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detect", metavar="DROP", type=float, required=True, help="the drop that is to be found")
    parser.add_argument("--power", metavar="P", type=float, default=0.8, help="how surely; default: .8")
    parser.add_argument("--base-rate", metavar="P", type=float, default=0.5, help="share of runs that fall; default .5")
    within = "share of the run that may pass before a fall is seen; default: .35"
    parser.add_argument("--within", metavar="P", type=float, default=0.35, help=within)
    parser.add_argument("--prompts", metavar="N", type=int, help="behind each mean, where a table has no scores")


def _command(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    command: Callable[[argparse.Namespace], None],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary, epilog=f"example: headroom {name} {example}", allow_abbrev=False
    )
    if name == "config":
        parser.add_argument("config", metavar="CONFIG", nargs="?", help="a recipe, for example configs/quickstart.yaml")
    elif name != "demo":
        parser.add_argument("config", metavar="CONFIG", help="a recipe, for example configs/quickstart.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=OVERRIDES)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of user errors too")
    parser.set_defaults(command=command)
    return parser


def _checked(command: Command, config: str | Path, overrides: Sequence[str]) -> Recipe:
    recipe = load(config, overrides)
    for warning in validate(recipe, command, str(config)):
        print(f"headroom: warning: {warning}", file=sys.stderr)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")  # warnings of the libraries
    for name in ("headroom", "actors", "cluster", "configs", "trainers"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it misses GPUs that are not there
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would tear the progress line
    return recipe


def _train(args: argparse.Namespace) -> None:
    if args.resume is not None and not (Path(args.resume) / "config.yaml").is_file():
        raise UserError(f"--resume: no run directory {args.resume}; runs are under run.dir, usually runs/")
    recipe = _checked("train", args.config, args.overrides)
    from cluster import launch, summary

    print(summary.report(recipe, launch.train(recipe, args.resume)))


def _demo(args: argparse.Namespace) -> None:
    name = f"run.name=demo-{time.strftime('%Y%m%d-%H%M%S')}"  # a demo is a new run, not the last one resumed
    recipe = _checked("demo", QUICKSTART, [name, *args.overrides])
    from cluster import launch, summary

    print(summary.report(recipe, launch.train(recipe)))


def _sft(args: argparse.Namespace) -> None:
    recipe = _checked("sft", args.config, args.overrides)
    from cluster import offline

    offline.sft(recipe)


def _dpo(args: argparse.Namespace) -> None:
    recipe = _checked("dpo", args.config, args.overrides)
    from cluster import offline

    offline.dpo(recipe)


def _reward(args: argparse.Namespace) -> None:
    names = list(load(args.config, args.overrides).reward_models)
    if unknown := [name for name in args.only or () if name not in names]:
        raise UserError(f"--only: reward_models has no {unknown[0]!r}; {suggest(unknown[0], names)}")
    recipe = _checked("reward", args.config, args.overrides)
    from cluster import offline

    offline.reward(recipe, args.only or names)


def _evaluate(args: argparse.Namespace) -> None:
    if args.checkpoint is not None and not (Path(args.checkpoint) / "config.json").is_file():
        raise UserError(f"--checkpoint: no model in HF format at {args.checkpoint}; exports are under RUN/exports")
    recipe = _checked("eval", args.config, args.overrides)
    from cluster import launch, summary

    print(summary.means(launch.evaluate(recipe, args.checkpoint)))


def _config(args: argparse.Namespace) -> None:
    if args.schema:
        print(json_schema())
    elif args.config is None:
        raise UserError("config needs a recipe, or --schema; example: headroom config configs/quickstart.yaml")
    else:
        print(render(load_with_origins(args.config, args.overrides)), end="")


def _asked(args: argparse.Namespace) -> "tuple[Columns, Settings]":
    """Return which columns a command that reads runs was told, and what it asks of the alarm."""
    from trainers.measured import Columns
    from trainers.mismatch import Settings

    columns = Columns(reward=args.reward, evaluations=tuple(args.eval or ()), kl=args.kl, version=args.version)
    return columns, Settings(margin=args.margin, planned=args.planned)


def _watch(args: argparse.Namespace) -> None:
    from cluster import watch

    columns, settings = _asked(args)
    asked = watch.Watch(
        source=args.source,
        columns=columns,
        tracking_uri=args.tracking_uri,
        settings=settings,
        kl_budget=args.kl_budget,
        version_budget=args.version_budget,
        as_json=args.json,
        every_s=args.every,
    )
    watch.once(asked) if args.once else watch.follow(asked)


def _report(args: argparse.Namespace) -> None:
    from cluster import report
    from cluster.report.build import build
    from cluster.report.figures import pictures
    from cluster.report.page import page
    from cluster.report.text import head, text
    from trainers.sources import read

    columns, settings = _asked(args)
    run = read(args.source, columns, args.tracking_uri)
    view = build(run, settings, kl_budget=args.kl_budget, version_budget=args.version_budget)
    print(text(view) if args.text else "\n".join([view.name, *head(view)]))
    if args.output or not args.text:
        drawn = pictures(view)
        print(report.write(Path(args.output or report.folder_of(view.name)), page(view, drawn), drawn))


def _budget(args: argparse.Namespace) -> None:
    from cluster import budget
    from trainers.sources import read

    columns, settings = _asked(args)
    run = read(args.source, columns, args.tracking_uri)
    asked = budget.Asked(drop=args.detect, base_rate=args.base_rate, within=args.within, prompts=args.prompts)
    print(budget.text(budget.plan(run, asked, replace(settings, power=args.power))))


def _compare(args: argparse.Namespace) -> None:
    from cluster import compare, report
    from cluster.report.build import build
    from trainers.sources import read_all

    columns, settings = _asked(args)
    sources = [*args.source, *([] if args.experiment is None else [f"mlflow:{args.experiment}"])]
    runs = [run for source in sources for run in read_all(source, columns, args.tracking_uri)]
    compare.check(runs, across_evaluations=args.across_evaluations)  # before anything is computed
    budgets = {"kl_budget": args.kl_budget, "version_budget": args.version_budget}
    views = [build(run, settings, **budgets) for run in runs]
    of = compare.compare(views, args.group, across_evaluations=args.across_evaluations)
    print(compare.text(of))
    if args.output:
        drawn = compare.pictures(of)
        print(report.write(Path(args.output), compare.page(of, drawn), drawn, "comparison"))


if __name__ == "__main__":
    sys.exit(main())
