"""Each lowering gives the form that it promises, and computes the same."""

import inspect
import pkgutil
from dataclasses import replace

import pytest
import torch

import sepdeploy.schemes.lowerings
from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Slice, Towers
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.errors import UsageError
from sepdeploy.schemes.kernels import input_channels
from sepdeploy.schemes.lowerings.lowering import LOWERINGS, Lowering, Refusal, find_lowering
from sepdeploy.schemes.lowerings.span_rewrite import SpanRewrite
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.schemes.weighted import form_of

from .conftest import as_sum

# Everything that a convolution may have besides groups, all at once.
NASTY = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0, 1, 3), "dilation": (1, 2), "has_bias": True}
GROUPED = Factor(8, 12, groups=4, **NASTY)
UNEVEN = Factor(7, 11, groups=3, **NASTY)
PADDED = Factor(10, 11, groups=4, pads_groups=True, **NASTY)
DEPTHWISE = Factor(6, 6, groups=6, **NASTY)
FACTORS = pytest.mark.parametrize("factor", [GROUPED, UNEVEN, PADDED, DEPTHWISE], ids=repr)


def pointwise(ins, outs, groups=1, *, bias=True, **changes):
    return Factor(ins, outs, (1, 1), groups=groups, has_bias=bias, **changes)


def kinds(form):
    return [[stage.kind for stage in term.stages] for term in form.terms]


def sees_the_same(first, second):
    a, b = receptive_field(first), receptive_field(second)
    return a.covers(b) and b.covers(a)


def test_every_name_is_its_lowerings_own():
    for name, thunk in LOWERINGS.items():
        lowering = thunk()
        assert isinstance(lowering, SpanRewrite)
        assert lowering is find_lowering(name)
        assert lowering.name == name
        assert lowering.summary
        assert "\n" not in lowering.summary
        assert list(inspect.signature(lowering.rewrite).parameters) == ["terms"]
        assert list(inspect.signature(Lowering.rewrite).parameters) == ["self", "terms"]
    with pytest.raises(UsageError, match=r"no lowering 'split'; choose from split_groups, merge_towers, "):
        find_lowering("split")
    with pytest.raises(TypeError):
        LOWERINGS["mine"] = None


def test_every_lowering_in_the_folder_is_registered():
    found = {
        value.name
        for module in pkgutil.iter_modules(sepdeploy.schemes.lowerings.__path__, "sepdeploy.schemes.lowerings.")
        for value in vars(__import__(module.name, fromlist=["x"])).values()
        if isinstance(value, SpanRewrite)
    }
    assert found == set(LOWERINGS)


@FACTORS
def test_groups_become_towers_and_back(lower, factor):
    form = as_sum(factor)
    split = lower(form, "split_groups")
    (tower,) = split.terms[0].stages
    assert tower.join == "concat"
    assert [branch.stages[1].out_channels for branch in tower.branches] == list(factor.out_groups)
    assert {branch.stages[1].groups for branch in tower.branches} == {1}
    assert sees_the_same(split, form)
    merged = lower(form, "split_groups", "merge_towers")
    assert merged == form


@FACTORS
def test_groups_become_diagonal_blocks_and_back(lower, factor):
    dense = lower(as_sum(factor), "block_diagonal")
    assert dense == as_sum(replace(factor, groups=1, pads_groups=False))
    assert lower(as_sum(factor), "block_diagonal", "extract_groups") == as_sum(factor)


def test_padded_group_without_outputs_is_no_tower(lower):
    factor = Factor(5, 4, (3, 3), groups=3, pads_groups=True, has_bias=True)
    assert (factor.in_groups, factor.out_groups) == ((2, 2, 1), (2, 2, 0))
    (tower,) = lower(as_sum(factor), "split_groups").terms[0].stages
    assert [branch.stages[0] for branch in tower.branches] == [Slice(5, 0, 2), Slice(5, 2, 4)]
    lower(as_sum(factor, pointwise(4, 6)), "resnext")
    lower(as_sum(pointwise(6, 5), factor), "inception")


def test_towers_of_which_some_have_a_bias_merge(lower):
    branches = tuple(Chain((Slice(4, i, i + 2), Factor(2, 3, (3, 3), has_bias=i > 0))) for i in (0, 2))
    assert lower(as_sum(Towers(branches, "concat")), "merge_towers") == as_sum(
        Factor(4, 6, (3, 3), groups=2, has_bias=True)
    )


def test_groups_within_groups_are_found(lower, make):
    module = make(as_sum(Factor(8, 8, (3, 3), groups=2)))
    with torch.no_grad():
        weight = module.factor_modules()[0][0].weight
        weight[:2, 2:] = 0  # the first two channels of each half read its first two, the others the last two
        weight[2:4, :2] = 0
        weight[4:6, 2:] = 0
        weight[6:, :2] = 0
    assert lower(module, "extract_groups") == as_sum(Factor(8, 8, (3, 3), groups=4))


def test_columns_of_uneven_groups():
    assert input_channels(Factor(5, 4, (1, 1), groups=3)).tolist() == [[0, 1], [0, 1], [2, 3], [4, 5]]
    assert input_channels(Factor(4, 4, (1, 1), groups=3, pads_groups=True)).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("at_start", [False, True])
def test_shuffle_formulations(lower, at_start):
    stages = (Shuffle(4), pointwise(8, 8, 2)) if at_start else (pointwise(6, 8, 2), Shuffle(4))
    form = as_sum(*stages)
    last = lower(form, "shuffle_channels_last")
    assert [s.formulation for s in last.terms[0].stages if isinstance(s, Shuffle)] == ["channels_last"]
    assert lower(form, "shuffle_channels_last", "shuffle_gather") == form
    assert sees_the_same(last, form)


def test_only_even_shuffles_become_channels_last(lower):
    form = as_sum(pointwise(8, 8, 2), Shuffle(3), pointwise(8, 8, 2), Shuffle(2))
    stages = lower(form, "shuffle_channels_last").terms[0].stages
    assert [stages[1].formulation, stages[3].formulation] == ["gather", "channels_last"]


@pytest.mark.parametrize("groups", [(2, 4), (3, 5)])
def test_shuffle_folds_into_the_pointwise_after_it(lower, groups):
    first, second = groups
    form = as_sum(Factor(8, 10, groups=first, **NASTY), Shuffle(first), pointwise(10, 9, second, stride=(1, 2)))
    folded = lower(form, "fold_shuffle")
    assert folded == as_sum(form.terms[0].stages[0], pointwise(10, 9, stride=(1, 2)))
    assert receptive_field(folded).covers(receptive_field(form))


def test_shuffle_folds_into_the_pointwise_before_it_if_a_kernel_follows(lower):
    form = as_sum(pointwise(8, 10, 3, padding=(1, 0, 0, 1)), Shuffle(3), Factor(10, 10, groups=5, **NASTY))
    assert lower(form, "fold_shuffle") == as_sum(pointwise(8, 10, padding=(1, 0, 0, 1)), form.terms[0].stages[2])


def test_shuffle_folds_where_it_makes_nothing_dense(lower):
    form = as_sum(pointwise(8, 10), Shuffle(5), pointwise(10, 10, 2))
    assert lower(form, "fold_shuffle") == as_sum(pointwise(8, 10), pointwise(10, 10, 2))
    form = as_sum(pointwise(8, 8, 2), Shuffle(2), pointwise(8, 8, 4), Shuffle(4), pointwise(8, 8, 2))
    # The second convolution is dense once the first shuffle is in it, so the third one may stay grouped.
    assert lower(form, "fold_shuffle") == as_sum(pointwise(8, 8, 2), pointwise(8, 8), pointwise(8, 8, 2))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("terms", [2, 3])
def test_terms_become_a_multiplier_and_back(lower, groups, terms):
    term, first = (DEPTHWISE, pointwise(6, 12, groups, bias=False)), pointwise(6, 12, groups)
    form = ChainSum((Chain((DEPTHWISE, first)), *[Chain(term)] * (terms - 1)))
    multiplied = lower(form, "terms_as_multiplier")
    assert multiplied == as_sum(replace(DEPTHWISE, out_channels=6 * terms), pointwise(6 * terms, 12, groups))
    assert lower(form, "terms_as_multiplier", "terms_as_branches") == form
    assert sees_the_same(multiplied, form)


def test_terms_without_biases_and_within_a_chain(lower):
    term = Chain((replace(DEPTHWISE, has_bias=False), pointwise(6, 8, bias=False)))
    form = as_sum(pointwise(4, 6), Towers((term, term), "sum"), Activation("relu"))
    multiplied = lower(form, "terms_as_multiplier")
    assert kinds(multiplied) == [["factor", "factor", "factor", "activation"]]
    assert multiplied.terms[0].stages[1:3] == (
        replace(term.stages[0], out_channels=12),
        pointwise(12, 8, bias=False),
    )
    assert lower(multiplied, "terms_as_branches") == form


@pytest.mark.parametrize("terms", [2, 3])
def test_terms_are_concatenated_for_one_pointwise_convolution(lower, terms):
    term = Chain((DEPTHWISE, pointwise(6, 12, bias=False)))
    form = ChainSum((Chain((DEPTHWISE, pointwise(6, 12))), *[term] * (terms - 1)))
    concatenated = lower(form, "terms_as_concat")
    assert concatenated == as_sum(Towers((Chain((DEPTHWISE,)),) * terms, "concat"), pointwise(6 * terms, 12))
    assert sees_the_same(concatenated, form)


def test_terms_of_any_kind_and_within_a_chain_are_concatenated(lower):
    first = (Factor(6, 3, (3, 1), padding=(1, 1, 0, 0)), Activation("relu"), pointwise(3, 8, bias=False))
    form = as_sum(pointwise(4, 6), Towers((Chain(first), Chain((pointwise(6, 5), pointwise(5, 8)))), "sum"))
    middle = Towers((Chain(first[:-1]), Chain((pointwise(6, 5),))), "concat")
    assert lower(form, "terms_as_concat") == as_sum(pointwise(4, 6), middle, pointwise(8, 8))


def test_pointwise_convolutions_in_a_row_are_one(lower):
    stages = (
        pointwise(8, 9, 3, stride=(2, 1), padding=(1, 0, 2, 0)),
        Shuffle(4),
        pointwise(9, 6, bias=False),
        pointwise(6, 10, 2, stride=(1, 2)),
        Factor(10, 4, (3, 3)),
    )
    assert lower(as_sum(*stages), "merge_pointwise") == as_sum(
        pointwise(8, 10, stride=(2, 2), padding=(1, 0, 2, 0)), stages[-1]
    )
    plain = as_sum(pointwise(4, 2, bias=False), pointwise(2, 4, bias=False))
    assert lower(plain, "merge_pointwise") == as_sum(pointwise(4, 4, bias=False))


@pytest.mark.parametrize("has_bias", [False, True])
@FACTORS
def test_norm_folds_into_the_convolution_before_it(lower, factor, has_bias):
    factor = replace(factor, has_bias=has_bias)
    middle = factor.out_channels
    form = as_sum(factor, Norm(middle), Shuffle(3), Norm(middle), pointwise(middle, 5))
    assert lower(form, "fold_norm") == as_sum(replace(factor, has_bias=True), Shuffle(3), pointwise(middle, 5))


@pytest.mark.parametrize("has_bias", [False, True])
@FACTORS
def test_norm_folds_into_the_convolution_after_it(lower, factor, has_bias):
    factor = replace(factor, has_bias=has_bias, padding=(0, 0, 0, 0))
    ins = factor.in_channels
    form = as_sum(pointwise(4, ins), Activation("relu"), Norm(ins), Shuffle(2), factor)
    folded = as_sum(pointwise(4, ins), Activation("relu"), Shuffle(2), replace(factor, has_bias=True))
    assert lower(form, "fold_norm") == folded


def test_norm_without_a_shift_folds_into_a_convolution_that_pads(lower, make):
    module = make(as_sum(Norm(8), GROUPED))
    norm = module.terms[0][0]
    norm.running_mean.zero_()
    torch.nn.init.zeros_(norm.bias)
    assert lower(module, "fold_norm") == as_sum(GROUPED)


@FACTORS
@pytest.mark.parametrize("shuffle", [(), (Shuffle(2), Shuffle(3))])
def test_resnext_is_a_sum_of_slice_transform_expand(lower, factor, shuffle):
    form = as_sum(factor, *shuffle, pointwise(factor.out_channels, 6, 2, padding=(1, 0, 0, 1), stride=(1, 2)))
    towers = lower(form, "resnext")
    assert len(towers.terms) == factor.groups  # cardinality
    assert kinds(towers) == [["slice", "factor", "factor"]] * factor.groups
    assert {term.out_channels for term in towers.terms} == {6}
    assert [term.stages[2].has_bias for term in towers.terms] == [True] + [False] * (factor.groups - 1)
    assert receptive_field(towers).covers(receptive_field(form))


@FACTORS
@pytest.mark.parametrize("shuffle", [(), (Shuffle(2), Shuffle(3))])
def test_inception_gives_each_tower_its_own_rows(lower, factor, shuffle):
    form = as_sum(pointwise(6, factor.in_channels, 2, stride=(1, 2), padding=(1, 0, 0, 1)), *shuffle, factor)
    (towers,) = lower(form, "inception").terms[0].stages
    assert towers.join == "concat"
    assert [[stage.kind for stage in branch.stages] for branch in towers.branches] == [
        ["factor", "factor"]
    ] * factor.groups
    assert [branch.stages[0].out_channels for branch in towers.branches] == list(factor.in_groups)
    assert {branch.in_channels for branch in towers.branches} == {6}


@FACTORS
def test_hybrid_is_concatenated_towers_and_a_pointwise(lower, factor):
    last = pointwise(factor.out_channels, 6)
    form = as_sum(factor, last)
    hybrid = lower(form, "hybrid")
    assert kinds(hybrid) == [["towers", "factor"]]
    towers, fusing = hybrid.terms[0].stages
    assert (towers.join, len(towers.branches), fusing) == ("concat", factor.groups, last)
    assert sees_the_same(hybrid, form)


def test_depthwise_separable_is_resnext_and_hybrid_with_a_tower_per_channel(lower, make):
    """The three readings of one block in "The Hybrid Hypothesis" compute the same."""
    spec = ConvSpec(8, 12, (3, 3), padding=(1, 1, 1, 1))
    form = find_scheme("depthwise_separable").design(spec, SchemeOptions(terms=1)).with_output_bias()
    assert len(lower(form, "resnext").terms) == 8
    assert len(lower(form, "hybrid").terms[0].stages[0].branches) == 8
    assert len(lower(form, "hybrid", "merge_towers").terms[0].stages) == 2


def test_nothing_in_the_input_is_changed(make):
    module = make(as_sum(GROUPED, Norm(12), Shuffle(4), pointwise(12, 8, 4), pointwise(8, 8, 4), pointwise(8, 8)))
    terms = module.weighted()
    before = [(item.stage, item.weight, item.weight.clone()) for item in terms[0] if item.weight is not None]
    for name in ("fold_norm", "fold_shuffle", "split_groups", "merge_pointwise", "resnext", "inception"):
        assert isinstance(find_lowering(name).rewrite(terms), tuple)
    for item, (stage, weight, copy) in zip([i for i in terms[0] if i.weight is not None], before, strict=True):
        assert item.stage == stage
        assert item.weight is weight
        assert torch.equal(weight, copy)


def test_towers_within_towers(lower):
    inner = Towers((Chain((Slice(4, 0, 4), Factor(4, 4, (3, 3), groups=2))), Chain((Factor(4, 4, (3, 3)),))), "sum")
    branch = Chain((Slice(8, 4, 8), inner, Norm(4), pointwise(4, 6, 2)))
    other = Chain((Factor(8, 4, (3, 3), groups=4), Norm(4)))
    form = ChainSum((Chain((Towers((branch, other), "concat"),)), Chain((Factor(8, 10, (3, 3), groups=2),))))
    stages = lower(form, "fold_norm", "split_groups")
    assert not [s for term in stages.terms for s in term.leaves() if isinstance(s, Norm)]
    assert {factor.groups for term in stages.terms for factor in term.factors} == {1}


def test_lowered_module_has_the_kernel_of_the_original(make):
    module = make(as_sum(Factor(8, 8, (3, 3), groups=2), Shuffle(2), pointwise(8, 6, 2, bias=False)))
    for name in ("split_groups", "block_diagonal", "fold_shuffle", "resnext", "shuffle_channels_last"):
        terms = find_lowering(name).rewrite(module.weighted())
        lowered = ChainConv2d.from_weighted(terms, module.spec, dtype=torch.float64)
        assert torch.allclose(lowered.weight, module.weight, atol=1e-14)
        assert form_of(terms) == lowered.form


@pytest.mark.parametrize("mode", ["reflect", "circular"])
@torch.no_grad()
def test_padding_modes_stay(mode):
    spec = ConvSpec(8, 8, (3, 3), padding=(1, 2, 1, 0), padding_mode=mode)
    module = ChainConv2d(find_scheme("depthwise_separable").design(spec, SchemeOptions()), spec, bias=True)
    terms = find_lowering("resnext").rewrite(module.weighted())
    x = torch.randn(1, 8, 6, 6)
    assert torch.allclose(ChainConv2d.from_weighted(terms, spec)(x), module(x), atol=1e-6)


REFUSALS = {
    Refusal.NOT_GROUPED: ("split_groups", as_sum(pointwise(4, 4))),
    Refusal.EMPTY_GROUP: ("split_groups", as_sum(Factor(5, 8, (3, 3), groups=4, pads_groups=True))),
    Refusal.NO_TOWERS: ("merge_towers", as_sum(GROUPED)),
    Refusal.TOWERS_DIFFER: (
        "merge_towers",
        as_sum(Towers((Chain((Slice(4, 0, 2), pointwise(2, 2))), Chain((Slice(4, 1, 3), pointwise(2, 2)))), "concat")),
    ),
    Refusal.UNEVEN_TOWERS: (
        "merge_towers",
        as_sum(Towers((Chain((Slice(4, 0, 1), pointwise(1, 2))), Chain((Slice(4, 1, 4), pointwise(3, 2)))), "concat")),
    ),
    Refusal.NO_ZERO_BLOCKS: ("extract_groups", as_sum(GROUPED)),
    Refusal.NO_SHUFFLE: ("fold_shuffle", as_sum(GROUPED)),
    Refusal.SHUFFLE_IS_SO: ("shuffle_gather", as_sum(GROUPED, Shuffle(4))),
    Refusal.UNEVEN_SHUFFLE: ("shuffle_channels_last", as_sum(GROUPED, Shuffle(5))),
    Refusal.SHUFFLE_BETWEEN_KERNELS: ("fold_shuffle", as_sum(GROUPED, Shuffle(4), Factor(12, 12, (1, 3), groups=4))),
    Refusal.NO_TERMS: ("terms_as_multiplier", as_sum(DEPTHWISE, pointwise(6, 6))),
    Refusal.TERMS_DIFFER: (
        "terms_as_multiplier",
        ChainSum((Chain((DEPTHWISE, pointwise(6, 8))), Chain((replace(DEPTHWISE, stride=(1, 1)), pointwise(6, 8))))),
    ),
    Refusal.TERMS_DO_NOT_GROUP: ("terms_as_multiplier", ChainSum((Chain((DEPTHWISE, pointwise(6, 8, 4))),) * 2)),
    Refusal.TERMS_END_OTHERWISE: (
        "terms_as_concat",
        ChainSum((Chain((DEPTHWISE, pointwise(6, 8))), Chain((DEPTHWISE, pointwise(6, 8, 2))))),
    ),
    Refusal.NO_MULTIPLIER: ("terms_as_branches", as_sum(DEPTHWISE, pointwise(6, 6))),
    Refusal.NO_NEIGHBOURS: ("merge_pointwise", as_sum(pointwise(4, 4), Activation("relu"), pointwise(4, 4))),
    Refusal.PADDED_NEIGHBOUR: (
        "merge_pointwise",
        as_sum(pointwise(4, 4), pointwise(4, 4, padding=(0, 1, 0, 0))),
    ),
    Refusal.NO_NORM: ("fold_norm", as_sum(GROUPED)),
    Refusal.NORM_STANDS_ALONE: ("fold_norm", as_sum(pointwise(4, 4), Activation("relu"), Norm(4))),
    Refusal.NORM_BEFORE_PADDING: ("fold_norm", as_sum(Norm(8), GROUPED)),
    Refusal.NOT_GROUPED_THEN_POINTWISE: ("resnext", as_sum(GROUPED, Activation("relu"), pointwise(12, 4))),
    Refusal.NOT_POINTWISE_THEN_GROUPED: ("inception", as_sum(DEPTHWISE, pointwise(6, 6))),
}


@pytest.mark.parametrize("reason", list(Refusal))
def test_every_refusal(refusal, reason):
    name, form = REFUSALS[reason]
    assert refusal(form, name) is reason
    assert reason.value[0].islower()
    assert not reason.value.endswith(".")


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("hybrid", as_sum(GROUPED, Factor(12, 4, (3, 3))), Refusal.NOT_GROUPED_THEN_POINTWISE),
        ("resnext", as_sum(pointwise(4, 4), pointwise(4, 4)), Refusal.NOT_GROUPED_THEN_POINTWISE),
        ("inception", as_sum(Factor(8, 8, (3, 3)), GROUPED), Refusal.NOT_POINTWISE_THEN_GROUPED),
        ("block_diagonal", as_sum(pointwise(4, 4)), Refusal.NOT_GROUPED),
        ("shuffle_channels_last", as_sum(GROUPED), Refusal.NO_SHUFFLE),
        ("terms_as_branches", as_sum(Factor(6, 18, (3, 3), groups=6), Factor(18, 6, (3, 3))), Refusal.NO_MULTIPLIER),
        ("terms_as_branches", as_sum(Factor(6, 18, (3, 3), groups=6), pointwise(18, 8, 4)), Refusal.TERMS_DO_NOT_GROUP),
        ("terms_as_multiplier", ChainSum((Chain((GROUPED, pointwise(12, 4))),) * 2), Refusal.TERMS_DIFFER),
        ("terms_as_multiplier", ChainSum((Chain((pointwise(4, 4),)),) * 2), Refusal.TERMS_DIFFER),
        ("terms_as_concat", ChainSum((Chain((pointwise(4, 4),)),) * 2), Refusal.TERMS_END_OTHERWISE),
        ("terms_as_concat", as_sum(DEPTHWISE, pointwise(6, 4)), Refusal.NO_TERMS),
        (
            "terms_as_concat",
            ChainSum((Chain((DEPTHWISE, pointwise(6, 4))), Chain((DEPTHWISE, pointwise(6, 4, padding=(1, 1, 1, 1)))))),
            Refusal.TERMS_END_OTHERWISE,
        ),
        (
            "terms_as_multiplier",
            ChainSum((Chain((DEPTHWISE, pointwise(6, 4), Activation("relu"))),) * 2),
            Refusal.TERMS_DIFFER,
        ),
        ("fold_shuffle", as_sum(pointwise(4, 4), Activation("relu"), Shuffle(2)), Refusal.SHUFFLE_BETWEEN_KERNELS),
    ],
)
def test_further_refusals(refusal, name, form, reason):
    assert refusal(form, name) is reason


def test_towers_that_are_added_or_overlap_or_differ_do_not_merge(refusal):
    def branches(*starts, kernel=(1, 1)):
        return tuple(Chain((Slice(4, s, s + 2), Factor(2, 2, kernel))) for s in starts)

    assert refusal(as_sum(Towers(branches(0, 2), "sum")), "merge_towers") is Refusal.NO_TOWERS
    for wrong in (
        branches(2, 0),
        branches(0),
        (*branches(0), *branches(2, kernel=(3, 3))),
        (*branches(0), Chain((Slice(4, 2, 4), Shuffle(2), pointwise(2, 2)))),
        (*branches(0), Chain((Slice(4, 2, 4), pointwise(2, 2, 2)))),
    ):
        assert refusal(as_sum(Towers(wrong, "concat")), "merge_towers") is Refusal.TOWERS_DIFFER
