import math
import random

import dp_accounting
import pytest

from fed_dpsat.accounting.event import KINDS, UNITS, PrivacyError, PrivacyEvent, check_one_unit, dominant, merge


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("noise_multiplier", math.nan, "[0, inf)"),
        ("noise_multiplier", -1e-9, "[0, inf)"),
        ("noise_multiplier", math.inf, "[0, inf)"),
        ("noise_multiplier", "1.0", "number"),
        ("noise_multiplier", True, "number"),
        ("sample_rate", 0.0, "(0, 1]"),
        ("sample_rate", 1.2, "lower the expected batch size"),
        ("sample_rate", math.nan, "(0, 1]"),
        ("steps", 0, "[1, 2**40]"),
        ("steps", 2**41, "[1, 2**40]"),
        ("steps", 1.0, "not an integer"),
        ("steps", True, "not an integer"),
        ("kind", "laplace", "poisson_gaussian"),
    ],
)
def test_an_event_is_checked_where_it_is_made(field, value, says):
    settings = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10} | {field: value}
    with pytest.raises(PrivacyError) as raised:
        PrivacyEvent(**settings)
    assert field in str(raised.value)
    assert repr(value).strip("'") in str(raised.value)
    assert says in str(raised.value)


def test_numbers_have_one_form(event):
    made = event(noise_multiplier=-0.0, sample_rate=1, steps=3)
    assert (str(made.noise_multiplier), made.sample_rate, type(made.sample_rate)) == ("0.0", 1.0, float)


def test_dp_accounting_is_given_the_same_cost(event):
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    assert event(2.0, 0.25, 7).to_dp_event() == dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.25, gaussian), 7
    )
    assert event(2.0, 1.0, 7).to_dp_event() == dp_accounting.SelfComposedDpEvent(gaussian, 7)
    assert event(0.0, 0.25, 7).to_dp_event() == dp_accounting.NonPrivateDpEvent()


def test_an_event_travels_as_scalars(event):
    record = event(1.5, 0.25, 7).to_dict()
    assert record == {"noise_multiplier": 1.5, "sample_rate": 0.25, "steps": 7, "kind": "poisson_gaussian"}
    assert PrivacyEvent.from_dict(record) == event(1.5, 0.25, 7)


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": 7.0},
        {"steps": True},
        {"steps": "7"},
        {"noise_multiplier": 1},
        {"sample_rate": None},
        {"kind": 3},
        {"loss": 0.3},
        {"noise_multiplier": math.nan},
    ],
)
def test_a_record_that_no_event_made_is_refused(event, damage):
    with pytest.raises(PrivacyError):
        PrivacyEvent.from_dict(event().to_dict() | damage)


def test_a_record_with_a_key_missing_is_refused(event):
    record = event().to_dict()
    del record["kind"]
    with pytest.raises(PrivacyError, match="kind"):
        PrivacyEvent.from_dict(record)


def test_merging_counts_equal_releases_in_any_order(event):
    events = [event(2.0, 0.1, 3), event(1.0, 0.1, 1), event(2.0, 0.1, 4), event(1.0, 0.2, 5), event(1.0, 0.1, 2)]
    merged = merge(events)
    assert merged == (event(1.0, 0.1, 3), event(1.0, 0.2, 5), event(2.0, 0.1, 7))
    assert merge(merged) == merged
    random.Random(0).shuffle(events)
    assert hash(merge(events)) == hash(merged)
    assert merge([]) == ()


def test_only_the_costliest_histories_remain(event):
    def one(*release):
        return merge([event(*release)])

    few = [one(1.0, 0.1, 10), one(1.0, 0.05, 20), one(0.9, 0.05, 10)]  # none is worse than another in all three
    cheaper = [one(1.0, 0.1, 9), one(1.0, 0.09, 10), one(1.1, 0.1, 10), one(2.0, 0.05, 20)]
    assert sorted(dominant([*cheaper, *few, *few]), key=str) == sorted(few, key=str)


def test_histories_of_several_events_are_compared_event_by_event(event):
    costly = merge([event(1.0, 0.1, 10), event(2.0, 0.1, 10)])
    cheap = merge([event(1.0, 0.1, 9), event(2.0, 0.05, 10)])
    other = merge([event(1.0, 0.1, 11), event(2.0, 0.05, 10)])
    assert set(dominant([cheap, costly, other])) == {costly, other}
    assert set(dominant([merge([event(1.0, 0.1, 1)]), costly])) == {merge([event(1.0, 0.1, 1)]), costly}


def test_an_event_says_whom_it_protects():
    of = {kind: PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=2, kind=kind) for kind in KINDS}
    assert of["poisson_gaussian"].privacy_unit == "example"
    assert of["poisson_gaussian_clients"].privacy_unit == "client"
    assert set(KINDS.values()) == UNITS.keys()
    for kind in ("poisson_gaussian_clients", "poisson_gaussian_users"):
        assert of[kind].to_dp_event() == of["poisson_gaussian"].to_dp_event()
    assert of["poisson_laplace_users"].to_dp_event() == of["poisson_laplace"].to_dp_event()
    assert len(merge(of.values())) == len(KINDS)
    check_one_unit([])
    check_one_unit([merge([of["poisson_gaussian_clients"]])])
    with pytest.raises(PrivacyError, match="units client and example and user have no common epsilon"):
        check_one_unit([(event,) for event in of.values()])
