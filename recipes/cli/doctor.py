"""smoothquant doctor: what this machine can build and run, and what to install for the rest."""

from __future__ import annotations

import argparse

from recipes.cli.ui import Ui


def add(commands: argparse._SubParsersAction, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "doctor",
        parents=[common],
        help="what this machine can build and run",
        description="Look at this machine: processor, memory, GPU, packages. Say which commands work here, how quick "
        "INT8 will be, and what to install for the rest.",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace, ui: Ui) -> None:
    from recipes import abilities

    report = abilities.examine()
    ui.table("This machine", ("", ""), [(fact.name, fact.found) for fact in report.facts])
    rows = [(ability.command, "yes" if ability.ready else "no", ability.how) for ability in report.abilities]
    ui.table("What works here", ("command", "", "how"), rows)
    for advice in report.advice:
        ui.say(f"- {advice}")
    ui.result(report.as_dict())
