"""Answers from draws, against closed forms, NumPy, SciPy and torch in float64."""

import json
import math
import statistics
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.special import expit, log_softmax, softmax  # type: ignore[import-untyped]
from scipy.stats import entropy as scipy_entropy  # type: ignore[import-untyped]

from fl_server_ai.uncertainty.answer import Answer
from fl_server_ai.uncertainty.options import CommonOptions
from fl_server_ai.uncertainty.quantiles import weighted_quantiles
from fl_server_ai.uncertainty.summary import Summary, plain_answer, summarise
from fl_server_core.exceptions import DomainError, Invalid

ENTROPIES = ("predictive_entropy", "expected_entropy", "mutual_info")
PROBS = CommonOptions(output="probs")
LOGITS = CommonOptions(output="logits")
REGRESSION = CommonOptions(task="regression")
LN2 = math.log(2)


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(answer: Answer, name: str, expected: Any, atol: float = 1e-12) -> None:
    found = answer.inference if name == "inference" else answer.uncertainty[name]
    torch.testing.assert_close(
        found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-10, atol=atol
    )


# --- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
def test_uniform_draws_have_the_entropy_log_k_and_nothing_to_learn(classes: int) -> None:
    draws = torch.full((5, 3, classes), 1 / classes, dtype=torch.float64)

    answer = summarise(draws, PROBS)

    close(answer, "predictive_entropy", [math.log(classes)] * 3)
    close(answer, "expected_entropy", [math.log(classes)] * 3)
    close(answer, "mutual_info", [0.0] * 3)


def test_one_hot_draws_that_agree_are_certain() -> None:
    answer = summarise(torch.eye(4).repeat(6, 1, 1), PROBS)

    for name in ENTROPIES:
        assert answer.uncertainty[name].tolist() == [0.0] * 4
    assert answer.uncertainty["variance"].abs().max() == 0


def test_two_certain_draws_that_disagree_are_all_mutual_information() -> None:
    answer = summarise(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), PROBS)

    close(answer, "inference", [[0.5, 0.5]], atol=0)
    close(answer, "predictive_entropy", [LN2])
    close(answer, "expected_entropy", [0.0])
    close(answer, "mutual_info", [LN2])
    close(answer, "variance", [[0.5, 0.5]])


@pytest.mark.parametrize("task", ["multilabel", "binary"])
def test_each_label_is_a_coin_of_its_own_and_not_a_class(task: str) -> None:
    draws = torch.tensor([[[0.9], [0.5]], [[0.9], [0.5]]], dtype=torch.float64)

    answer = summarise(draws, CommonOptions(task=task, output="probs"))

    coin = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    close(answer, "predictive_entropy", [[coin], [LN2]])
    close(answer, "mutual_info", [[0.0], [0.0]])


def test_an_ensemble_is_the_mixture_of_its_weighted_members() -> None:
    members = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)

    answer = summarise(members, PROBS, weights=[3.0, 1.0])

    mixture = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    close(answer, "inference", [[0.75, 0.25]])
    close(answer, "mutual_info", [mixture])
    close(answer, "variance", [[0.75 * 0.25 / (1 - 0.75**2 - 0.25**2)] * 2])


# --- references ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5, 4), (2, 3, 4, 6, 5)])
def test_logits_of_classes_agree_with_scipy(shape: tuple[int, ...]) -> None:
    draws = numbers(*shape)

    answer = summarise(draws, LOGITS)

    probs = softmax(draws.numpy(), axis=2)
    predictive = scipy_entropy(probs.mean(axis=0), axis=1)
    expected = scipy_entropy(probs, axis=2).mean(axis=0)
    close(answer, "inference", probs.mean(axis=0))
    close(answer, "variance", probs.var(axis=0, ddof=1))
    close(answer, "std", probs.std(axis=0, ddof=1))
    close(answer, "predictive_entropy", predictive)
    close(answer, "expected_entropy", expected)
    close(answer, "mutual_info", predictive - expected)


@pytest.mark.parametrize(("task", "shape"), [("multilabel", (6, 4, 3)), ("binary", (6, 4))])
def test_logits_of_labels_agree_with_scipy(task: str, shape: tuple[int, ...]) -> None:
    draws = numbers(*shape)

    answer = summarise(draws, CommonOptions(task=task, softmax=True))

    probs = expit(draws.numpy())
    both = np.stack([1 - probs, probs], axis=-1)
    predictive = scipy_entropy(both.mean(axis=0), axis=-1)
    expected = scipy_entropy(both, axis=-1).mean(axis=0)
    close(answer, "inference", probs.mean(axis=0))
    close(answer, "variance", probs.var(axis=0, ddof=1))
    close(answer, "predictive_entropy", predictive)
    close(answer, "mutual_info", predictive - expected)


def test_softmax_and_output_logits_are_the_same_thing() -> None:
    draws = numbers(4, 3, 5)

    left = summarise(draws, LOGITS)
    right = summarise(draws, CommonOptions(softmax=True))

    assert left.to_json() == right.to_json()


def test_entropies_agree_with_torch_distributions() -> None:
    draws = numbers(9, 4, 6)

    answer = summarise(draws, LOGITS)

    categorical = torch.distributions.Categorical
    mean = categorical(probs=draws.softmax(dim=2).mean(dim=0))
    close(answer, "predictive_entropy", mean.entropy())
    close(answer, "expected_entropy", categorical(logits=draws).entropy().mean(dim=0))


def test_a_regression_has_mean_std_and_quantiles_and_no_entropies() -> None:
    draws = numbers(40, 6, 2)

    answer = summarise(draws, REGRESSION)

    assert set(answer.uncertainty) == {
        "variance",
        "std",
        "quantile_0.05",
        "quantile_0.5",
        "quantile_0.95",
    }
    close(answer, "inference", draws.mean(dim=0))
    close(answer, "std", draws.std(dim=0))
    for level in (0.05, 0.5, 0.95):
        close(answer, f"quantile_{level}", np.quantile(draws.numpy(), level, axis=0))


def test_probabilities_given_and_probabilities_found_from_logits_are_alike() -> None:
    draws = numbers(5, 4, 3)

    given_logits = summarise(draws, LOGITS)
    given_probs = summarise(draws.softmax(dim=2), PROBS)

    for name in ("inference", "variance", *ENTROPIES):
        expected = given_logits.tensors().get(name, given_logits.uncertainty.get(name))
        close(given_probs, name, expected)


# --- what is averaged ------------------------------------------------------------------------


def test_undeclared_outputs_are_averaged_as_they_come_and_have_no_entropies() -> None:
    draws = numbers(5, 4, 3)

    answer = summarise(draws, CommonOptions())

    close(answer, "inference", draws.mean(dim=0))
    assert set(answer.uncertainty) == {"variance", "std"}


def test_undeclared_outputs_that_sum_to_one_are_probabilities() -> None:
    answer = summarise(numbers(5, 4, 3).softmax(dim=2), CommonOptions())

    assert set(answer.uncertainty) == {"variance", "std", *ENTROPIES}


def test_sigmoids_of_many_labels_are_not_mistaken_for_classes() -> None:
    """All within 0 and 1 is not enough: the reference system renormalised such outputs silently."""
    answer = summarise(numbers(5, 4, 3).sigmoid(), CommonOptions())

    assert set(answer.uncertainty) == {"variance", "std"}


@pytest.mark.parametrize("odd", [0, 2, 4])
def test_one_undeclared_draw_that_is_no_distribution_takes_the_entropies_away(odd: int) -> None:
    draws = numbers(5, 4, 3).softmax(dim=2)
    draws[odd] += 0.5

    answer = summarise(draws, CommonOptions())

    assert set(answer.uncertainty) == {"variance", "std"}


@pytest.mark.parametrize("task", ["multilabel", "binary", "regression"])
def test_no_guess_is_made_where_a_task_is_declared(task: str) -> None:
    answer = summarise(torch.full((3, 4, 1), 0.5), CommonOptions(task=task))

    assert not set(ENTROPIES) & set(answer.uncertainty)


@pytest.mark.parametrize(
    ("outputs", "sample"),
    [
        ([[0.5, 0.5], [0.7, 0.7]], 1),
        ([[1.5, -0.5], [0.5, 0.5]], 0),
        ([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]], 2),
    ],
)
def test_what_is_declared_as_probabilities_must_be_such(
    outputs: list[list[float]], sample: int
) -> None:
    with pytest.raises(DomainError) as refusal:
        summarise([torch.tensor(outputs)], PROBS)

    assert refusal.value.error_code == "NOT_PROBABILITIES"
    assert refusal.value.data["sample"] == sample


# --- NONE ------------------------------------------------------------------------------------


def test_none_gives_the_index_of_the_largest_output_and_no_uncertainty() -> None:
    answer = plain_answer(
        torch.tensor([[0.1, 0.9], [2.0, 2.0], [float("-inf"), -9.0]]), "multiclass"
    )

    assert answer.to_json() == {"inference": [1, 0, 1], "uncertainty": {}}


@pytest.mark.parametrize("task", ["multilabel", "binary", "regression"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_none_gives_the_outputs_themselves_for_other_tasks(task: str, dtype: torch.dtype) -> None:
    outputs = torch.tensor([[3], [1]], dtype=dtype)

    answer = plain_answer(outputs, task)

    assert answer.inference.dtype == dtype
    assert answer.to_json() == {"inference": [[3], [1]], "uncertainty": {}}


@pytest.mark.parametrize(
    ("shape", "task"),
    [((5,), "multiclass"), ((5, 0), "multiclass"), ((), "regression"), ((5, 2), "binary")],
)
def test_outputs_that_do_not_fit_the_task_are_refused(shape: tuple[int, ...], task: str) -> None:
    for attempt in (
        lambda: plain_answer(torch.ones(shape), task),
        lambda: summarise([torch.ones(shape)], CommonOptions(task=task)),
    ):
        with pytest.raises(DomainError) as refusal:
            attempt()
        assert refusal.value.error_code == "OUTPUT_SHAPE"


# --- never NaN -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [LOGITS, PROBS, CommonOptions(), REGRESSION])
def test_a_single_draw_has_variance_0_and_valid_json(options: CommonOptions) -> None:
    answer = summarise(torch.tensor([[[0.25, 0.75]]]), options)

    text = json.dumps(answer.to_json(), allow_nan=False)
    assert json.loads(text)["uncertainty"]["std"] == [[0.0, 0.0]]


@pytest.mark.parametrize("size", [1e4, 1e30, 1e300])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_huge_logits_are_certain_and_finite(size: float, task: str) -> None:
    draws = torch.tensor([[[size, -size, 0.0]], [[-size, size, 0.0]]], dtype=torch.float64)

    answer = summarise(draws, CommonOptions(task=task, output="logits"))

    json.dumps(answer.to_json(), allow_nan=False)
    information = answer.uncertainty["mutual_info"].flatten()
    expected = [LN2] if task == "multiclass" else [LN2, LN2, 0.0]
    torch.testing.assert_close(information, torch.tensor(expected, dtype=torch.float64))


def test_logarithms_stay_exact_where_probabilities_round_to_one() -> None:
    logits = torch.tensor([[[0.0, -50.0]]], dtype=torch.float64)

    answer = summarise(logits, LOGITS)

    logs = log_softmax(logits.numpy(), axis=2)
    expected = float(-(np.exp(logs) * logs).sum())
    assert expected > 0
    assert answer.uncertainty["expected_entropy"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("logit", [50.0, -50.0, 700.0])
def test_logarithms_of_labels_stay_exact_on_both_sides(logit: float) -> None:
    answer = summarise(
        torch.tensor([[[logit]]], dtype=torch.float64),
        CommonOptions(task="binary", output="logits"),
    )

    small = math.exp(-abs(logit))  # -p log p, and about p more from -(1 - p) log(1 - p)
    expected = small * abs(logit) + small
    assert answer.uncertainty["expected_entropy"].item() == pytest.approx(expected, rel=1e-9, abs=0)


def test_a_masked_class_has_probability_0() -> None:
    draws = torch.tensor([[[0.0, float("-inf"), 0.0]]])

    answer = summarise(draws, LOGITS)

    close(answer, "inference", torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64))
    close(answer, "predictive_entropy", [LN2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [LOGITS, PROBS, CommonOptions(), REGRESSION])
def test_an_output_that_is_no_number_is_refused_with_its_sample(
    bad: float, options: CommonOptions
) -> None:
    outputs = torch.full((4, 2), 0.5)
    outputs[2, 1] = bad

    for attempt in (
        lambda: summarise([torch.full((4, 2), 0.5), outputs], options),
        lambda: plain_answer(outputs, options.task),
    ):
        with pytest.raises(DomainError) as refusal:
            attempt()
        assert refusal.value.error_code == "NON_FINITE_OUTPUT"
        assert refusal.value.data["sample"] == 2


def test_a_sample_without_any_possible_class_is_refused() -> None:
    with pytest.raises(DomainError) as refusal:
        summarise([torch.full((2, 3), float("-inf"))], LOGITS)

    assert refusal.value.error_code == "NON_FINITE_OUTPUT"


def test_a_variance_too_large_for_a_number_is_refused_with_its_sample() -> None:
    draws = torch.tensor([[0.0, 1e200], [0.0, -1e200]], dtype=torch.float64)

    with pytest.raises(DomainError) as refusal:
        summarise(draws, REGRESSION)

    assert refusal.value.error_code == "NON_FINITE_OUTPUT"
    assert refusal.value.data["sample"] == 1


@pytest.mark.parametrize("options", [LOGITS, PROBS, CommonOptions(), REGRESSION])
def test_an_empty_batch_has_an_empty_answer(options: CommonOptions) -> None:
    answer = summarise(torch.zeros(3, 0, 4), options)

    assert answer.to_json()["inference"] == []
    assert all(value == [] for value in answer.to_json()["uncertainty"].values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [LOGITS, REGRESSION])
def test_narrow_floats_are_counted_in_float64(dtype: torch.dtype, options: CommonOptions) -> None:
    draws = numbers(50, 3, 4, scale=20).to(dtype)

    narrow = summarise(draws, options)
    wide = summarise(draws.double(), options)

    assert narrow.to_json() == wide.to_json()
    assert narrow.inference.dtype == torch.float64


def test_probabilities_of_a_thousand_classes_in_half_precision_are_probabilities() -> None:
    draws = numbers(4, 50, 1000).softmax(dim=2)

    for dtype in (torch.float16, torch.bfloat16):
        assert set(ENTROPIES) <= set(summarise(draws.to(dtype), PROBS).uncertainty)


def test_a_small_spread_about_a_large_mean_is_not_lost() -> None:
    draws = 1e9 + numbers(100, 2, scale=1e-3)  # West's sums alone are off by 1e-4 here

    answer = summarise(draws, REGRESSION)

    exact = [statistics.variance(map(Fraction, column)) for column in draws.T.tolist()]
    close(answer, "variance", [float(value) for value in exact], atol=0)


# --- weights and order -----------------------------------------------------------------------


def test_equal_weights_are_no_weights() -> None:
    draws = numbers(4, 3, 5)

    plain, weighted = summarise(draws, LOGITS), summarise(draws, LOGITS, weights=[0.25] * 4)

    assert summarise(draws[:1], LOGITS, weights=[0.1]).uncertainty["std"].abs().max() == 0
    for name in ("inference", "variance"):
        close(weighted, name, plain.tensors().get(name, plain.uncertainty.get(name)))


def test_a_member_of_weight_0_is_left_out() -> None:
    draws = numbers(3, 4)

    answer = summarise(draws, REGRESSION, weights=[1, 0, 1])

    assert answer.to_json() == summarise(draws[[0, 2]], REGRESSION).to_json()


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [0.0, 0.0]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(Invalid):
        summarise(numbers(2, 3), REGRESSION, weights=weights)


def test_draws_of_different_shapes_are_refused() -> None:
    with pytest.raises(DomainError) as refusal:
        summarise([torch.ones(2, 3), torch.ones(2, 4)], CommonOptions())

    assert refusal.value.error_code == "OUTPUT_SHAPE"


def test_the_inputs_stay_as_they_were() -> None:
    draws = numbers(3, 4, 2)
    before = draws.clone()

    answer = summarise(draws, REGRESSION)
    answer.inference.zero_()

    assert torch.equal(draws, before)


def test_a_buffer_that_the_model_reuses_does_not_change_earlier_draws() -> None:
    draws, summary, buffer = numbers(5, 3), Summary(REGRESSION), torch.empty(3, dtype=torch.float64)

    for draw in draws:
        summary.add(buffer.copy_(draw))

    assert summary.answer().to_json() == summarise(draws, REGRESSION).to_json()


def test_quantiles_of_weighted_draws_repeat_a_draw_by_its_weight() -> None:
    draws = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)

    heavy = weighted_quantiles(draws, torch.tensor([1.0, 1.0, 50.0]), [0.5])[0]
    even = weighted_quantiles(draws, torch.tensor([2.0, 1.0, 2.0]), [0.5])[0]
    alone = weighted_quantiles(draws[:1], torch.tensor([0.1]), [0.0, 0.5, 1.0])

    assert 8.9 < heavy.item() < 9
    assert even.item() == pytest.approx(5.0)
    assert [value.item() for value in alone] == [1.0, 1.0, 1.0]


# --- properties ------------------------------------------------------------------------------

logit_draws = some.tuples(
    some.integers(1, 6), some.integers(1, 4), some.integers(1, 5), some.integers(0, 10**6)
).map(lambda d: numbers(d[0], d[1], d[2], seed=d[3], scale=10 ** (d[3] % 5 - 1)))
tasks = some.sampled_from(["multiclass", "multilabel"])


@settings(max_examples=60, deadline=None)
@given(draws=logit_draws, task=tasks)
def test_information_is_never_negative_and_the_parts_add_up(draws: torch.Tensor, task: str) -> None:
    answer = summarise(draws, CommonOptions(task=task, output="logits"))

    predictive, expected, information = (answer.uncertainty[name] for name in ENTROPIES)
    states = draws.shape[2] if task == "multiclass" else 2
    assert (information >= 0).all()
    assert (expected >= 0).all()
    assert (predictive <= math.log(states) + 1e-12).all()
    torch.testing.assert_close(predictive, expected + information, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    draws=logit_draws,
    options=some.sampled_from([LOGITS, CommonOptions(), REGRESSION]),
    seed=some.integers(0, 99),
)
def test_the_order_of_the_draws_changes_nothing(
    draws: torch.Tensor, options: CommonOptions, seed: int
) -> None:
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(seed))
    weights = (torch.arange(len(draws)) % 3 + 1).double()

    left = summarise(draws, options, weights.tolist())
    right = summarise(draws[order], options, weights[order].tolist())

    assert left.tensors().keys() == right.tensors().keys()
    for name, tensor in left.tensors().items():
        torch.testing.assert_close(tensor, right.tensors()[name], rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(draws=logit_draws)
def test_adding_draws_one_by_one_equals_the_batch_formula(draws: torch.Tensor) -> None:
    summary = Summary(REGRESSION)
    for draw in draws:
        summary.add(draw)

    answer = summary.answer()

    torch.testing.assert_close(answer.inference, draws.mean(dim=0))
    variance = draws.var(dim=0) if len(draws) > 1 else torch.zeros(draws.shape[1:]).double()
    torch.testing.assert_close(answer.uncertainty["variance"], variance)


@settings(max_examples=60, deadline=None)
@given(
    values=some.lists(some.floats(-1e6, 1e6), min_size=1, max_size=9),
    level=some.floats(0, 1),
)
def test_equally_weighted_quantiles_are_numpys(values: list[float], level: float) -> None:
    draws = torch.tensor(values, dtype=torch.float64)

    found = weighted_quantiles(draws, torch.ones(len(values)), [level])[0]

    assert found.item() == pytest.approx(np.quantile(draws.numpy(), level), rel=1e-9, abs=1e-5)
