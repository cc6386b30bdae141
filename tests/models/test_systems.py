"""Systems by name."""

import pytest

from svitt_ops.models.parts.system import System
from svitt_ops.models.systems import load_system, system_names, system_of


def test_all_are_found() -> None:
    assert {"frozen", "svitt"} <= set(system_names()) and "parts" not in system_names()


@pytest.mark.parametrize("name", system_names())
def test_a_system_is_complete(name: str) -> None:
    system = load_system(name)
    assert isinstance(system, System) and system_of(system.config.model_type) == name
    assert {"pretraining", "retrieval"} <= set(system.models)
    for model in system.models.values():
        assert model.config_class is system.config
        assert callable(model.before_step) and isinstance(model.leaves_parameters_unused, property)


def test_svitt_has_every_model_of_the_paper() -> None:
    heads = {"pretraining", "retrieval", "question_answering", "multiple_choice"}
    assert set(load_system("svitt").models) == heads


def test_sources_of_the_paper() -> None:
    sources = load_system("svitt").sources
    assert list(sources) == ["beit", "bert"] and "/beit-base-" in sources["beit"].released


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"system must be one of albef, .*svitt.*, got 'parts'"):
        load_system("parts")
    assert system_of("bert") is None
