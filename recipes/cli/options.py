"""Options that several commands share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

from recipes.cli.ui import Ui
from smoothquant.errors import UserError
from smoothquant.scheme import ACTIVATIONS, quantized_names
from smoothquant.settings import GROUPS

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from pathlib import Path

    from act_scales.text import Text
    from act_scales.tokenizer import Encoder
    from recipes.recipe import Recipe
    from smoothquant.model import Model
    from smoothquant.team import Team

TOKENIZER = "tokenizer"  # of --sequence-start
TEXT_HELP = "a .txt, .jsonl or .jsonl.zst file, or a dataset, hf:ORG/NAME[/CONFIG][:SPLIT]"


def add_family(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--family",
        metavar="FILE",
        help="a Python file that defines FAMILY, for an architecture that is not built in (the file is run)",
    )
    command.add_argument(
        "--trust-family",
        action="store_true",
        help="go on where transformers does not know the architecture, and so cannot say whether the family is right",
    )
    command.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="the longest sequence that the model is to take, by which one of LongRoPE's two sets of frequencies is "
        "chosen (default: the short ones, up to original_max_position_embeddings)",
    )


def open_model(arguments: argparse.Namespace, folder: str, ui: Ui) -> Model:
    """The model in a folder, by the options of `add_family`; what is to be known of it is said."""
    from recipes import families

    model = families.open_model(
        folder,
        arguments.family,
        length=arguments.max_length,
        trust_family=arguments.trust_family,
        again=getattr(arguments, "overwrite", False),
    )
    for line in model.checkpoint.notes:
        ui.note(line)
    return model


def find_recipe(name: str, model: Model, ui: Ui) -> Recipe:
    """A recipe by its name; what speaks against it for this model is said."""
    from recipes.models import RECIPES
    from recipes.recipe import contradiction, find

    recipe = find(name, RECIPES)
    line = contradiction(recipe, model, RECIPES)
    if line:
        ui.warn(line)
    return recipe


def usual_alpha(model: Model) -> tuple[float, str]:
    """The alpha for a model where none is given, and who says so."""
    from recipes.models import RECIPES
    from recipes.recipe import of_model
    from smoothquant.settings import SmoothingSettings

    recipe = of_model(model, RECIPES)
    if recipe is None:
        return SmoothingSettings.alpha, f"as no recipe is for the family {model.family.name}"
    return recipe.alpha, f"of recipe {recipe.name} ({recipe.alpha_from})"


def add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="make it in any case; an output of this tool that is there is replaced, once the new one is complete. "
        "Nothing else is ever replaced",
    )


def add_memory(command: argparse.ArgumentParser, what: str) -> None:
    """Add --memory, which `memory` reads. what: the command does with less, in words."""
    command.add_argument(
        "--memory",
        metavar="SIZE",
        help=f"the most memory to take, as in 2GB: {what} (default: a whole layer). Less than the least that would do "
        "is refused at once",
    )


def memory(arguments: argparse.Namespace) -> int | None:
    """The bytes that --memory gives; None without it. Raises UserError for what is no size."""
    from smoothquant.memory import parse

    return None if arguments.memory is None else parse(arguments.memory)


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        default="auto",
        help="where PyTorch computes: cpu, cuda, cuda:1, ... (default auto: a GPU if there is one)",
    )


def share_team(command: argparse.ArgumentParser) -> None:
    """Let several processes share a command, which finds them in `team`."""
    command.set_defaults(team=None)


@contextmanager
def joined(arguments: argparse.Namespace) -> Iterator[Team]:
    """The processes that torchrun has started for a command, which is given them; this one alone where it has not.

    Raises UserError for a command that one process runs.
    """
    from smoothquant import torchrun
    from smoothquant.team import ALONE

    if not torchrun.is_one_of_several():
        arguments.team = ALONE
        yield ALONE
        return
    if "team" not in arguments:
        raise UserError(
            f"smoothquant {arguments.command} under torchrun",
            expected="calibrate, search or validate, which several processes can share",
            do="run it without torchrun",
        )
    with torchrun.joined() as team:
        arguments.team = team
        if "device" in arguments:
            arguments.device = team.device(arguments.device)
        yield team


def add_engine(command: argparse.ArgumentParser) -> None:
    """What every engine is built from and to."""
    command.add_argument("export", metavar="EXPORT", help="folder made by smoothquant export onnx")
    command.add_argument("--out", required=True, metavar="ENGINE", help="folder to make")
    command.add_argument(
        "--act",
        choices=quantized_names(ACTIVATIONS),
        help="which graph of an export --act both (default: per-token)",
    )
    add_overwrite(command)


def add_triton(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--triton",
        metavar="DIR",
        help="also put the engine into a model repository of Triton Inference Server, under ENGINE's name",
    )


def check_triton(arguments: argparse.Namespace) -> None:
    """Find out before a build whether --triton can be written after it."""
    if arguments.triton is not None:
        from builders.serving.triton import check_cache, check_repository

        check_repository(arguments.out, arguments.triton)
        check_cache(arguments.export)


def write_triton(arguments: argparse.Namespace) -> dict[str, str]:
    """Put the engine where --triton says. Returns what to add to the command's result."""
    if arguments.triton is None:
        return {}
    from builders.serving.triton import server_options, write_model

    model = write_model(arguments.out, arguments.triton, overwrite=arguments.overwrite)
    command = ["tritonserver", "--model-repository", str(arguments.triton), *server_options(arguments.out)]
    return {"triton": str(model), "tritonserver": shlex.join(command)}


def say_faster(ui: Ui) -> None:
    """Which of the engines for CPUs is the faster on this machine."""
    from builders.engine.faster import faster_engine
    from smoothquant.machine import cpu_flags

    ui.say(faster_engine(cpu_flags()))


def say_next(ui: Ui, arguments: argparse.Namespace, triton: Mapping[str, str] | None = None) -> None:
    """What to try with an engine that has just been built. triton: by `write_triton`."""
    ui.say(f'{arguments.out}: try  smoothquant generate {arguments.out} "Once upon a time"')
    if triton:
        ui.say(f"{triton['triton']}: try  {triton['tritonserver']}")


def add_smoothing(command: argparse.ArgumentParser, usual: str) -> None:
    """Add --alpha and --groups, which `Capacity.settings` reads. usual: the alpha where none is given, in words."""
    command.add_argument(
        "--alpha",
        type=float,
        help="migration strength in [0, 1]: how much of the activations' range moves into the weights "
        f"(default {usual}; published: Llama-2 0.85, its 70B 0.9, OPT and BLOOM 0.5)",
    )
    command.add_argument(
        "--groups",
        choices=GROUPS,
        help="what is smoothed. default: norm -> linears, v -> o, up -> down; paper: norm -> linears only, by the "
        "released code's formula; none: plain quantization, to see what smoothing brings",
    )


def add_text_field(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text-field",
        metavar="NAME",
        help="the field of every row of a .jsonl or a dataset that holds its text, or a conversation, of which the "
        "model's chat template makes text (default: text, else messages, else conversations)",
    )


def read_text(arguments: argparse.Namespace, source: str, folder: Path, samples: int, length: int) -> Text:
    """A text in the tokens of a folder's tokenizer, by the options of `add_text`."""
    from act_scales.text import load_text

    started = arguments.sequence_start == TOKENIZER
    return load_text(source, folder, samples, length, arguments.text_field, started=started)


def load_text(arguments: argparse.Namespace, ui: Ui, source: str, model: Model, samples: int, length: int) -> Text:
    """A text in the model's tokens, by the options of `add_text`; what it is too poor for is said."""
    text = read_text(arguments, source, model.checkpoint.folder, samples, length).for_model(model)
    for line in text.doubts:
        ui.warn(line)
    return text


def check_tokens(text: Text, encoder: Encoder, other: Encoder) -> None:
    """Raise UserError if another folder's tokenizer gives the text other tokens. encoder: of the text's tokens."""
    sample = encoder.tokenizer.decode(text.sequences[0], skip_special_tokens=True)
    if list(chain(*encoder.whole([sample]))) != list(chain(*other.whole([sample]))):
        raise UserError(
            f"{other.folder}: its tokenizer gives {text.source} other tokens than that of {encoder.folder}",
            expected="one tokenizer",
            do="copy the tokenizer's files from where the model came from",
        )


def add_text(
    command: argparse.ArgumentParser, *, samples: int | None, length: int | None, required: bool = True
) -> None:
    """Add --text and what goes with it. required: whether a command needs a text, or --samples and --length will do."""
    command.add_argument("--text", required=required, metavar="TEXT", help=TEXT_HELP)
    add_text_field(command)
    shown = [value if value is not None else "the recipe's" for value in (samples, length)]
    command.add_argument("--samples", type=int, default=samples, help=f"sequences to use (default {shown[0]})")
    command.add_argument("--length", type=int, default=length, help=f"tokens in a sequence (default {shown[1]})")
    command.add_argument(
        "--sequence-start",
        choices=(TOKENIZER, "none"),
        default=TOKENIZER,
        help="what every sequence begins with. tokenizer (default): the special tokens that the tokenizer puts before "
        "a text, as Gemma's <bos>; they count into --length. none: only documents have them, and a sequence begins "
        "where the one before it ends",
    )
