"""Errors that a person reads: what was asked, what was found, what to do.

Every error that this package raises on purpose derives from `MaceLoraError`, so that the command
line can print the message alone, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MaceLoraError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(MaceLoraError, ValueError):
    """A flag, a configuration value or a combination of them makes no sense."""


class NoLayerMatched(ConfigError):
    """A target pattern (or all of them) matches no layer of the model."""


class DataError(MaceLoraError, ValueError):
    """A file of frames cannot be trained on."""


class FoundationModelError(MaceLoraError, ValueError):
    """The foundation model cannot be found, read, or fine-tuned."""


class ArtefactError(MaceLoraError, ValueError):
    """An adapter directory is broken, foreign, or belongs to another base model."""


class NotMergeable(MaceLoraError, RuntimeError):
    """An adapter depends on the input, so that no fixed weight reproduces it."""


class NotPicklable(MaceLoraError, RuntimeError):
    """A model with adapters is given to torch.save or to pickle."""


class CheckpointError(MaceLoraError, RuntimeError):
    """A checkpoint can't be written, can't be read, or belongs to another run."""


class WriteError(MaceLoraError, RuntimeError):
    """A result can't be written: no space, no permission."""


class MergeMismatch(MaceLoraError, RuntimeError):
    """The merged model does not predict what the adapted model predicts."""


class Stopped(MaceLoraError, RuntimeError):
    """A signal has ended a run, whose checkpoint is written."""


class Diverged(MaceLoraError, RuntimeError):
    """The loss is no longer a number."""

    exit_code = 3  # of the command, for programs that try settings; other errors give 1


class UnsupportedUpstream(MaceLoraError, RuntimeError):
    """The installed mace-torch is not one that this package knows how to host."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence listing `known`, with the closest match to `name` if there is one."""
    known = sorted(known)
    return f"known: {', '.join(known)}. {closest(name, known)}".rstrip()


def closest(name: str, known: Iterable[str]) -> str:
    """The question whether the closest match to `name` was meant; empty where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""
