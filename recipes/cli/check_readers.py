"""smoothquant check FOLDER --for NAME [--gpu NAME]: what a server makes of a folder."""

from __future__ import annotations

import argparse

from recipes.cli.ui import Ui
from smoothquant.errors import CheckError


def check_readers(arguments: argparse.Namespace, ui: Ui) -> None:
    """Raise CheckError if the server takes the folder on none of the devices that were asked about."""
    from builders.readers import READERS, Outcome, device_of, folder_facts, opinions, readers_of
    from builders.readers.runs import evidence

    names = readers_of(arguments.reader)
    devices = [device_of(arguments.gpu)] if arguments.gpu else None
    folder = folder_facts(arguments.path)
    content, taken = [], False
    for name in names:
        reader, found = READERS[name], opinions(folder, name, devices)
        taken = taken or any(opinion.statement.outcome.serves for opinion in found)
        ui.say(f"{arguments.path} in {reader.title} {reader.version}")
        wide = max(len(opinion.where) for opinion in found)
        for opinion in found:
            statement, known = opinion.statement, evidence(opinion.statement)
            kernel = f" ({statement.kernel})" if statement.kernel else ""
            told = "; ".join(filter(None, (statement.what, statement.do)))
            source = f" [{known}]" if known else ""
            ui.say(f"  {opinion.where:{wide}}  {statement.outcome.value}{kernel}: {told}{source}")
            content.append(
                {
                    "reader": reader.title,
                    "version": reader.version,
                    "devices": [device.name for device in opinion.devices],
                    "outcome": statement.outcome.value,
                    "kernel": statement.kernel,
                    "what": statement.what,
                    "do": statement.do,
                    "evidence": known,
                }
            )
    ui.result({"path": str(arguments.path), "for": arguments.reader, "readers": content})
    if not taken:
        worst = next((one for one in content if one["outcome"] == Outcome.WRONG.value), content[0])
        raise CheckError(
            f"{arguments.path}: {worst['outcome']} by {worst['reader']} {worst['version']}: {worst['what']}",
            do=str(worst["do"]),
        )
