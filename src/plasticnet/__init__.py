"""plasticnet: neural networks that choose their own size while they train.

Most of what one needs is a method of `PlasticNet` (``expected_loss``, ``penalty``, ``summary``, ``grow``, ``prune``,
``resize``, ``compact``) or of `Schedule`. The names below are grouped by what one wants to do, the most frequent first;
everything else lies in the folders of the package, each of which has a README.
"""

# -- Train a network that changes its size -----------------------------------------------------
from plasticnet.net import PlasticNet  # a model with a gate on every unit
from plasticnet.training.schedule import Schedule  # moves it through its stages, and changes its size
from plasticnet.training.stages import Stage  # some epochs at one k
from plasticnet.training.stages import Change  # what a step of a schedule did
from plasticnet.learning.pressure import Pressure  # what its cost is worth in the loss
from plasticnet.budgets.budget import Budget  # or what it may cost in the end
from plasticnet.training.distillation import distillation  # the loss of a network that imitates another
from plasticnet.learning.estimators import ESTIMATORS  # how the gradient of the gates is estimated, by name

# -- Grow a network that starts small ----------------------------------------------------------
from plasticnet.growing.narrow import narrow  # make an untrained network narrow, to grow from there
from plasticnet.growing.growth import Growth  # when a schedule grows, and how much

# -- Shrink a network that is trained ----------------------------------------------------------
from plasticnet.shrinking.shrink import shrink  # all of this in one call
from plasticnet.shrinking.report import Milestone, Report, SiteChange  # what shrink reports
from plasticnet.oneshot.prune import prune_once  # cut it to a budget at once
from plasticnet.oneshot.scores import scores  # what each unit is worth
from plasticnet.oneshot.sensitivity import sensitivity  # how much each site can lose
from plasticnet.oneshot.sensitivity import Sensitivity, SiteSensitivity  # what sensitivity returns
from plasticnet.repairing.repair import repair  # refit what reads closed units, before they are cut
from plasticnet.repairing.report import Repaired, RepairedReader  # what repair returns
from plasticnet.files.pretrained import equalise  # give the layers of a transformers model equal widths
from plasticnet.layers.recurrent import split_recurrent  # let each layer of an LSTM have its own width
from plasticnet.layers.sparse import sparsify  # make linear layers with many zeros sparse

# -- Files -------------------------------------------------------------------------------------
from plasticnet.files.modules import load, save  # a compact module
from plasticnet.files.checkpoints import load_checkpoint, save_checkpoint  # a training run that goes on
from plasticnet.files.distributed import load_distributed, save_distributed  # the same from several processes
from plasticnet.files.exporting import export  # an ONNX file or a torch.export program
from plasticnet.files.exporting import Exported  # what export returns
from plasticnet.files.pretrained import save_pretrained  # a folder that from_pretrained reads

# -- Look inside -------------------------------------------------------------------------------
from plasticnet.gates.site import Site  # the units of one place, and their gates: net.sites
from plasticnet.gates.site import WeightSite  # the gates of one weight's entries: net.weights
from plasticnet.measuring.summary import SiteSummary, Summary  # what net.summary() returns
from plasticnet.measuring.profiling import profile  # memory and time of a network, per module
from plasticnet.measuring.profiling import ModuleProfile, Profile  # what profile returns
from plasticnet.cost.latency import Latency, Term  # what net.measure_latency() returns

# -- Find units in a model ---------------------------------------------------------------------
from plasticnet.tracing.trace import trace  # which units a model has
from plasticnet.tracing.trace import register_rule  # teach tracing an operation
from plasticnet.units import Trace  # what trace returns
from plasticnet.units import BlockUnits, ExpertUnits, InputUnits, Units  # the units of a site
from plasticnet.units import Consumer, Norm, Slice, Width  # where they lie, and what follows them

# -- What a compact module may hold beside the layers of its architecture ----------------------
from plasticnet.layers.take import Take  # selects features before a layer
from plasticnet.layers.skip import Skip  # stands where a block was
from plasticnet.layers.experts import Experts  # the list of a mixture from which experts were removed
from plasticnet.layers.attention import FreeMultiheadAttention  # nn.MultiheadAttention with fewer heads
from plasticnet.layers.attention import FreeGridAttention, FreeWindowAttention  # the same of torchvision's
from plasticnet.layers.recurrent import RecurrentStack  # recurrent layers, each with its own width
from plasticnet.layers.states import LayerStates  # the last states of such layers
from plasticnet.layers.sparse import SparseLinear  # what sparsify puts in the place of a linear layer

# -- Errors, and the version -------------------------------------------------------------------
from plasticnet.errors import PlasticError  # whatever raises it has changed nothing
from plasticnet.version import __version__

__all__ = [
    "PlasticNet", "Schedule", "Stage", "Change", "Pressure", "Budget", "distillation", "ESTIMATORS",
    "narrow", "Growth",
    "shrink", "Report", "Milestone", "SiteChange",
    "prune_once", "scores", "sensitivity", "Sensitivity", "SiteSensitivity", "repair", "Repaired", "RepairedReader",
    "equalise", "split_recurrent", "sparsify",
    "save", "load", "save_checkpoint", "load_checkpoint", "save_distributed", "load_distributed",
    "export", "Exported", "save_pretrained",
    "Site", "WeightSite", "Summary", "SiteSummary", "profile", "Profile", "ModuleProfile", "Latency", "Term",
    "trace", "register_rule", "Trace", "Units", "InputUnits", "BlockUnits", "ExpertUnits", "Slice", "Consumer",
    "Norm", "Width",
    "Take", "Skip", "Experts", "FreeMultiheadAttention", "FreeWindowAttention", "FreeGridAttention",
    "RecurrentStack", "LayerStates", "SparseLinear",
    "PlasticError", "__version__",
]  # fmt: skip
