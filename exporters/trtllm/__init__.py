"""TensorRT-LLM checkpoints, by the format's public description; nothing of TensorRT-LLM is needed to write them.

Read in this order: `modes` (quant_algo), `decoders` (families and config.json), `suitable` (why a model is refused),
`sharding` (who holds what), `tensors` (every tensor: name, shape, dtype, content), `writer`; and `versions`.
"""

from exporters.trtllm.modes import MODES, Mode, choose
from exporters.trtllm.sharding import Ranks
from exporters.trtllm.suitable import check_model
from exporters.trtllm.writer import TrtllmWriter, capacity, dtype_of

__all__ = ["MODES", "Mode", "Ranks", "TrtllmWriter", "capacity", "check_model", "choose", "dtype_of"]
