"""plasticnet: neural networks that choose their own size while they train.

The names are grouped by what one wants to do. What is rarely needed lies in the folders below, each with a README.
"""

# Train: a model with gates, the stages that it goes through, and what the result may cost.
from plasticnet.net import PlasticNet
from plasticnet.training.schedule import Schedule
from plasticnet.training.stages import Change, Stage
from plasticnet.budgets.budget import Budget
from plasticnet.training.distillation import distillation
from plasticnet.learning.estimators import ESTIMATORS

# Grow a network that starts small.
from plasticnet.training.growth import Growth, narrow

# Shrink a network that is trained.
from plasticnet.oneshot.prune import prune_once
from plasticnet.oneshot.scores import scores
from plasticnet.oneshot.sensitivity import Sensitivity, SiteSensitivity, sensitivity
from plasticnet.layers.sparse import SparseLinear, sparsify

# Files: compact modules, checkpoints, and the formats of others.
from plasticnet.files.modules import load, save
from plasticnet.files.checkpoints import load_checkpoint, save_checkpoint
from plasticnet.files.exporting import Exported, export
from plasticnet.files.pretrained import equalise, save_pretrained

# Look inside: what has gates, what it costs, and what tracing makes of a model.
from plasticnet.gates.site import Site, WeightSite
from plasticnet.measuring.summary import SiteSummary, Summary
from plasticnet.measuring.profiling import ModuleProfile, Profile, profile
from plasticnet.cost.latency import Latency, Term
from plasticnet.tracing.trace import register_rule, trace
from plasticnet.units import BlockUnits, Consumer, InputUnits, Norm, Slice, Trace, Units, Width

# What a compact module may hold beside the layers of its architecture.
from plasticnet.layers.take import Take
from plasticnet.layers.skip import Skip
from plasticnet.layers.attention import FreeGridAttention, FreeMultiheadAttention, FreeWindowAttention

from plasticnet.errors import PlasticError
from plasticnet.version import __version__

__all__ = [
    # train
    "PlasticNet", "Schedule", "Stage", "Change", "Budget", "distillation", "ESTIMATORS",
    # grow
    "Growth", "narrow",
    # shrink
    "prune_once", "scores", "sensitivity", "Sensitivity", "SiteSensitivity", "sparsify", "SparseLinear",
    # files
    "save", "load", "save_checkpoint", "load_checkpoint", "export", "Exported", "save_pretrained", "equalise",
    # look inside
    "Site", "WeightSite", "Summary", "SiteSummary", "profile", "Profile", "ModuleProfile", "Latency", "Term",
    "trace", "register_rule", "Trace", "Units", "InputUnits", "BlockUnits", "Slice", "Consumer", "Norm", "Width",
    # in a compact module
    "Take", "Skip", "FreeMultiheadAttention", "FreeWindowAttention", "FreeGridAttention",
    # errors
    "PlasticError", "__version__",
]  # fmt: skip
