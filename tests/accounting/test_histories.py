import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fed_dpsat.accounting.by_client import ByClient
from fed_dpsat.accounting.event import PrivacyEvent, merge
from fed_dpsat.accounting.histories import Histories

EVENTS = [
    PrivacyEvent(noise_multiplier=noise, sample_rate=0.1, steps=steps) for noise in (1.0, 2.0) for steps in (1, 2)
]


@settings(max_examples=40)
@given(st.lists(st.dictionaries(st.integers(0, 6), st.sampled_from(EVENTS), max_size=6), max_size=8))
def test_histories_are_those_of_a_plain_loop(cohorts):
    histories, expected = Histories(), {}
    for cohort in cohorts:
        histories.charge(ByClient.of(cohort))
        for client, event in cohort.items():
            expected[client] = merge([*expected.get(client, ()), event])
        assert histories.all().to_dict() == expected
        assert sorted(map(str, histories.distinct())) == sorted({str(history) for history in expected.values()})
        some = np.arange(0, 9, 2)
        assert histories.of(some).to_dict() == {client: expected.get(client, ()) for client in some.tolist()}


def test_histories_without_a_client_leave_no_trace(event):
    """Clients with events of their own: the memory does not grow with the rounds."""
    histories = Histories()
    for _ in range(20):
        histories.charge(ByClient.of({client: event(steps=1 + client) for client in range(10)}))
    assert len(histories.distinct()) == 10
    assert len(histories._histories) <= 21  # those of two rounds, and the empty one


def test_clients_with_equal_histories_share_one_object(event):
    histories = Histories()
    histories.charge(ByClient.of([([1, 3], event()), ([2], event(steps=2))]))
    histories.charge(ByClient.of([([3, 1], event(steps=2)), ([2], event())]))
    found = histories.all().to_dict()
    assert found[1] is found[2] is found[3]
    assert found[1] == merge([event(), event(steps=2)])
