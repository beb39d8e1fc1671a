import json

import pytest

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.codec import from_json, read_json, to_data, to_json, write_json
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.core.report import LayerTransfer
from sepdeploy.errors import ContractError, UsageError

FORM = ChainSum((Chain((Factor(4, 4, (3, 3), groups=4), Shuffle(2), Factor(4, 8, (1, 1)))),))
PLAN = Plan(
    "depthwise_separable",
    SchemeOptions(),
    (
        Decision("a", 10, 5, Replaced(Candidate("depthwise_separable", FORM, 3, 4))),
        Decision("b", 1, 1, Kept(Reason.POINTWISE, "of 1x1")),
    ),
)


def edited(change) -> str:
    data = to_data(PLAN)
    change(data)
    return json.dumps(data)


def stage(data, number):
    return data["decisions"][0]["outcome"]["candidate"]["form"]["terms"][0]["stages"][number]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["decisions"][1].pop("macs"), "at decisions.1.macs: Field required"),
        (lambda d: d["decisions"][1]["outcome"].update(reason="because"), "at decisions.1.outcome.Kept.reason: Input"),
        (lambda d: d["decisions"][0]["outcome"]["candidate"].pop("scheme"), "outcome.Replaced.candidate.scheme: Field"),
        (lambda d: d["options"].update(terms="two"), "at options.terms: Input should be a valid integer"),
        (lambda d: d["options"].update(terms=0), "--terms must be at least 1, got 0"),
        (lambda d: d["options"].update(rank_ratio=float("nan")), "--rank-ratio must be above 0"),
        (lambda d: d.update(format_version=2), "at format_version: Input should be 1"),
        (lambda d: stage(d, 0).update(groups=5), "5 groups are more than 4 input or 4 output channels"),
        (lambda d: stage(d, 0).update(out_channels=8), "a stage with 8 outputs cannot feed one with 4 inputs"),
        (lambda d: stage(d, 0).update(kernel_size=[3]), "kernel_size"),
        (lambda d: d["decisions"].append(d["decisions"][0]), "the plan decides twice about a"),
    ],
)
def test_wrong_plan_names_the_file_and_the_place(change, message):
    with pytest.raises(UsageError) as caught:
        from_json(Plan, edited(change), name="plan.json")
    assert str(caught.value).startswith("plan.json is not a valid Plan: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "12", b"\xff\xfe\x00", "[" * 100_000, '{"a":' * 5000])
def test_what_is_no_plan_at_all(text):
    with pytest.raises(UsageError, match="the JSON text is not a valid Plan: at the top level: "):
        from_json(Plan, text)


def test_unchanged_plan_is_read_back():
    assert from_json(Plan, edited(lambda data: None)) == PLAN
    assert to_json(PLAN) == to_json(from_json(Plan, to_json(PLAN)))
    assert to_json(PLAN).endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_cannot_hold(value):
    with pytest.raises(ContractError, match="a LayerTransfer with a number that is not finite"):
        to_json(LayerTransfer("a", value, None, "data-free"))


def test_files(tmp_path):
    path = tmp_path / "new" / "plan.json"
    write_json(path, PLAN)
    assert read_json(Plan, path) == PLAN
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]
    path.write_text("{}")
    with pytest.raises(UsageError, match=rf"{path} is not a valid Plan: at scheme: Field required"):
        read_json(Plan, path)


def test_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*absent\.json: No such file"):
        read_json(Plan, tmp_path / "absent.json")
    with pytest.raises(UsageError, match=r"cannot read .*: Is a directory"):
        read_json(Plan, tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "transfer.json"
    write_json(path, LayerTransfer("a", 0.5, None, "data-free"))
    before = path.read_bytes()
    with pytest.raises(ContractError):
        write_json(path, LayerTransfer("a", float("nan"), None, "data-free"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
