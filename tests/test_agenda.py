"""The agenda: when leases come up."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.agenda import SLOT_SECONDS, Agenda


@given(
    st.dictionaries(st.integers(0, 50), st.floats(0, 100, allow_nan=False), max_size=30),
    st.sets(st.integers(0, 50)),
    st.floats(0, 120, allow_nan=False),
)
def test_nothing_comes_up_early_and_nothing_later_than_a_slot(
    dues: dict[int, float], removed: set[int], now: float
) -> None:
    """What is taken is due, what is left was due at most a slot ago, and removed ids are gone."""
    agenda = Agenda()
    slots = {lease_id: agenda.add(lease_id, due) for lease_id, due in dues.items()}
    for lease_id in removed & set(slots):
        agenda.remove(lease_id, slots[lease_id])
    kept = {lease_id: due for lease_id, due in dues.items() if lease_id not in removed}
    assert len(agenda) == len(kept)
    taken: list[int] = []
    while (found := agenda.take(now)) is not None:
        slot, ids = found
        assert all(slots[lease_id] == slot for lease_id in ids)
        taken += ids
    assert all(kept.pop(lease_id) <= now for lease_id in taken)
    assert all(due > now - SLOT_SECONDS for due in kept.values())
    assert len(agenda) == len(kept)


def test_slots_come_in_order_and_ids_as_they_were_added() -> None:
    """An earlier slot comes first, whatever was added first."""
    agenda = Agenda()
    for lease_id, due in ((1, 5.0), (2, 1.0), (3, 5.0), (4, 1.01)):
        agenda.add(lease_id, due)
    assert agenda.take(0.99) is None
    assert [agenda.take(9.0), agenda.take(9.0), agenda.take(9.0)] == [
        (8, [2]),
        (9, [4]),
        (40, [1, 3]),
    ]
    assert agenda.take(9.0) is None


def test_a_taken_slot_is_forgotten() -> None:
    """Removing an id whose slot was taken does nothing; the slot number may be used again."""
    agenda = Agenda()
    slot = agenda.add(1, 1.0)
    assert agenda.take(1.0) == (slot, [1])
    agenda.remove(1, slot)
    assert agenda.add(2, 1.0) == slot
    agenda.remove(1, slot)
    assert len(agenda) == 1
