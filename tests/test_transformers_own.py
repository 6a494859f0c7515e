"""transformers' own tests of a model, run on every variant of ours."""

import contextlib
import fnmatch
import functools
import unittest
from unittest import mock

import pytest
import torch
import transformers_own
from test_models_common import TINY, TNT, VARIANTS, V
from torch.utils import _pytree as pytree
from transformers.models.auto import modeling_auto

from titans_kernels.adapt.cache import MemoryLayer
from titans_kernels.models import (
    TitansConfig,
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTokenClassification,
    TitansModel,
)

if not transformers_own.FOLDER:
    pytest.skip("TRANSFORMERS_TESTS is not set: see transformers_own", allow_module_level=True)
theirs = transformers_own.load()

# Which of their tests do not apply to a Titans model, and why. What a machine lacks, a GPU or a
# library, the tests that need it say themselves.
NOT_APPLICABLE = {
    "it shows no attention weights": ["test_attention_outputs"],
    "its attention has one implementation": [
        *("test_attn_implementation_composite_models", "test_can_set_attention_dynamically"),
        *("test_eager_matches_sdpa_inference_*", "test_flash_attn_*", "test_sliding_window_mask"),
        *("test_flex_attention_with_grads", "test_sdpa_can_compile_dynamic"),
        "test_sdpa_can_dispatch_*",
    ],
    "there are no models inside it": [
        "test_can_set_attention_dynamically_composite_model",
        "test_internal_model_config_and_subconfig_are_same",
    ],
    "it has no encoder": ["test_encoder_decoder_loss_no_double_shift"],
    "it has no experts": [
        "test_eager_matches_batched_and_grouped_inference_*",
        *("test_moe_models_record_router_logits", "test_output_router_logits_from_config"),
    ],
    "it has no position embeddings": ["test_resize_position_vector_embeddings"],
    "its rotary frequencies are not configured": [
        *("test_model_rope_scaling_*", "test_model_rope_with_partial_rotation"),
        "test_vision_axial_rope",
    ],
    "no module of it must stay in float32": [
        *("test_keep_in_fp32_modules", "test_keep_in_fp32_modules_exist"),
    ],
    "it has no plan for tensor parallelism": [
        *("test_tied_head_has_a_tp_plan_entry", "test_tp_plan_matches_params"),
    ],
    "its checkpoints have one form": [
        *("test_can_load_from_already_mapped_keys", "test_reverse_loading_mapping"),
    ],
    "it returns hidden states without hooks": [
        "test_can_capture_specific_layers_hidden_states",
        "test_capture_outputs_decorator",
    ],
}
if "GenerationTesterMixin" in transformers_own.absent():
    NOT_APPLICABLE["no tests of generation here"] = ["test_generation_tester_mixin_inheritance"]
NAMES = [name for name in vars(theirs.ModelTesterMixin) if name.startswith("test_")]


class _Own(theirs.ModelTesterMixin, theirs.GenerationTesterMixin):
    """They take inputs and sizes from `model_tester`, which is this class too."""

    all_model_classes = TitansModel, TitansForCausalLM
    base_model_class, causal_lm_class = all_model_classes
    has_attentions, is_training = False, True
    test_can_init_all_missing_weights_before_2023 = True  # they look for a year in our source
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads = 16, 2, 2

    def setUp(self):
        self.model_tester = self
        # Where they look up which classes have a loss.
        for names, name in (
            (modeling_auto.MODEL_MAPPING_NAMES, "TitansModel"),
            (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "TitansForCausalLM"),
            (
                modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
                "TitansForSequenceClassification",
            ),
            (
                modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
                "TitansForTokenClassification",
            ),
        ):
            known = mock.patch.dict(names, {"titans": name})
            known.start()
            self.addCleanup(known.stop)

    def subTest(self, *_, **__):
        return contextlib.nullcontext()  # there is one for every parameter of a model

    def get_config(self):
        own = TNT if self.variant == "tnt" else {}
        return TitansConfig(**(TINY | own | {"variant": self.variant, "eos_token_id": 2}))

    def prepare_config_and_inputs_for_common(self):
        tokens = theirs.ids_tensor([self.batch_size, self.seq_length], V)
        mask = torch.tril(torch.ones_like(tokens))  # padding on the right
        return self.get_config(), {"input_ids": tokens, "attention_mask": mask}

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        for layer in past_key_values.layers:
            assert isinstance(layer, MemoryLayer) and layer.get_seq_length() == seq_length
            assert all(len(x) == batch_size for x in pytree.tree_leaves(layer.state))


def _applied(name):
    """Their test, which either applies or is listed in NOT_APPLICABLE."""
    method = getattr(_Own, name)
    for why, patterns in NOT_APPLICABLE.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return unittest.skip(why)(method)

    @functools.wraps(method)
    def test(self, *args, **kwargs):
        try:
            method(self, *args, **kwargs)
        except unittest.SkipTest as skipped:
            self.fail(f"NOT_APPLICABLE does not list it: {skipped}")

    return test


for _variant in VARIANTS:
    _tests = {_name: _applied(_name) for _name in NAMES if callable(getattr(_Own, _name))}
    _tests["variant"] = _variant
    if _variant == "mac":  # the heads are the same on every variant
        _heads = TitansForSequenceClassification, TitansForTokenClassification
        _tests["all_model_classes"] = (*_Own.all_model_classes, *_heads)
    _class = f"TestOwn{_variant.upper()}"
    globals()[_class] = type(_class, (_Own, unittest.TestCase), _tests)


def test_the_list_is_of_their_tests():
    for why, patterns in NOT_APPLICABLE.items():
        for pattern in patterns:
            assert fnmatch.filter(NAMES, pattern), f"{why}: {pattern}"
