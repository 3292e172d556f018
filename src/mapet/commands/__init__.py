"""One module a command: checks its options, plans, and calls the packages below.

Nothing heavy is imported until a command runs, so that `mapet --help` answers at once.
"""

from typing import Any

from mapet.commands.check import check
from mapet.commands.command import Command
from mapet.commands.debug_step import debug_step
from mapet.commands.demo import demo
from mapet.commands.embed import embed
from mapet.commands.evaluate import evaluate
from mapet.commands.export import export
from mapet.commands.finetune import finetune
from mapet.commands.fit_tokenizer import fit_tokenizer
from mapet.commands.inspect_tokenizer import inspect_tokenizer
from mapet.commands.prepare import prepare
from mapet.commands.pretrain import pretrain
from mapet.commands.report import report
from mapet.commands.run import run
from mapet.commands.study import study
from mapet.commands.tokenize import tokenize
from mapet.commands.train_tokenizer import train_tokenizer

COMMANDS: dict[str, Command[..., Any, Any]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        demo, run, study, check, prepare, train_tokenizer, fit_tokenizer, tokenize, inspect_tokenizer, pretrain, report, evaluate,
        finetune, embed, export, debug_step,
    )
}  # fmt: skip
GROUPS = {
    "Pipeline": ("demo", "run", "study"),
    "Data": ("check", "prepare"),
    "Tokenizer": ("train-tokenizer", "fit-tokenizer", "tokenize", "inspect-tokenizer"),
    "Pre-training": ("pretrain", "report"),
    "Evaluation": ("evaluate", "finetune"),
    "Deployment": ("embed", "export"),
}
"""Heading -> commands, as `mapet --help` lists them; `debug-step`, for a crash, is not among them."""
