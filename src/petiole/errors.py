"""What can go wrong, as one tree under one base class.

    PetioleError
    ├── BackboneError      a model that no view walks, or that is wired otherwise than its view says
    ├── PluginError        settings that contradict each other or do not fit the backbone's sites
    ├── ProofError         a walk, a plugin or a merge that does not do what it promises; names the site
    ├── MergeError         a plugin that cannot be folded into weights, with the reason
    ├── PluginFileError    a plugin file that is damaged, foreign or made for another backbone
    ├── TaskError          data that cannot be read or does not make a task
    └── FitError           training that cannot start, go on or finish
        └── DivergedError  training whose loss is no longer finite

A message says what was asked, what was found and what to do. The command line prints it after `error:`, exit code 1.
"""

import difflib
from collections.abc import Iterable


class PetioleError(Exception):
    """Base of every error that petiole raises on purpose."""


class BackboneError(PetioleError):
    """A model that no view walks, or that is wired otherwise than its view says."""


class PluginError(PetioleError):
    """Settings that contradict each other or do not fit the backbone's sites."""


class ProofError(PetioleError):
    """A walk, a plugin or a merge that does not do what it promises."""


class MergeError(PetioleError):
    """A plugin that cannot be folded into the backbone's weights."""


class PluginFileError(PetioleError):
    """A plugin file that is damaged, foreign or made for another backbone."""


class TaskError(PetioleError):
    """Data that cannot be read or does not make a task."""


class FitError(PetioleError):
    """Training that cannot start, go on or finish."""


class DivergedError(FitError):
    """Training whose loss is no longer finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean ...?)` for a message, where a known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
