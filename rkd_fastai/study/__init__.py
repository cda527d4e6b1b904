"""Studies: a grid of training runs described in a TOML file, its tables, its figures and its report."""
from importlib import import_module

# Imported when first asked for: tables and figures of finished studies need neither fastai nor PyTorch.
_modules = dict(Study='study', read_rows='study', study_report='study')

__all__ = list(_modules)

def __getattr__(name):
    if name not in _modules: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_modules[name]}', __name__), name)
