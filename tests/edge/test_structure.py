import pytest
from tiny import CONFIGS
from transformers import GPT2Config, LlamaConfig

from fedspine_edge.errors import IncompatibleError
from fedspine_edge.structure import FAMILIES, layout_of, matrices_of, measured_sparsity, prunable_parameters


def test_an_unknown_family_is_refused_with_the_list_of_known_ones():
    with pytest.raises(IncompatibleError, match="found model_type 'gpt2'") as caught:
        layout_of(GPT2Config(), base_sha256="0" * 64)
    assert all(family in caught.value.hint for family in FAMILIES)


def test_a_kv_group_takes_its_query_heads_along():
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8,
                         num_key_value_heads=2)  # fmt: skip
    layout = layout_of(config, base_sha256="0" * 64)
    heads = layout.group("layers.0.heads")
    assert heads.num_members == 2
    query, key = (layout.matrix(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    assert query.out_features // heads.num_members == 32
    assert key.out_features // heads.num_members == 8
    # q and o: 64 x 64 each, k and v: 64 x 16 each, over two members
    assert heads.parameters_per_member == (2 * 64 * 64 + 2 * 64 * 16) // 2


def test_ffn_blocks_fit_quantised_rows_in_decoders():
    layout = layout_of(CONFIGS["llama"](), base_sha256="0" * 64)
    assert layout.group("layers.0.ffn").block == 32
    assert layout.group("layers.0.ffn").parameters_per_member == 3 * 32


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_groups_own_all_prunable_weights(family, tiny_models):
    from fedspine_edge.base_model import open_base

    base = open_base(tiny_models[family])
    layout = layout_of(base.config, base_sha256=base.sha256)
    coupled = {matrix.name for group in layout.groups for matrix in matrices_of(layout, group.name)}
    weights = sum(base.read(f"{name}.weight").numel() for name in coupled)
    assert prunable_parameters(layout) == weights


def test_sparsity_counts_weights_not_members():
    layout = layout_of(CONFIGS["llama"](), base_sha256="0" * 64)
    kept = {group.name: group.num_members for group in layout.groups}
    assert measured_sparsity(layout, kept) == 0
    kept["layers.0.ffn"] -= 32
    assert measured_sparsity(layout, kept) == pytest.approx(32 * 3 * 32 / prunable_parameters(layout))


def test_query_heads_that_do_not_divide_are_refused():
    config = CONFIGS["llama"]()
    config.num_key_value_heads = 3
    with pytest.raises(IncompatibleError, match="expected query heads in equal KV groups, found 4 over 3"):
        layout_of(config, base_sha256="0" * 64)
