"""The models. The files of this folder import nothing of the rest of the package: they also serve as remote code.

Importing this folder registers them with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .configuration_byte_entropy import ByteEntropyConfig
from .configuration_coconut import CoconutConfig
from .modeling_byte_entropy import ByteEntropyPredictor
from .modeling_coconut import CoconutForCausalLM, CoconutModel
from .tokenization_coconut import CoconutTokenizer


AutoConfig.register(ByteEntropyConfig.model_type, ByteEntropyConfig)
AutoModelForCausalLM.register(ByteEntropyConfig, ByteEntropyPredictor)
AutoConfig.register(CoconutConfig.model_type, CoconutConfig)
AutoModel.register(CoconutConfig, CoconutModel)
AutoModelForCausalLM.register(CoconutConfig, CoconutForCausalLM)
AutoTokenizer.register(CoconutConfig, CoconutTokenizer)
