"""Fields of a config.json that nothing read: harmless, neither read by transformers nor telling, or refused."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from awq_jax.models.fields import NotComputed, Watched

NAMES = """
architectures model_type transformers_version torch_dtype dtype _name_or_path name_or_path auto_map
bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id
decoder_start_token_id forced_bos_token_id forced_eos_token_id
use_cache cache_implementation return_dict return_dict_in_generate output_attentions output_hidden_states
initializer_range initializer_factor init_std embedding_initializer_range
attention_probs_dropout_prob hidden_dropout_prob
attention_dropout attn_pdrop resid_pdrop embd_pdrop dropout hidden_dropout classifier_dropout activation_dropout
layerdrop embedding_dropout residual_dropout
output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux router_z_loss_coef
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
task_specific_params id2label label2id problem_type finetuning_task
attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
quantization_config pretraining_tp gradient_checkpointing chunk_size_feed_forward ep_size num_nextn_predict_layers
is_decoder is_encoder_decoder n_ctx rope_theta
"""
HARMLESS = frozenset(NAMES.split())
"""What has no part in the logits, or in those of inference."""


TELLING = re.compile("attn|attention|rope|rotary|norm|sink|window|expert|cap|bias|scal")
"""Names of what changes logits, whoever reads it."""


def refuse_unread(hf: Watched) -> None:
    """Passes if all that a config.json says was read, is harmless, or is neither what transformers reads nor by its
    name something that is computed.

    Raises:
      NotComputed: names the first field.
    """
    unread = {key: value for key, value in hf.unread().items() if key not in HARMLESS}
    known = known_to_transformers(hf.get("model_type")) if unread else {}
    for key, value in unread.items():
        usual = None if known is None or TELLING.search(key) else value
        if (known or {}).get(key, usual) != value:
            raise NotComputed(key, f"the config has {key}={reprlib.repr(value)}, which this model does not compute.")


def known_to_transformers(model_type: Any) -> Mapping[str, Any] | None:
    """The fields that transformers knows of such a config, with their defaults; None where it knows no such config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    found = CONFIG_MAPPING[model_type]()
    return found.to_dict() | {alias: getattr(found, name) for alias, name in found.attribute_map.items()}
