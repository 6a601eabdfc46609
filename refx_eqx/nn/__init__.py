"""Layers: those of `equinox.nn` with refs, including stateful and random layers.

The stateless layers are Equinox's own, with a ref of collection `"params"` for each array.
Where Equinox passes a `State` or a key through every call, the layer here has refs, and is
called with just its input. Names and arguments are those of `equinox.nn`.
"""

from equinox.nn import (
    AdaptiveAvgPool1d as AdaptiveAvgPool1d,
    AdaptiveAvgPool2d as AdaptiveAvgPool2d,
    AdaptiveAvgPool3d as AdaptiveAvgPool3d,
    AdaptiveMaxPool1d as AdaptiveMaxPool1d,
    AdaptiveMaxPool2d as AdaptiveMaxPool2d,
    AdaptiveMaxPool3d as AdaptiveMaxPool3d,
    AdaptivePool as AdaptivePool,
    AvgPool1d as AvgPool1d,
    AvgPool2d as AvgPool2d,
    AvgPool3d as AvgPool3d,
    Identity as Identity,
    inference_mode as inference_mode,
    Lambda as Lambda,
    MaxPool1d as MaxPool1d,
    MaxPool2d as MaxPool2d,
    MaxPool3d as MaxPool3d,
    Pool as Pool,
    RotaryPositionalEmbedding as RotaryPositionalEmbedding,
)

from .._core import _errors as _errors
from ._attention import MultiheadAttention as MultiheadAttention
from ._batch_norm import BatchNorm as BatchNorm
from ._dropout import Dropout as Dropout
from ._ema import EMA as EMA
from ._lora import LoRA as LoRA, merge_lora as merge_lora
from ._metrics import Accuracy as Accuracy, Average as Average
from ._recurrent import GRUCell as GRUCell, LSTMCell as LSTMCell
from ._spectral_norm import SpectralNorm as SpectralNorm
from ._stateless import (
    Conv as Conv,
    Conv1d as Conv1d,
    Conv2d as Conv2d,
    Conv3d as Conv3d,
    ConvTranspose as ConvTranspose,
    ConvTranspose1d as ConvTranspose1d,
    ConvTranspose2d as ConvTranspose2d,
    ConvTranspose3d as ConvTranspose3d,
    Embedding as Embedding,
    GroupNorm as GroupNorm,
    LayerNorm as LayerNorm,
    Linear as Linear,
    MLP as MLP,
    PReLU as PReLU,
    RMSNorm as RMSNorm,
    Sequential as Sequential,
)
from ._weight_norm import WeightNorm as WeightNorm


_errors.hide_frames(__name__)
