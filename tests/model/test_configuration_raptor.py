import pytest

from raptor_hf import RaptorConfig, RaptorModel


def test_teacher_facts_are_read_from_the_teacher_config(teacher):
    config = RaptorConfig(teacher_config=teacher.config, phases=[3, 2, 1])
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (6, 24, 3)
    assert config.spans() == [(0, 3), (3, 5), (5, 6)]
    assert [config.phase_of(depth) for depth in range(1, 7)] == [0, 0, 0, 1, 1, 2]
    for depth in (0, 7):
        with pytest.raises(ValueError, match=f"from 1 to 6; got {depth}"):
            config.phase_of(depth)


def test_ffn_width_costs_what_the_teachers_does(teacher):
    gelu = RaptorConfig(teacher_config=teacher.config, phases=[6])
    swiglu = RaptorConfig(teacher_config=teacher.config, phases=[6], ffn="swiglu")
    assert gelu.ffn_size == 4 * 24
    assert swiglu.ffn_size == 64  # 8/3 · 24
    given = RaptorConfig(teacher_config=teacher.config, phases=[6], intermediate_size=7)
    assert given.ffn_size == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phases": [3, 2]}, r"sum to the teacher's 6 layers; got \[3, 2\], which sums to 5"),
        ({"phases": [6, 0]}, r"must be positive"),
        ({"phases": [6], "ffn": "glu"}, "ffn must be 'gelu', 'swiglu' or another .*; got 'glu'"),
        ({"phases": [6], "layerscale_valu": 1.0}, "did you mean 'layerscale_value'"),
        ({"phases": [6], "min_depth": 3.0, "max_depth": 2.0}, "0 < min_depth < max_depth"),
    ],
)
def test_wrong_values_are_refused_in_words(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        RaptorConfig(teacher_config=teacher.config, **arguments)


def test_the_teachers_own_configuration_is_left_alone(teacher):
    """A Raptor used to set the attention of the teacher that it was configured by to none."""
    assert teacher.config._attn_implementation == "sdpa"
    RaptorModel(RaptorConfig(teacher_config=teacher.config, phases=[4, 2]))
    assert teacher.config._attn_implementation == "sdpa"
