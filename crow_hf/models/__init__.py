"""The models. The files of this folder import nothing of the rest of the package: they also serve as remote code.

Importing this folder registers them with the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_byte_entropy import ByteEntropyConfig
from .modeling_byte_entropy import ByteEntropyPredictor


AutoConfig.register(ByteEntropyConfig.model_type, ByteEntropyConfig)
AutoModelForCausalLM.register(ByteEntropyConfig, ByteEntropyPredictor)
