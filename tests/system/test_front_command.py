"""`python -m fl_server.front` says what it needs, and refuses what it can't do before it starts anything."""

import pytest

from fl_server.front.__main__ import arguments


def test_the_help_names_what_the_environment_must_have_and_the_defaults() -> None:
    said = arguments().format_help()

    for needed in ("DJANGO_SETTINGS_MODULE", "FL_SECRET_KEY", "FL_DATABASE_URL", "(2)", ":8000)"):
        assert needed in said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--workers", "0"], "'0' is not a number from 1 to 512"),
        (["--workers", "many"], "'many' is not a number"),
        (["--bind", "8499"], "'8499' is not HOST:PORT, such as 127.0.0.1:8000"),
        (["--bind", "localhost:70000"], "'localhost:70000' is not HOST:PORT"),
        (["--bind", "::1:80"], "'::1:80' is not HOST:PORT"),
    ],
)
def test_a_wrong_option_is_refused_with_what_it_should_be(
    given: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments().parse_args(given)

    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "bind"),
    [([], ("127.0.0.1", 8000)), (["--bind", "[::1]:80"], ("::1", 80))],
)
def test_an_address_is_host_and_port(given: list[str], bind: tuple[str, int]) -> None:
    assert arguments().parse_args(given).bind == bind
