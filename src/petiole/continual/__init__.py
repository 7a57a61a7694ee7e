"""Continual learning: streams of experiences, learners that keep learning, and what they come to.

streams     class_incremental, domain_incremental, smooth; what they bring: Experience
the loop    run, accuracy, AccuracyMatrix; in a run folder: carry
heads       NCM, SLDA, Ridge, RandomRidge, FineTune, ER, ERACE, DERpp, TAER, Joint; on a stream: HeadLearner
exemplars   Reservoir, ClassBalanced, Ring, Herding
features    Extractor, cache_features; adapted to the first experience: adapt_first
networks    OnlineLearner and what `online` has; ConFiT and what `confit` has; PluginPerTask
files       save_learner, load_learner, inspect_learner

Public names are resolved at first use.
"""

from ..lazy import resolver

# public name -> module of this package
_PUBLIC = {
    "AccuracyMatrix": "matrix",
    "CachedFeatures": "features",
    "ClassBalanced": "exemplars",
    "ConFiT": "confit.learner",
    "DERpp": "replay",
    "ER": "replay",
    "ERACE": "replay",
    "Experience": "streams",
    "Extractor": "features",
    "FineTune": "trained",
    "Head": "heads",
    "HeadLearner": "heads",
    "Herding": "exemplars",
    "Hybrid": "online.pairs",
    "Joint": "trained",
    "Learner": "learner",
    "MultiSimilarity": "online.pairs",
    "NCM": "closed_form",
    "OnlineLearner": "online.learner",
    "Plan": "plan",
    "PluginPerTask": "per_task",
    "ProxyNCA": "online.objectives",
    "RandomRidge": "closed_form",
    "Reservoir": "exemplars",
    "Ridge": "closed_form",
    "Ring": "exemplars",
    "SLDA": "closed_form",
    "StatisticsBank": "confit.bank",
    "Stream": "streams",
    "SupCon": "online.pairs",
    "TAER": "taer",
    "accuracy": "learner",
    "adapt_first": "adapting",
    "cache_features": "features",
    "carry": "journey",
    "class_incremental": "streams",
    "domain_incremental": "streams",
    "find_pairs": "confit.pairing",
    "inspect_learner": "saving",
    "load_learner": "saving",
    "run": "learner",
    "save_learner": "saving",
    "smooth": "streams",
    "taken_up": "journey",
}

__all__ = sorted(_PUBLIC)

__getattr__ = resolver(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return list(__all__)
