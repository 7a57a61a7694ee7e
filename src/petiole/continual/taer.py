"""TAER: replay in which old rows rest and exemplars weigh as much as their classes are many."""

from dataclasses import dataclass, field

from .replay import ER


@dataclass(eq=False)
class TAER(ER):
    """Task-aware experience replay: a linear head whose old rows are never touched again.

    In an experience with new classes N beside old ones O, only the rows of N are trained, with the loss
    `(CE(current) + w CE(exemplars)) / (1 + w)` over all classes, `w = |O| / |N|`.

    Why old rows rest: for a sample of an old class, `-log p(y) = -log p(old) - log p(y | old)`. The second part learns
    anew, from a few exemplars, what the rows of O were fitted to on all their samples. Without gradient for these rows
    it is gone: the gradient that is left is that of the first part alone, old against new. So the exemplars' labels do
    not matter, and all that old rows say of a sample is one number, computed once an experience.

    Why w: averaged one to one, each old class has the prior `1 / 2|O|` and each new one `1 / 2|N|`, which shifts the
    optimum towards new classes by `log(|O| / |N|)`.

    A class that comes again is trained again: N are the classes of an experience, O all others. Its exemplars keep
    their own class, and w counts their classes too.

    Source: Li et al., 2023, arXiv 2302.11730. That old classifier weights are detached and the replay loss is
    rebalanced is read in its abstract. The loss, w and all defaults are derived here.

    Args: those of `Replay`.

    Example:
        >>> import torch
        >>> from petiole.continual.exemplars import ClassBalanced
        >>> head, x = TAER(ClassBalanced(per_class=2)), torch.eye(6).repeat(8, 1)
        >>> y = torch.arange(6).repeat(8)
        >>> for classes in ([0, 1, 2], [3, 4, 5]):
        ...     is_now = torch.isin(y, torch.tensor(classes))
        ...     head = head.partial_fit(x[is_now], y[is_now])
        >>> head.predict(torch.eye(6))
        tensor([0, 1, 2, 3, 4, 5])
    """

    is_rebalanced: bool = field(default=True, init=False)
    is_detached: bool = field(default=True, init=False)
