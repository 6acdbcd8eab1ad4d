"""A replication of HEED: density-weighted residual alignment for distilling vision-language models into hybrids.

The names in `__all__` are imported when they are first used. Importing this package registers its models with the
Auto classes."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

__version__ = "0.1.0"

_MODULES = {
    "CONDITIONS": "conditions",
    "Sample": "data",
    "TrainSettings": "conditions",
    "collate": "data",
    "distill": "trainer",
    "evaluate": "evaluate",
    "load_teacher": "teachers",
    "patch_density": "density",
    "position_weights": "density",
    "to_hybrid": "hybrid",
}
__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})


class _Registration(MetaPathFinder):
    """Imports `heed_nb.hybrid`, which registers the models, as soon as transformers is imported.

    Importing transformers takes seconds, and half of the modules do not need it. If a module of this package imports
    it, registration waits until that module is loaded, since `heed_nb.hybrid` may need the module."""

    def __init__(self):
        self.running = []  # modules of this package whose import has begun

    def find_spec(self, name, path=None, target=None):
        ours = name.startswith(f"{__name__}.")
        spec = PathFinder.find_spec(name, path) if ours or name == "transformers" else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            if ours:
                self.running.append(name)
            try:
                run(module)
            finally:
                if ours:
                    self.running.remove(name)
            if not self.running and "transformers" in sys.modules:
                self.register()

        spec.loader.exec_module = exec_module
        return spec

    def register(self):
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        import_module(f"{__name__}.hybrid")


if "transformers" in sys.modules:
    import_module(f"{__name__}.hybrid")
else:
    sys.meta_path.insert(0, _Registration())
