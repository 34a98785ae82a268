"""What a config file may hold; its ranges are in tests/configs."""

from pathlib import PurePosixPath
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import tiny
from tiue_jax.io.errors import InputError
from tiue_jax.training.config import changes, check_config, flatten


def config(**values: Any) -> ConfigDict:
    """A config without types: as one's own file may build it, or with a key's type ignored."""
    made = tiny.get_config().copy_and_resolve_references().unlock()
    with made.ignore_type():
        made.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return made


def refused(made: ConfigDict) -> str:
    with pytest.raises(InputError) as caught:
        check_config(made)
    return str(caught.value)


@pytest.mark.parametrize("key", sorted(flatten(tiny.get_config())))
def test_none_is_refused_for_every_key(key: str) -> None:
    """ml_collections lets None stand for a value of any type."""
    made = tiny.get_config()
    made.update_from_flattened_dict({key: None})
    assert refused(made).startswith(f"[{key}]: not usable, expected ")
    assert refused(made).endswith(", found None")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train__batch_size": "8"}, "[train.batch_size]: not usable, expected a whole number, "),
        ({"train__batch_size": 8.0}, "[train.batch_size]: not usable, expected a whole number, "),
        ({"train__batch_size": True}, "[train.batch_size]: not usable, expected a whole number, "),
        ({"train__student_lr": "1"}, "[train.student_lr]: not usable, expected a number, found"),
        ({"train__student_lr": [1]}, "[train.student_lr]: not usable, expected a number, found"),
        ({"mesh__shard_teacher": 1}, "[mesh.shard_teacher]: not usable, expected True or False"),
        ({"data__field": 3}, "[data.field]: not usable, expected text, found 3"),
        ({"train__remat": ["none"]}, "[train.remat]: not usable, expected text, found ['none']"),
        ({"lora__targets": "to_q"}, "[lora.targets]: not usable, expected texts, found 'to_q'"),
        ({"lora__targets": (3,)}, "[lora.targets]: not usable, expected texts, found [3]"),
        ({"teacher": PurePosixPath("x")}, "[config]: a value is neither number, text nor a list"),
    ],
)
def test_values_of_another_type_are_refused(values: dict, said: str) -> None:
    assert refused(config(**values)).startswith(said)


def test_a_whole_number_is_a_number_and_a_list_a_tuple() -> None:
    check_config(config(train__student_lr=1, lora__targets=["to_q"], log__validation_prompts=()))


@pytest.mark.parametrize("key", ["teacher", "student.start", "data.source", "data.field"])
def test_text_that_is_not_utf8_is_refused(key: str) -> None:
    """A command line in Latin-1: training.json could not be written in the end."""
    made = tiny.get_config()
    made.update_from_flattened_dict({key: "p\udcff.txt"})
    assert refused(made).startswith(f"[{key}]: not UTF-8 text, expected UTF-8, found '\\udcff'")


def test_the_parts_of_a_batch_are_held_where_each_has_its_clip_term() -> None:
    def described(**values: Any) -> dict:
        return {"config": flatten(config(**values)), "teacher": {}, "prompts": {}}

    assert changes(described(), described(train__accumulate=2)) == {}
    with_clip = [described(clip__tau=0.35, train__accumulate=n) for n in (1, 2)]
    assert changes(*with_clip) == {"train.accumulate": (1, 2)}


def test_what_an_older_run_does_not_say_has_changed() -> None:
    now = {"config": {}, "teacher": {"unet": "a"}, "prompts": {}}
    assert changes({"config": {}}, now) == {"teacher: unet": (None, "a")}


def test_a_run_begun_before_a_digest_was_made_goes_on() -> None:
    now = {"config": {}, "teacher": {"unet": "a", "latent_size": "64"}, "prompts": {}}
    before = {"config": {}, "teacher": {"unet": "a"}, "prompts": {}}
    assert changes(before, now) == {}
    before["teacher"]["latent_size"] = "32"
    assert changes(before, now) == {"teacher: latent_size": ("32", "64")}
