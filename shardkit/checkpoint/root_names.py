"""Names that training programs give to the parts of a checkpoint. Used only where the shape of the
tree leaves several parts.

The names are those of PyTorch Lightning (`state_dict`, `hyper_parameters`, `loops`), timm
(`state_dict_ema`), DeepSpeed (`module`), MMEngine (`message_hub`), SevenNet (`model_state_dict`,
`config`), fairseq, detectron2 (`model`) and similar ones.
"""

from __future__ import annotations

import re

CONVENTIONAL = ("state_dict", "model_state_dict", "model", "module", "net")
"""What the model is called, the surest name first."""

_UNMISTAKABLE = frozenset({"state_dict", "model_state_dict"})  # no module has a child of this name
_TRAINING = _UNMISTAKABLE | {
    "model"
}  # what training programs call the model; scalars beside it are their own
_AVERAGE = frozenset({"ema", "swa", "average", "averaged", "avg", "shadow", "polyak"})
_NO_MODEL = (  # as a word of a name
    {
        "optimizer",
        "optimizers",
        "optim",
        "scheduler",
        "schedulers",
        "sched",
        "scaler",
        "scalers",
        "rng",
    }
    | {
        "hparams",
        "config",
        "configs",
        "cfg",
        "args",
        "arguments",
        "opts",
        "options",
        "settings",
        "fragments",
    }
    | {
        "callback",
        "callbacks",
        "loop",
        "loops",
        "metric",
        "metrics",
        "history",
        "epoch",
        "epochs",
        "trainer",
    }
    | {"dataset", "datasets", "dataloader", "dataloaders", "datamodule", "sampler", "samplers"}
)
_NO_MODEL_ALONE = (  # as the whole name, in which other letters than those of English do not count
    {
        "hyperparameters",
        "hyperparams",
        "messagehub",
        "optstate",
        "randomstate",
        "trainstate",
        "meta",
        "metadata",
    }
    | {
        "opt",
        "data",
        "info",
        "log",
        "logs",
        "logger",
        "lr",
        "step",
        "steps",
        "iteration",
        "version",
        "stats",
    }
)
_PROGRESS = (  # as a word of the name of a scalar
    {
        "loss",
        "losses",
        "best",
        "acc",
        "accuracy",
        "score",
        "fitness",
        "meter",
        "meters",
        "counter",
        "updates",
        "patience",
        "seed",
    }
    | {"step", "steps", "iter", "iters", "iteration", "iterations", "lr"}
)
_COEFFICIENT = frozenset(
    {"logit", "logits", "scale", "temperature", "temp", "alpha", "tau", "gain", "shift", "sigma"}
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_PARAMETER = re.compile(
    r".*\.|(.*_)?(weight|bias|kernel|gamma|beta|embed|embedding|token)s?(_\w+)?$"
)


def is_unmistakable(name: str) -> bool:
    """Whether *name* is one that only checkpoints use, and no module for a part of it."""
    return name in _UNMISTAKABLE


def is_of_training(name: str) -> bool:
    """Whether *name* is what training programs call the model, so that scalars beside it are their
    own.
    """
    return name in _TRAINING


def is_state_dict(name: str) -> bool:
    """Whether *name* says that it is the weights of something."""
    return name.lower().endswith(("state_dict", "model_state"))


def is_model(name: str) -> bool:
    """Whether *name* is one that training programs give to the model."""
    return name in CONVENTIONAL or is_state_dict(name)


def is_average(name: str) -> bool:
    """Whether *name* says that it is a moving average of weights."""
    return not _AVERAGE.isdisjoint(_words(name))


def is_no_model(name: str) -> bool:
    """Whether *name* is one of what training programs keep beside the model."""
    if is_average(name) or is_state_dict(name):
        return False
    words = _words(name)
    return not _NO_MODEL.isdisjoint(words) or "".join(words) in _NO_MODEL_ALONE


def is_parameter(name: str) -> bool:
    """Whether *name* could be that of a parameter: it is dotted, or called as layers call
    theirs.
    """
    return _PARAMETER.match(name) is not None


def is_progress(name: str) -> bool:
    """Whether *name* is one of what training programs keep of a run, if what it names is a
    scalar.
    """
    return is_no_model(name) or not _PROGRESS.isdisjoint(_words(name))


def is_coefficient(name: str) -> bool:
    """Whether *name* could be that of a parameter, if what it names is a scalar."""
    return is_parameter(name) or not _COEFFICIENT.isdisjoint(_words(name))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name[:80])]
