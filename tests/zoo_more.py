"""Every denoiser class in diffusers that the issue does not name, tiny and random.

`MORE` holds those that `torch.export` captures, `UNCAPTURED` those that it cannot, each with a part of the error.
"""

from __future__ import annotations

from tests.zoo import Case
from tests.zoo_more_audio import AUDIO
from tests.zoo_more_control import CONTROLS
from tests.zoo_more_joint import JOINT
from tests.zoo_more_unets import UNETS
from tests.zoo_more_video import VIDEO

CAUSES = {
    "MultiControlNetModel": "returns names",
    "FluxMultiControlNetModel": "returns names",
    "GlmImageTransformer2DModel": "depends on the values",
    "HiDreamImageTransformer2DModel": "depends on the values",
    "HiDreamImageTransformer2DModel-padded": "depends on the values",
    "HiDreamImageTransformer2DModel-experts": "numpy",
    "NucleusMoEImageTransformer2DModel-experts": "depends on the values",
    "OmniGenTransformer2DModel": "data-dependent",
    "QwenImage21Transformer2DModel": "data-dependent",
    "AnyFlowFARTransformer3DModel": "left a call",
    "HunyuanVideo15Transformer3DModel": "data-dependent",
    "HunyuanVideoFramepackTransformer3DModel": "data-dependent",
    "Kandinsky6SRTransformer3DModel": "left a call",
    "MochiTransformer3DModel": "depends on the values",
    "WanAnimate2Transformer3DModel": "Unsupported input type",
}
"""Name of a case -> a part of the error that says why there is no graph of it."""

EVERY: tuple[Case, ...] = (*JOINT, *UNETS, *CONTROLS, *VIDEO, *AUDIO)
MORE: tuple[Case, ...] = tuple(case for case in EVERY if case.name not in CAUSES)
UNCAPTURED: tuple[Case, ...] = tuple(case for case in EVERY if case.name in CAUSES)
