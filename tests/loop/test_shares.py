"""How the images of a step are shared by processes and parts."""

import numpy as np
import pytest
from raptor_hf.loop.sampler import BatchShare, StepSampler


@pytest.mark.parametrize(("processes", "parts"), [(1, 1), (2, 1), (3, 2), (7, 1)])
def test_shares_are_the_batch_and_weigh_as_many_images(processes, parts):
    rows = np.arange(100, 117)
    shares = [BatchShare(17, processes, index, parts) for index in range(processes)]
    split = [part for share in shares for part in share.split(rows)]
    assert [row for part in split for row in part] == rows.tolist()
    assert max(map(len, split)) - min(map(len, split)) <= 2
    assert max(map(len, split)) == shares[0].largest_part
    weights = [weight for share in shares for weight in share.weights()]
    assert weights == [len(part) / 17 for part in split]


def test_parts_are_as_few_as_fit():
    def parts(largest, least=1, processes=2):
        return BatchShare.of_at_most(
            64, largest_part=largest, least_parts=least, num_processes=processes, process_index=0
        ).num_parts

    assert [parts(0), parts(32), parts(31), parts(8), parts(8, least=8)] == [1, 1, 2, 4, 8]
    with pytest.raises(ValueError, match="64 images can't be shared by 65 processes"):
        parts(0, processes=65)
    assert str(BatchShare(64, 8, 0, 2)) == (
        "64 images a step: 8 processes × 2 accumulated parts × 4 images"
    )


def test_every_process_gets_its_part_of_the_same_batches():
    whole = list(StepSampler(20, BatchShare(6), seed=1, first=2, steps=7))
    shared = [
        list(StepSampler(20, BatchShare(6, 2, index, 2), seed=1, first=2, steps=7))
        for index in (0, 1)
    ]
    for step, batch in enumerate(whole):
        parts = [part for rows in shared for part in rows[2 * step : 2 * step + 2]]
        assert [row for part in parts for row in part] == batch
