import pytest

from isolith.config import Settings, effective, from_environment, overridden
from isolith.errors import ConfigError


@pytest.mark.parametrize(
    ("environment", "field", "value"),
    [
        ({"ISOLITH_BACKEND": "cuda"}, "backend", "cuda"),
        (
            {"ISOLITH_KERNELS": "rms_norm=reference, rope = cpu.rope"},
            "pins",
            {"rms_norm": "reference", "rope": "cpu.rope"},
        ),
        ({"ISOLITH_FALLBACK": "error"}, "fallback", "error"),
        ({"ISOLITH_PLUGINS": "a,b"}, "plugins", ("a", "b")),
        ({"ISOLITH_DEBUG": "1"}, "debug", True),
        ({"ISOLITH_DEBUG": ""}, "debug", False),
        ({"ISOLITH_TWIN": "a2"}, "twin", "a2"),
        ({"ISOLITH_SHADOW": "0.01"}, "shadow", 0.01),
        ({"OTHER": "1"}, "backend", ""),
    ],
)
def test_environment_is_typed(environment, field, value):
    assert getattr(from_environment(environment), field) == value


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ISOLITH_BACKENDS": "cpu"}, "ISOLITH_BACKENDS is not a setting; did you mean ISOLITH_BACKEND?"),
        ({"ISOLITH_FALLBACK": "no"}, "ISOLITH_FALLBACK must be warn, allow or error; got 'no'."),
        ({"ISOLITH_DEBUG": "yes"}, "ISOLITH_DEBUG must be 0 or 1; got 'yes'."),
        (
            {"ISOLITH_SHADOW": "5"},
            "ISOLITH_SHADOW must be a share from 0 to 1, such as 0.01; got '5'. 5 percent is 0.05.",
        ),
        ({"ISOLITH_SHADOW": "1%"}, "ISOLITH_SHADOW must be a share from 0 to 1, such as 0.01; got '1%'."),
        ({"ISOLITH_SHADOW": "nan"}, "ISOLITH_SHADOW must be a share from 0 to 1, such as 0.01; got 'nan'."),
        ({"ISOLITH_KERNELS": "rms_norm"}, "ISOLITH_KERNELS is a list of operator=kernel; got 'rms_norm'."),
        ({"ISOLITH_KERNELS": "a=b,a=c"}, "ISOLITH_KERNELS names a twice: b and c."),
    ],
)
def test_mistake_in_the_environment_is_named(environment, says):
    with pytest.raises(ConfigError) as caught:
        from_environment(environment)
    assert str(caught.value) == says


def test_override_of_an_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        overridden(Settings(), fallbak="error")
    assert str(caught.value) == "fallbak is not a setting; did you mean fallback?"


def test_override_is_as_strict_as_the_environment():
    with pytest.raises(ConfigError) as caught:
        overridden(Settings(), fallback="never")
    assert str(caught.value) == "fallback must be warn, allow or error; got 'never'."


def test_override_of_a_number_is_as_strict_as_the_environment():
    with pytest.raises(ConfigError):
        overridden(Settings(), shadow=1.5)


def test_override_takes_pins_as_a_mapping():
    assert overridden(Settings(), kernels={"rope": "reference"}).pins == {"rope": "reference"}


def sources(settings):
    return {row.name: row.source for row in effective(settings)}


def test_source_is_the_default_when_nothing_was_set():
    assert sources(Settings())["fallback"] == "default"


def test_source_is_the_variable_even_when_it_sets_the_default():
    settings = from_environment({"ISOLITH_FALLBACK": "warn"})
    assert sources(settings)["fallback"] == "environment variable ISOLITH_FALLBACK"


def test_source_is_the_override_that_came_last():
    settings = overridden(from_environment({"ISOLITH_FALLBACK": "warn"}), fallback="error")
    assert sources(settings)["fallback"] == "isolith.override"
