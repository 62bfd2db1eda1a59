"""Parameters that are not trained: a worker that has others than the chief says so."""

from __future__ import annotations

import logging

import pytest
import torch

from ma_client.torch.frozen import differing, digests_of
from modelaverage.manifest import MAX_FROZEN_BYTES
from tests.conftest import StartServer
from tests.optimizer.workers import Join, Net, start_all


class Adapted(Net):
    """A net beside frozen parameters."""

    def __init__(self, **frozen: torch.Tensor) -> None:
        super().__init__()
        for name, values in frozen.items():
            self.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))


def base(seed: int = 0) -> torch.Tensor:
    return torch.randn(300, 200, generator=torch.Generator().manual_seed(seed))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_worker_with_other_frozen_parameters_than_the_chief_names_them(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(2)
    chiefs, others = Adapted(same=base(), one=base(1), two=base(2)), Adapted(same=base(), one=base(3), two=base(4))
    start_all([join(server, model, index=index, num_worker=2) for index, model in enumerate((chiefs, others))])
    (warning,) = warnings(caplog)
    assert warning.startswith("worker-1 has other frozen parameters than the chief: one, two; they are in no center")


def test_many_are_counted(start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture) -> None:
    server = start_server(2)
    models = [Adapted(**{f"p{n}": torch.full((2,), float(sign * n)) for n in range(1, 8)}) for sign in (1, -1)]
    start_all([join(server, model, index=index, num_worker=2) for index, model in enumerate(models)])
    (warning,) = warnings(caplog)
    assert ": p1, p2, p3 and 4 more; " in warning


def test_the_same_frozen_parameters_are_not_worth_a_word(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(2)
    other = Adapted(base=base().bfloat16(), turned=base().t().contiguous().t(), own=torch.zeros(3))
    chiefs = Adapted(base=base(), turned=base())
    start_all([join(server, model, index=index, num_worker=2) for index, model in enumerate((chiefs, other))])
    assert warnings(caplog) == []


def test_a_chief_that_comes_again_with_others_says_so_and_changes_nothing(
    start_server: StartServer, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(1)
    join(server, Adapted(base=base())).start()
    assert warnings(caplog) == []
    for seed in (1, 0):
        caplog.clear()
        again = join(server, Adapted(base=base(seed)))
        again.start()
        assert [text for text in warnings(caplog) if "frozen" in text] == (
            [
                "worker-0 has other frozen parameters than the chief: base; they are in no center, so load the same in "
                "every worker, or the average is of models that do not fit together"
            ]
            if seed
            else []
        )


def test_a_model_without_frozen_parameters_says_nothing(start_server: StartServer, join: Join) -> None:
    worker = join(start_server(1))
    worker.start()
    assert worker.session.frozen_digests == b""


# Digests.


def test_of_a_large_parameter_values_all_over_it_are_compared() -> None:
    values = torch.zeros(1_000_003)
    told = digests_of({"base": values})
    assert len(told) == 8
    for place in range(0, 1_000_003, 1_000):
        values[place : place + 1_000] = 1.0
        assert differing({"base": values}, told) == ["base"]
        values[place : place + 1_000] = 0.0


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2), (1, 40, 1, 40)])
def test_values_have_their_places_whatever_the_layout(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    told = digests_of({"base": values})
    backwards = tuple(reversed(range(len(shape))))
    turned = values.permute(backwards).contiguous().permute(backwards)
    assert differing({"base": turned}, told) == []
    assert differing({"base": values + 1}, told) == ["base"]
    if values.numel() > 2:
        assert differing({"base": values.flatten().flip(0).reshape(shape)}, told) == ["base"]


def test_what_has_no_plain_numbers_here_is_left_out() -> None:
    odd = {
        "quantized": torch.zeros(4, dtype=torch.uint8),
        "elsewhere": torch.zeros(4, device="meta"),
        "empty": torch.zeros(0, 3),
        "complex": torch.zeros(4, dtype=torch.complex64),
        "sparse": torch.zeros(4).to_sparse(),
    }
    assert digests_of(odd) == b""


def test_a_parameter_that_only_one_of_them_has_does_not_count() -> None:
    told = digests_of({"base": base(), "theirs": base(1)})
    assert differing({"base": base(), "ours": base(2)}, told) == []


@pytest.mark.parametrize("told", [b"", b"\0", b"1234567", b"12345678", b"123456789", bytes(MAX_FROZEN_BYTES)])
def test_digests_of_another_form_say_nothing(told: bytes) -> None:
    assert differing({"base": base()}, told) == []
