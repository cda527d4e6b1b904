"""Everything: `from rkd_fastai.all import *` beside `from fastai.vision.all import *`, of which it shadows no name."""
import fastai.vision.all as _fastai
from . import attacks, callback, core, data, evaluation, export, fast, interpret, learner, loaders, losses, masking, models, pixel, recipes, sampling, teachers, trajectories
from .core import *
from .losses import *
from .fast import *
from .attacks import *
from .models import *
from .data import *
from .loaders import *
from .sampling import *
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
    say show_nearest writing atomic_path write_atomic read_json digest is_extra tensors_in copy_value copy_state are_probs check_no_probs
    batch_statistics warn_of_batch_statistics naming_batchnorm
    check_images check_logits check_targ check_fraction check_T check_weights
    as_number whole_number default_tensors is_uninitialized check_initialized copied initialize_lazy
    check_n class_labels images_digest no_labels split_name choose_dl sampled_images arriving_positions measured_positions
    check_attack check_eps check_xy check_single_label check_teacher warn_of_chance undistributed unwrap held_out measured_images in_float32
    load_plain plain_state fitting_state symptom Symptom told_where label_settings own_loss batch_targ weighted_mean describe_training showing
""".split()

# `resnet18` is torchvision's to fastai users: ours is importable by name from here, and with `*` from `rkd_fastai.models`
__all__ = [n for m in (core, losses, fast, attacks, models, data, loaders, sampling, pixel, teachers, evaluation, callback, learner, recipes, masking, interpret, export, trajectories)
           for n in m.__all__ if n not in _inside and not hasattr(_fastai, n)] + ['Study', 'read_rows', 'report', 'recipes'] # `recipes.paper_teacher` and the others
