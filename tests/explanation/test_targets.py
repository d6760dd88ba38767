"""Targets: what a label, an index or a pair selects from logits."""

import pytest
import torch

from vitrail.errors import ConfigError
from vitrail.explanation.targets import Target, parse_target

NAMES = ("cat", "dog", "7", "ratio 1:2", "time: noon", "cat:fish", "fish")
LOGITS = torch.tensor([[1.0, 5, 2, 0, 0, 3, -1], [4.0, 1, 2, 0, 0, 9, -2]])


@pytest.mark.parametrize(
    ("target", "expected", "names"),
    [
        (None, [5.0, 9.0], ["dog", "cat:fish"]),
        ("cat", [1.0, 4.0], ["cat", "cat"]),
        (2, [2.0, 2.0], ["7", "7"]),
        ("1", [5.0, 1.0], ["dog", "dog"]),
        ("ratio 1:2", [0.0, 0.0], ["ratio 1:2"] * 2),
        ("cat:fish", [3.0, 9.0], ["cat:fish"] * 2),  # a label before a pair
        ("cat:dog", [-4.0, 3.0], ["cat:dog"] * 2),
        ("time: noon:ratio 1:2", [0.0, 0.0], ["time: noon:ratio 1:2"] * 2),
        ("dog:ratio 1:2", [5.0, 1.0], ["dog:ratio 1:2"] * 2),
        ("0:6", [2.0, 6.0], ["cat:fish"] * 2),
        ("dog:7", [3.0, -1.0], ["dog:7"] * 2),
    ],
)
def test_what_a_target_selects(target: str | int | None, expected: list[float], names: list[str]) -> None:
    parsed = parse_target(target, NAMES)
    assert parsed.of(LOGITS).tolist() == expected
    assert parsed.names(LOGITS) == names


def test_a_label_goes_before_an_index() -> None:
    assert parse_target("1", ["b", "c", "1"]).index == 2


@pytest.mark.parametrize(
    ("target", "facts"),
    [
        ("cta", "'cta'.*did you mean 'cat'.*0 to 6"),
        ("cat:dgo", "'dgo'.*did you mean 'dog'"),
        ("bird:dog", "no class 'bird'"),
        (7, "7.*0 to 6"),
        (-1, "-1.*0 to 6"),
        ("70", "70.*0 to 6"),
        ("cat:70", "70.*0 to 6"),
        ("cat:0", "'cat'"),
        ("", "''"),
        (":", "':'"),
    ],
)
def test_an_unknown_target_is_named(target: str | int, facts: str) -> None:
    with pytest.raises(ConfigError, match=facts):
        parse_target(target, NAMES)


def test_scores_are_probabilities_or_differences_of_logits() -> None:
    torch.testing.assert_close(torch.tensor(parse_target(None, NAMES).score(LOGITS)), LOGITS.softmax(1).max(1).values)
    assert parse_target("cat:dog", NAMES).score(LOGITS.bfloat16()) == [-4.0, 3.0]


def test_gradients_flow_to_the_logits_of_the_target() -> None:
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(parse_target("cat:dog", NAMES).of(logits).sum(), logits)
    assert grad.tolist() == [[1, -1, 0, 0, 0, 0, 0]] * 2


def test_the_class_is_kept_for_changed_copies_of_an_image() -> None:
    target = parse_target(None, NAMES)
    assert target.fixed(LOGITS).of(-LOGITS).tolist() == [-5.0, -9.0]
    assert target.fixed(LOGITS).names(-LOGITS) == ["dog", "cat:fish"]
    assert target.fixed(LOGITS[:1]).of(LOGITS).tolist() == [5.0, 1.0]  # copies of one image


def test_a_class_is_ruled_out_by_a_logit_below_the_mean() -> None:
    logits = torch.tensor([[1.0, 2, 6], [-3, -3, -9]])
    assert Target(("a", "b", "c"), 0).ruled_out(logits).tolist() == [True, False]
    assert Target(("a", "b", "c"), (2, 2)).ruled_out(logits + 100).tolist() == [False, True]
    assert Target(("a", "b", "c"), 0, 2).ruled_out(logits).tolist() == [False, False]  # a pair
    assert Target(("a",), 0).ruled_out(logits[:, :1]).tolist() == [False, False]
    equal = torch.full((1, 1000), 1.7)  # the mean in float32 is another number
    assert not Target(tuple(map(str, range(1000)))).ruled_out(equal).any()
