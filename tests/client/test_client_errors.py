"""What an error says: each thing once, and a next step only where it fits."""

from fl_client.errors import Conflict, error_for


def test_a_field_that_the_sentence_names_is_not_told_twice() -> None:
    fields = [{"pointer": "/options/x", "code": "unknown", "detail": "unknown"}]

    once = error_for(400, {"detail": "/options/x: unknown", "errors": fields}, None)
    beside = error_for(400, {"detail": "two are wrong", "errors": fields}, None)

    assert str(once).count("/options/x") == 1
    assert "/options/x: unknown" in str(beside)


def test_a_conflict_that_says_what_to_do_gets_no_other_advice() -> None:
    error = error_for(409, {"detail": "add clients, or ask for less", "code": "X"}, None)

    assert isinstance(error, Conflict)
    assert str(error) == "add clients, or ask for less [X]"


def test_names_that_do_not_fit_come_with_what_to_compare() -> None:
    error = error_for(422, {"detail": "b is missing", "code": "KEY_MISMATCH"}, None)

    assert "Next step: compare names" in str(error)
