"""TensorRT-LLM checkpoints, by the format's public description; nothing of TensorRT-LLM is needed to write them.

`TrtllmWriter` writes one. Its parts: `modes` (quant_algo), `decoders` and `suitable` (which models, and why not
others), `config` (config.json), `ranks` and `sharding`, `tensors` and `quantities` (a layer), `outer` (the rest).
"""

from exporters.trtllm.modes import MODES, Mode, choose
from exporters.trtllm.ranks import Ranks
from exporters.trtllm.suitable import check_model
from exporters.trtllm.writer import TrtllmWriter, dtype_of

__all__ = ["MODES", "Mode", "Ranks", "TrtllmWriter", "check_model", "choose", "dtype_of"]
