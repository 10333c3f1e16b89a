"""Nothing is written beside the tensors: 4 KiB before and behind each, filled with NaN and then with large numbers."""

import torch

from isolith_conformance.buffers import LARGE_BYTES, NAN_BYTES, Layout, place, strides_in
from isolith_conformance.case import check
from isolith_conformance.trial import Trial


@check("guard zones", "one")
def test_nothing_is_written_beside_the_tensors(trial: Trial) -> None:
    layout: Layout = "padded" if trial.takes("padded") else "as_is"
    for fill in (NAN_BYTES, LARGE_BYTES):
        response = trial.run(poison=True, buffers=True, fill=fill, layout=layout)
        for number, zone in enumerate(response.zones):
            if zone.numel() and bool((zone != fill).any()):
                trial.fail(f"writes beside memory that it allocates ({number}. allocation)", "guard zones")
        for name, value in trial.case.arguments.items():
            if isinstance(value, torch.Tensor) and not untouched(response.buffers.get(name), value, layout, fill):
                trial.fail(f"writes beside {name}", "guard zones")


def untouched(buffer: torch.Tensor | None, value: torch.Tensor, layout: Layout, fill: int) -> bool:
    """Whether a buffer came back, and every byte of it that belongs to no element of the argument is as it was."""
    outside = beside(value, layout)
    return buffer is not None and buffer.shape == outside.shape and bool((buffer[outside] == fill).all())


def beside(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Which bytes of an argument's buffer belong to no element of it."""
    marks = (
        torch.full((value.numel() * value.itemsize,), 0xFF, dtype=torch.uint8).view(value.dtype).reshape(value.shape)
    )
    buffer, _ = place(marks, strides_in(value, layout), 0, layout)
    return buffer == 0
