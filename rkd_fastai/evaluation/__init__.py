"""Measuring robustness, looking for masked gradients, drawing what was found, and publishing a network."""
from .robustness import robust_flags, robust_accuracy, wilson_interval, Robustness, make_attack, measure_robustness
from .masking import MaskingReport, check_masking
from .interpret import robustness_curve, plot_robustness_curve, AdversarialInterpretation
from .export import export_robustbench
from .trajectories import (Trajectory, load_trajectory, plot_entropy, plot_similarity, plot_right_class,
                           plot_improvement, plot_easiest_hardest)

__all__ = ['robust_flags', 'robust_accuracy', 'wilson_interval', 'Robustness', 'make_attack', 'measure_robustness',
           'MaskingReport', 'check_masking', 'robustness_curve', 'plot_robustness_curve',
           'AdversarialInterpretation', 'export_robustbench', 'Trajectory', 'load_trajectory', 'plot_entropy',
           'plot_similarity', 'plot_right_class', 'plot_improvement', 'plot_easiest_hardest']
