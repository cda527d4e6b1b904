"""Everything: `from rkd_fastai.all import *` beside `from fastai.vision.all import *`, of which it shadows no name."""
import fastai.vision.all as _fastai
from . import attacks, callback, core, data, evaluation, export, fast, interpret, learner, loaders, losses, masking, models, pixel, recipes, teachers, trajectories
from .core import *
from .losses import *
from .fast import *
from .attacks import *
from .models import *
from .data import *
from .loaders import *
from .pixel import *
from .teachers import *
from .evaluation import *
from .callback import *
from .learner import *
from .recipes import *
from .masking import *
from .interpret import *
from .export import *
from .trajectories import *
from .study import Study, read_rows, report

# what one module has for another: importable from there, and no part of `*`
_inside = """
    say show_nearest writing atomic_path write_atomic read_json digest are_probs check_images check_logits check_targ check_fraction check_T check_weights
    check_attack check_eps check_xy check_single_label check_teacher undistributed unwrap held_out measured_images in_float32
    load_plain fitting_state symptom Symptom told_where label_settings own_loss batch_targ weighted_mean describe_training
""".split()

# `resnet18` is torchvision's to fastai users: ours is importable by name from here, and with `*` from `rkd_fastai.models`
__all__ = [n for m in (core, losses, fast, attacks, models, data, loaders, pixel, teachers, evaluation, callback, learner, recipes, masking, interpret, export, trajectories)
           for n in m.__all__ if n not in _inside and not hasattr(_fastai, n)] + ['Study', 'read_rows', 'report', 'recipes'] # `recipes.paper_teacher` and the others
