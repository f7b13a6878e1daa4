"""Turn a Vision Transformer of transformers into a Raptor: a few blocks, applied recurrently.

`import raptor_hf` registers the Raptors with transformers' Auto classes.
"""

import sys
from pathlib import Path

import lazy_loader

# imported when they are asked for, as are the names that the sub-packages hand on
_modules = ["configuration_raptor", "data", "plotting", "teachers", "weights"]
_functions = {
    "teachers.making": ["make_raptor"],
    "teachers.trunks": ["load_raptorized", "raptorize", "save_raptorized"],
}
__getattr__, _, _ = lazy_loader.attach(__name__, submodules=_modules, submod_attrs=_functions)

# A program of this repository that only prints its arguments starts without torch.
_program = Path(sys.argv[0]).resolve() if sys.argv else Path()
_ours = _program.parent.parent == Path(__file__).resolve().parents[1]
if not (_ours and {"-h", "--help"} & set(sys.argv)):
    import transformers

    from .configuration_raptor import RaptorConfig
    from .modeling_raptor import RaptorBlock, RaptorModel
    from .modeling_raptor_heads import (
        AUTO_CLASSES,
        RaptorBackbone,
        RaptorForDepthEstimation,
        RaptorForImageClassification,
        RaptorForSemanticSegmentation,
    )

    transformers.AutoConfig.register(RaptorConfig.model_type, RaptorConfig)
    for _auto_class, _model_class in AUTO_CLASSES.items():
        getattr(transformers, _auto_class).register(RaptorConfig, _model_class)

__all__ = [
    "RaptorBackbone",
    "RaptorBlock",
    "RaptorConfig",
    "RaptorForDepthEstimation",
    "RaptorForImageClassification",
    "RaptorForSemanticSegmentation",
    "RaptorModel",
]
