import time
from collections.abc import Sequence

import grain
import numpy as np
import pytest

from tiue_jax.data.pipeline import CutReport, make_batches, position, seek
from tiue_jax.data.prompts import Prompts

PROMPTS = Prompts(tuple(f"prompt {i}" for i in range(10)), "ten")


def tokenize(texts: Sequence[str]) -> np.ndarray:
    return np.asarray([[int(text.split()[1])] * 3 for text in texts], np.int32)


def texts_of(batches: grain.DatasetIterator, count: int) -> list[str]:
    return [text for _ in range(count) for text in next(batches)["prompts"]]


def make(batch_size: int = 4, seed: int = 5, **options) -> grain.DatasetIterator:
    return make_batches(PROMPTS, tokenize, batch_size=batch_size, seed=seed, **options)


def test_batches_hold_texts_and_their_ids():
    batch = next(make())
    assert batch["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(batch["input_ids"], tokenize(batch["prompts"]))


def test_batches_are_read_before_they_are_asked_for():
    begun: list[str] = []

    def noted(texts: Sequence[str]) -> np.ndarray:
        begun.append(texts[0])
        return tokenize(texts)

    batches = make_batches(PROMPTS, noted, batch_size=4, seed=5)
    next(batches)
    deadline = time.monotonic() + 60
    while len(begun) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(begun) >= 4, "three more, while the first is computed with"


def test_every_prompt_comes_once_an_epoch_in_another_order_and_batches_straddle_epochs():
    seen = texts_of(make(), 15)  # six epochs of ten in batches of four
    epochs = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == sorted(PROMPTS.texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_order_follows_from_the_seed():
    assert texts_of(make(), 5) == texts_of(make(), 5)
    assert texts_of(make(), 5) != texts_of(make(seed=6), 5)


def test_batch_may_be_larger_than_the_prompts():
    seen = texts_of(make(batch_size=25), 2)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == sorted(PROMPTS.texts)


@pytest.mark.parametrize("count", [1, 10, 20_000])
def test_a_batch_may_be_one_prompt(count: int):
    prompts = Prompts(tuple(f"prompt {i}" for i in range(count)), "many")
    one = make_batches(prompts, tokenize, batch_size=1, seed=5)
    two = make_batches(prompts, tokenize, batch_size=2, seed=5)
    assert texts_of(one, 6) == texts_of(two, 3)


@pytest.mark.parametrize("processes", [2, 4])
def test_hosts_together_see_what_one_host_sees(processes: int):
    alone = texts_of(make(), 5)
    hosts = [make(process_index=i, process_count=processes) for i in range(processes)]
    together = [text for _ in range(5) for host in hosts for text in next(host)["prompts"]]
    assert together == alone


def test_state_goes_on_exactly_across_an_epoch_edge():
    whole = texts_of(make(), 8)
    first = make()
    texts_of(first, 2)
    state = first.get_state()
    second = make()
    second.set_state(state)
    assert position(second) == 2
    assert texts_of(second, 6) == whole[8:]


def test_seek_goes_anywhere():
    batches = make()
    texts_of(batches, 1)
    seek(batches, 5)
    assert position(batches) == 5
    assert texts_of(batches, 1) == texts_of(make(), 6)[20:]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 3, "process_count": 2},
        {"process_index": 2, "process_count": 2},
    ],
)
def test_what_does_not_divide_is_refused(options: dict):
    with pytest.raises(ValueError, match="process"):
        make(**options)


def test_error_of_the_tokenizer_reaches_the_reader():
    def fail(texts: Sequence[str]) -> np.ndarray:
        raise KeyError("no such token")

    with pytest.raises(KeyError, match="no such token"):
        next(make_batches(PROMPTS, fail, batch_size=2, seed=0))


def test_cut_prompts_are_told_of_once_each_and_in_number():
    def encode(texts: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        return np.zeros((len(texts), 77), np.int32), [
            "" if "0" in t else f"end of {t}" for t in texts
        ]

    said: list[str] = []
    report = CutReport(encode, said.append, shown=2)
    report(["prompt 0"])
    assert (said, report.summary()) == ([], "")
    report(["prompt 1", "prompt 0", "prompt 1"])
    assert said == [
        "warning: prompt is longer than 77 tokens, cut off: 'end of prompt 1' of 'prompt 1'"
    ]
    assert "1 prompt longer" in report.summary()
    report(["prompt 2", "prompt 3", "prompt 4", "prompt 1"])
    assert len(said) == 2
    assert "4 prompts longer" in report.summary()
