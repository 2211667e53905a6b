"""Times of collectives, from spans whose sums are known."""

import pytest

from profiling.collectives import collective_times
from tests.kernel_events import kernel


@pytest.mark.parametrize(
    "spans, sent, alone",
    [
        ([("gemm", 0, 1000)], 0.0, 0.0),
        ([("ncclDevKernel_AllGather", 0, 1000)], 1.0, 1.0),
        ([("ncclDevKernel_AllGather", 0, 1000), ("gemm", 500, 1500)], 1.0, 0.5),
        # Two at once count once; what touches is one span.
        (
            [("ncclA", 0, 1000), ("ncclB", 500, 2000), ("gemm", 0, 200), ("gemm", 200, 400), ("gemm", 1900, 3000)],
            2.0,
            1.5,
        ),
        (
            [("gemm", 0, 100), ("ncclA", 100, 300), ("gemm", 150, 200), ("gemm", 250, 260), ("ncclA", 400, 500)],
            0.3,
            0.24,
        ),
    ],
)
def test_sent_and_alone(spans, sent, alone):
    assert collective_times(kernel(*span) for span in spans) == {"collectives_ms": sent, "collectives_alone_ms": alone}
