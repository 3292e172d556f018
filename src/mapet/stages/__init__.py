"""The stages: each a file with a config and a function, which is at once the command and the Python call.

These files import nothing heavy until a stage runs, so that `mapet --help` answers at once.
"""

from typing import Any

from mapet.recipe import Stage
from mapet.stages.check import check
from mapet.stages.demo import demo
from mapet.stages.embed import embed
from mapet.stages.evaluate import evaluate
from mapet.stages.export import export
from mapet.stages.finetune import finetune
from mapet.stages.fit_tokenizer import fit_tokenizer
from mapet.stages.inspect import inspect
from mapet.stages.prepare import prepare
from mapet.stages.pretrain import pretrain
from mapet.stages.probe import probe
from mapet.stages.replay import replay
from mapet.stages.report import report
from mapet.stages.run import run
from mapet.stages.study import study
from mapet.stages.tokenize import tokenize
from mapet.stages.train_tokenizer import train_tokenizer
from mapet.stages.watch import watch

STAGES: dict[str, Stage[Any]] = {
    "demo": demo,
    "run": run,
    "check": check,
    "prepare": prepare,
    "train-tokenizer": train_tokenizer,
    "fit-tokenizer": fit_tokenizer,
    "tokenize": tokenize,
    "pretrain": pretrain,
    "watch": watch,
    "replay": replay,
    "probe": probe,
    "evaluate": evaluate,
    "finetune": finetune,
    "inspect": inspect,
    "report": report,
    "embed": embed,
    "export": export,
    "study": study,
}
