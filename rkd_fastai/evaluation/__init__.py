"""Measuring robustness, looking for masked gradients, drawing what was found, and publishing a network."""
from importlib import import_module

# Imported when first asked for: what `RecordTrajectory` kept is read and drawn without fastai and PyTorch.
_names = dict(
    robustness='robust_flags robust_accuracy wilson_interval Robustness make_attack measure_robustness',
    masking='MaskingReport check_masking',
    interpret='robustness_curve plot_robustness_curve AdversarialInterpretation',
    export='export_robustbench',
    trajectories='Trajectory load_trajectory plot_entropy plot_similarity plot_right_class plot_improvement '
                 'plot_easiest_hardest')
_modules = {name: module for module,names in _names.items() for name in names.split()}

__all__ = list(_modules)

def __getattr__(name):
    if name not in _modules: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_modules[name]}', __name__), name)
