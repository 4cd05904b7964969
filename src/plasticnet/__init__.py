"""plasticnet: neural networks that choose their own size while they train."""

from plasticnet.budget import Budget
from plasticnet.compact import Take
from plasticnet.distillation import distillation
from plasticnet.errors import PlasticError
from plasticnet.estimators import ESTIMATORS
from plasticnet.exporting import export
from plasticnet.growth import Growth, narrow
from plasticnet.io import load, load_checkpoint, save, save_checkpoint
from plasticnet.latency import Latency
from plasticnet.net import PlasticNet
from plasticnet.oneshot import Sensitivity, prune_once, sensitivity
from plasticnet.pretrained import equalise, save_pretrained
from plasticnet.profiling import Profile, profile
from plasticnet.schedule import Schedule, Stage
from plasticnet.scoring import scores
from plasticnet.sparse import SparseLinear, sparsify
from plasticnet.tracing import register_rule, trace

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "Budget",
    "Growth",
    "Latency",
    "PlasticError",
    "PlasticNet",
    "Profile",
    "Schedule",
    "Sensitivity",
    "SparseLinear",
    "Stage",
    "Take",
    "distillation",
    "equalise",
    "export",
    "load",
    "load_checkpoint",
    "narrow",
    "profile",
    "prune_once",
    "register_rule",
    "save",
    "save_checkpoint",
    "save_pretrained",
    "scores",
    "sensitivity",
    "sparsify",
    "trace",
]
